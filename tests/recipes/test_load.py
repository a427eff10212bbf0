"""bw.load opens what was written, and refuses what is not whole."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import recipe, tree
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import blockwright as bw
from blockwright.blocks import folders
from blockwright.errors import BlockwrightError
from blockwright.recipes.load import load, open_folder

IDS = torch.randint(0, 92, (2, 9), generator=torch.Generator().manual_seed(0))
CASES = {
    "dense": recipe(),
    "standard": recipe({"sample-grid": {"bits": 4}}),
    "asymmetric": recipe({"sample-grid": {"symmetric": False}}),
    "own": recipe({"sample-fold": {"drop": [1], "share": {1: 0}}}, {"sample-grid": {"bits": 3}}, embedding=8),
    "finequant": recipe({"finequant": {"group_size": 32}}, embedding=8, dtype="bf16"),
    "unrolled": recipe({"sample-fold": {"share": {2: 0}}}, {"finequant": {"bits": 8, "group_size": 32}}, export="unrolled"),
    "plain weights": recipe({"sample-grid": {"bits": 4}}, embedding=4, export="dense"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(small_job, tmp_path_factory):
    """name -> the folder that the recipe of CASES made."""
    folder = tmp_path_factory.mktemp("load")
    small_job(folder)
    texts = {
        name: {"text": str(folder / f"{file}.txt"), "num": 2, "length": 16}
        for name, file in (("calibration", "learn"), ("evaluation", "judge"))
    }
    for name, r in CASES.items():
        bw.run(
            r
            | texts
            | {"model": str(folder / "model"), "out": str(folder / name), "measure": {"use": False, "quality": False, "blocks": False}}
        )
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("name", CASES)
def test_every_folder_opens_with_the_logits_of_its_own_weights(written, name):
    expected = logits(open_folder(written / name).build(dtype=torch.float32))
    slow = load(written / name, dtype=torch.float32, fast=False)
    assert isinstance(slow, LlamaForCausalLM) and not slow.training and torch.equal(logits(slow), expected)
    for dtype, tolerance in ((torch.float32, 0.02), (torch.bfloat16, 0.05)):  # fast kernels may compute in bf16
        fast = load(written / name, dtype=dtype)
        assert (logits(fast) - expected).abs().max() <= tolerance * expected.abs().max()
    assert not any(p.requires_grad for p in slow.parameters()) and slow.config.num_hidden_layers == len(slow.model.layers)


@pytest.mark.parametrize("name", CASES)
def test_generation_with_a_cache_equals_the_whole_forward(written, name):
    model = load(written / name, dtype=torch.float32, fast=False)
    out = model.generate(IDS[:1], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    again = IDS[:1]
    for _ in range(12):
        again = torch.cat([again, logits_of(model, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_the_dtype_is_that_of_all_that_is_not_packed(written):
    model = load(written / "own", dtype=torch.float16, fast=False)
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float16
    model = load(written / "own", fast=False)
    assert model.model.norm.weight.dtype == torch.bfloat16 and model.dtype == torch.bfloat16


def test_a_plain_folder_opens_too(written):
    ours = load(written / "model", dtype=torch.float32)
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(written / "model", dtype=torch.float32)))
    assert bw.load(str(written / "model")).dtype == torch.bfloat16


# what is not whole


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written / "own", tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("name", ["blockwright.safetensors", "config.json", "blockwright.json", "tokenizer.json", "report.json", "LICENSE"])
@pytest.mark.parametrize("change", ["cut", "flipped", "missing"])
def test_a_file_that_differs_from_the_manifest_is_named(folder, name, change):
    data = (folder / name).read_bytes()
    if change == "missing":
        (folder / name).unlink()
    else:
        middle = len(data) // 2
        (folder / name).write_bytes(data[:-1] if change == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    if (name, change) == ("blockwright.json", "missing"):
        with pytest.raises(BlockwrightError, match="own: no weights found"):
            load(folder)
    else:
        with pytest.raises(BlockwrightError, match=rf"own/{name}: (differs from manifest.json|missing)"):
            load(folder)


def test_without_the_check_only_what_is_read_must_be_whole(folder):
    (folder / "LICENSE").unlink()
    (folder / "report.json").write_text("changed")
    assert load(folder, check=False) is not None
    (folder / "manifest.json").unlink()
    with pytest.raises(BlockwrightError, match="own: no manifest.json"):
        load(folder)


def test_a_newer_folder_is_refused(folder):
    for name in ("blockwright.json", "manifest.json"):
        path = folder / name
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | {"format": 2}))
        with pytest.raises(BlockwrightError, match=rf"{name}: format 2. Allowed: up to 1. Use a newer blockwright"):
            load(folder, check=name == "manifest.json")
        path.write_text(text)


def test_an_old_folder_that_a_killed_writer_moved_away_is_brought_back(folder):
    before = tree(folder)
    folder.rename(folder.with_name(".own.old-0123abcd"))
    assert load(folder) is not None and tree(folder) == before


def test_a_folder_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"hidden_size": 128}, {"num_hidden_layers": 5}, {"vocab_size": 10}, {"intermediate_size": 64}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BlockwrightError, match=r"own: tensor \S+ is .*, expected "):
            load(folder, check=False)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    for path, said in ((tmp_path / "none", "does not exist"), (tmp_path, "is empty")):
        with pytest.raises(BlockwrightError, match=said):
            load(path)


@settings(max_examples=60, deadline=None)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4),
    file=st.sampled_from(["blockwright.json", "config.json", "blockwright.safetensors", "manifest.json"]),
)
def test_a_mutated_folder_is_read_or_refused(written, edits, file):
    path = written / "own" / file
    data = good = path.read_bytes()
    for share, cut, add in edits:
        at = int(share * min(len(data), 4000))
        data = data[:at] + add + data[at + cut :]
    path.write_bytes(data)
    try:
        for check in (False, True):
            try:
                load(written / "own", check=check)
                assert data == good or not check or file == "manifest.json"
            except BlockwrightError as told:
                assert str(told)
    finally:
        path.write_bytes(good)


def test_the_manifest_is_checked_by_content_not_by_time(written):
    for path in (written / "own").iterdir():
        path.touch()
    folders.verify(written / "own")
    assert load(written / "own") is not None
