"""A model goes through the main job with a few of its blocks resident, not all: the small form of `blockwright reproduce streaming`."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from blockwright import meter
from blockwright.claims import streaming

SMALL_FILES = (
    "from blockwright.recipes import export\nexport.SHARD_BYTES = 8 * 2**20\n"  # as small beside the model as 256 MB are beside a large one
)
FIT = {"fit": {"bits_per_weight": 5.7, "group_sizes": [64], "bits": [5, 6], "samples": 0, "refine": 0}}  # by estimates alone
WHOLE = "model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n[p.sum() for p in model.parameters()]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds `model`: 48 blocks, 271 MB in bf16."""
    scratch = tmp_path_factory.mktemp("streaming")
    config = LlamaConfig(
        vocab_size=91, hidden_size=512, intermediate_size=1408, num_hidden_layers=48, num_attention_heads=8, num_key_value_heads=2
    )
    streaming.write_model(scratch / "model", config, blocks_per_file=6)
    return scratch


def test_the_random_model_is_whole_and_the_same_every_time(folder, tmp_path):
    config = LlamaConfig(vocab_size=91, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    for name in ("a", "b"):
        streaming.write_model(tmp_path / name, config, blocks_per_file=2, seed=4)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) == 3 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 9 and len(index) == 48 * 9 + 3
    with safe_open(folder / "model" / index["model.layers.7.mlp.up_proj.weight"], "pt") as f:
        w = f.get_tensor("model.layers.7.mlp.up_proj.weight")
    assert w.dtype == torch.bfloat16 and w.shape == (1408, 512) and float(w.float().std()) == pytest.approx(0.02, rel=0.01)


def test_a_job_holds_some_blocks_and_not_the_model(folder, monkeypatch):
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", str(2**20)
    )  # small tensors too go back to the system when they are freed, as large ones do
    found = streaming.peaks(folder, streaming.STAGES | FIT, length=32, setup=SMALL_FILES)
    whole = meter.peak_rss("-c", streaming.LOADED + WHOLE, str(folder / "model")) - found["loaded"]
    limit = 0.65 * found["bytes"]
    assert whole > 0.95 * found["bytes"] > limit  # loading everything breaks the limit
    for stage, numbers in found["stages"].items():
        assert numbers["peak_bytes"] < limit, stage
    assert found["stages"]["finequant"]["bits"] == pytest.approx(4.25, abs=0.1)
    assert 5.2 < found["stages"]["fit"]["bits"] <= 5.7
    assert found["stages"]["dsnot"]["bits"] == pytest.approx(16, abs=0.1)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["model"]  # what the jobs wrote is deleted
