"""What several test files need."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

if not Path("/dev/nvidiactl").exists():  # Triton kernels then run in its interpreter, which must be said before transformers imports triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """tests/plugin, a package that adds methods, installed into a folder of its own: the environment in which it is found."""
    site = tmp_path_factory.mktemp("site")
    here = Path(__file__).parent / "plugin"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(here)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="session")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts a random Llama with a tokenizer of whole words (model), and two texts for it (learn.txt, judge.txt), into a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("small")
    words = ["<unk>", "<end>", *(f"w{i}" for i in range(90))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    ).save_pretrained(made / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, max_new_tokens=7)
    model.save_pretrained(made / "model")
    (made / "model" / "LICENSE").write_text("The licence of the small model.\n")
    for name, shift in (("learn", 0), ("judge", 7)):
        (made / f"{name}.txt").write_text(" ".join(f"w{(i * i + shift * i) % 90}" for i in range(600)))
    return lambda folder: copytree(made, folder, dirs_exist_ok=True)
