"""fit: the choice against every choice there is, bytes against files, scores against KL, tables, structure, refusals, the recipe stage."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import blockwright
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.blocks.replacement import divergence
from blockwright.blocks.run import Run
from blockwright.claims import fit as claims
from blockwright.claims.composition import write_small_model
from blockwright.errors import BlockwrightError
from blockwright.recipes import export
from blockwright.search import fit as method
from blockwright.search.fit_program import Problem
from blockwright.search.fit_scores import Wanted, measure

fit = method.fit
FEW = {"bits": [3, 8], "group_sizes": [32], "samples": 0, "refine": 0}


def llama(layers=2, hidden=64, vocab=96, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **more)).eval()


def text(n=8, length=16, vocab=96):
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(1))


def run_of(model, **options):
    run = Run(Blueprint.of_module(model), calibration=text(), seed=0)
    run.begin("fit")
    fit(run, **options)
    return run


def dense_bytes(model):
    return export.file_bytes(Blueprint.of_module(model))


# the choice


def test_the_choice_is_the_best_of_all_that_fit():
    model = llama(layers=1)
    run = Run(Blueprint.of_module(model), calibration=text(), seed=0)
    run.begin("fit")
    wanted = Wanted.checked(["quantise"], [], [3, 8], [32], [8], [], [])
    measured = measure(run, wanted, 0, 2)
    problem = Problem(run, wanted, measured)
    names = list(problem.offered)
    every = []
    for picks in itertools.product(range(3), repeat=len(names)):
        for bits in (0, 8):
            cost = sum(measured["blocks"][0]["estimates"][n][str(problem.offered[n][i])] for n, i in zip(names, picks, strict=True))
            size = 0
            for n, i in zip(names, picks, strict=True):
                rows, columns = model.get_submodule(n).weight.shape
                size += (
                    2 * rows * columns,
                    rows * columns * 3 // 8 + 2 * rows * columns // 32 + 16,
                    rows * columns + 2 * rows * columns // 32 + 16,
                )[i]
            size += 2 * 96 * 64 if not bits else 96 * 64 + 2 * 96 + 16
            every.append((cost + measured["embedding"].get(str(bits), 0.0), size))
    outside = 2 * (96 * 64 + 3 * 64) + problem.header  # an untied head, norms
    for share in (0.45, 0.6, 0.8):
        target = int(share * problem.whole)
        choice = problem.solve(target, 0.0)
        best = min(cost for cost, size in every if size + outside <= target)
        assert choice.predicted == pytest.approx(best, rel=1e-6) and choice.gap == 0 and choice.bytes <= target
        assert problem.value(choice) == pytest.approx(choice.predicted, rel=1e-9)


def test_more_bytes_never_add_more():
    run = Run(Blueprint.of_module(llama()), calibration=text(), seed=0)
    run.begin("fit")
    wanted = Wanted.checked(["quantise", "prune", "drop", "low-rank"], [], [2, 4, 8], [32], [4, 8], [0.5], [0.5])
    problem = Problem(run, wanted, measure(run, wanted, 1, 2))
    values = [problem.solve(int(share * problem.whole), 0.0).predicted for share in (0.3, 0.4, 0.5, 0.7, 0.9)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


@pytest.mark.parametrize("allow", [["quantise"], ["quantise", "prune", "drop", "low-rank"]])
def test_the_files_are_no_larger_than_asked(allow):
    model = llama(hidden=128, vocab=512)
    for share in (0.4, 0.6):
        target = int(share * dense_bytes(model))
        run = run_of(model, size=f"{target / 1000}KB", allow=allow, samples=1, bits=[2, 4, 8], group_sizes=[32, 64])
        assert 0.9 * target < export.file_bytes(run.model) <= target
        assert run.details["rounds"][0]["bytes"] <= target


def test_what_was_chosen_is_what_stands():
    run = run_of(llama(hidden=128, vocab=512), bits_per_weight=7.0, samples=1, bits=[4, 8], group_sizes=[32, 64])
    model, told = run.model.build(), run.details
    for block in told["blocks"]:
        for name, about in block["linears"].items():
            t, module = about["chosen"], model.get_submodule(name)
            if t == "dense":
                assert type(module) is torch.nn.Linear
            else:
                assert isinstance(module, PackedLinear) and t == f"int{module.bits} g{module.group_size}"
    embedding = model.get_input_embeddings()
    assert told["embedding"]["chosen"] == (f"int{embedding.bits} g64" if isinstance(embedding, PackedEmbedding) else "dense")


# scores


def test_corrected_scores_predict_the_divergence():
    model = llama(layers=3, hidden=64)
    run = run_of(model, bits_per_weight=9.0, bits=[5, 8], group_sizes=[32], samples=3, refine=1, score_windows=8, embedding=[8])
    last = run.details["rounds"][-1]
    true = divergence(Blueprint.of_module(model), run.model, text())
    assert true == pytest.approx(min(r["measured"] for r in run.details["rounds"]), rel=1e-4)
    assert 0.4 < last["measured"] / last["predicted"] < 2.5


def test_refining_never_keeps_the_worse_model():
    model = llama(layers=3)
    once, twice = (run_of(model, bits_per_weight=5.0, bits=[2, 3, 4], group_sizes=[32], refine=n) for n in (0, 2))
    dense = Blueprint.of_module(model)
    assert divergence(dense, twice.model, text()[:4]) <= divergence(dense, once.model, text()[:4]) * (1 + 1e-6)


def test_curing_comes_nearer_to_the_dense_model():
    model = llama(layers=2, hidden=64)
    plain, cured = (run_of(model, bits_per_weight=8.5, cure_steps=n, bits=[3, 4], group_sizes=[32], keep=["embedding"]) for n in (0, 40))
    dense = Blueprint.of_module(model)
    assert divergence(dense, cured.model, text()) < divergence(dense, plain.model, text())
    assert [f["bits"] for f in cured.model.forms.values()] == [f["bits"] for f in plain.model.forms.values()]
    assert len(cured.curves) == 2 and all(len(v) == 40 for v in cured.curves.values())


def test_the_report_is_told_the_front_the_uniform_settings_and_the_price_of_a_megabyte():
    model = llama(hidden=128, vocab=512)
    run = run_of(model, bits_per_weight=8.0, bits=[4, 8], group_sizes=[32], samples=0, refine=0, front=4)
    front, uniform = run.details["front"], {label: (cost, size) for label, cost, size in run.details["uniform"]}
    assert len(front) == 4 and [p for p, _ in front] == sorted((p for p, _ in front), reverse=True)
    assert [b for _, b in front] == sorted(b for _, b in front) and run.details["megabyte"] >= 0
    assert set(uniform) == {"dense", "int4 g32", "int8 g32"} and uniform["dense"][0] == 0.0
    made = blockwright.finequant(model, bits=4, group_size=32)
    size = export.file_bytes(Blueprint.of_module(made))
    assert 0 <= uniform["int4 g32"][1] - size <= 200 * len(made.state_dict())
    json.dumps(run.details)


def test_it_is_called_on_a_model_in_memory():
    model = llama(hidden=128, vocab=512)
    smaller = blockwright.fit(model, calibration=text(), bits_per_weight=6.0, samples=0, refine=0, group_sizes=[32, 64])
    assert isinstance(smaller.get_input_embeddings(), PackedEmbedding)
    logits = smaller(text()).logits
    assert logits.dtype == torch.float32 and bool(torch.isfinite(logits).all())


# tables


def test_a_table_is_used_again_and_one_of_another_model_text_or_offer_is_refused(tmp_path, monkeypatch):
    table, model = tmp_path / "table.json", llama()
    first = run_of(model, bits_per_weight=7.0, table=str(table), **FEW)
    monkeypatch.setattr(method, "measure", lambda *a: pytest.fail("measured again"))
    again = run_of(model, bits_per_weight=7.0, table=str(table), **FEW)
    assert first.details == again.details
    for what, changed, options in (
        ("model", llama(layers=3), FEW),
        ("offers", model, FEW | {"bits": [4, 8]}),
    ):
        with pytest.raises(BlockwrightError, match=f"of another {what}"):
            run_of(changed, bits_per_weight=7.0, table=str(table), **options)
    with pytest.raises(BlockwrightError, match="of another text"):
        run = Run(Blueprint.of_module(model), calibration=text() + (text() == 0), seed=0)
        fit(run, bits_per_weight=7.0, table=str(table), **FEW)
    table.write_text(table.read_text()[:100])
    with pytest.raises(BlockwrightError, match="damaged"):
        run_of(model, bits_per_weight=7.0, table=str(table), **FEW)


# as a stage of a recipe


def job(folder, name, **options):
    return {
        "model": str(folder / "model"),
        "stages": [{"fit": {"bits_per_weight": 8.0, "samples": 1, "score_windows": 2, "group_sizes": [32], **options}}],
        "out": str(folder / name),
        "calibration": {"text": str(folder / "learn.txt"), "num": 6, "length": 16},
        "evaluation": {"text": str(folder / "judge.txt"), "num": 2, "length": 16},
        "measure": {"use": False},
    }


def test_a_folder_is_written_opened_and_told(tmp_path):
    write_small_model(tmp_path)
    report = blockwright.run(job(tmp_path, "out", cure_steps=2))
    model = blockwright.load(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.arange(16)[None]).logits).all())
    [told] = report["stages"]
    assert report["result"]["bytes"] <= 8.0 / 16 * report["dense"]["bytes"]
    assert told["details"]["rounds"][0]["bytes"] >= report["result"]["bytes"]


@pytest.mark.parametrize("place", ["solve", "correct", "items"])
def test_a_run_that_ended_anywhere_goes_on_to_the_same_bits(tmp_path, monkeypatch, place):
    write_small_model(tmp_path)
    tables = {name: str(tmp_path / f"{name}.json") for name in ("whole", "broken")}
    blockwright.run(job(tmp_path, "whole", table=tables["whole"]))

    def stop(*args, **options):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Problem, place, stop)
        with pytest.raises(RuntimeError, match="stopped"):
            blockwright.run(job(tmp_path, "broken", table=tables["broken"]))
    blockwright.run(job(tmp_path, "broken", table=tables["broken"]), resume=True)
    a, b = ([p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors"))] for name in ("whole", "broken"))
    assert a == b and a


def test_the_command_line_measures_once_for_two_sizes_and_refuses_in_one_line(tmp_path):
    write_small_model(tmp_path)

    def command(*words):
        line = [sys.executable, "-m", "blockwright.cli", "fit", "model", *words, "--windows", "2", "--length", "16", "--quick"]
        line += ["--calibration", "learn.txt", "--evaluation", "judge.txt"]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)

    first = command("--bits-per-weight", "8", "--out", "first")
    second = command("--bits-per-weight", "7", "--out", "second", "--table", "first.fit.json")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "table   first.fit.json" in " ".join(first.stdout.split("\n")) and "fit pass 3" not in second.stdout
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.safetensors")) for name in ("first", "second")]
    assert sizes[1] < sizes[0]
    wrong = command("--size", "1KB", "--out", "third")
    assert wrong.returncode == 2 and "smallest choice takes" in wrong.stderr and not (tmp_path / "third").exists()


# other architectures


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_it_finds_linears_by_structure(kind):
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)),
        "neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        ),
    }[kind]().eval()
    made = run_of(model, bits_per_weight=8.0, **FEW).model.build(dtype=torch.float32)
    assert any(isinstance(m, PackedLinear) for m in made.modules())
    assert bool(torch.isfinite(made(text()).logits).all())


# refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allow": []}, "allow is empty.*quantise"),
        ({"size": "1MB", "bits_per_weight": 4.0}, "one of them"),
        ({"size": "many"}, "size='many'.*120MB"),
        ({"size": "1KB"}, r"smallest choice takes 0\.\d+ MB, the dense model 0\.\d+ MB"),
        ({"size": "90GB"}, "lower the size"),
        ({"bits": [9]}, "2 to 8"),
        ({"widths": [1.5]}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(options, match, monkeypatch):
    monkeypatch.setattr(method, "measure", lambda *a: pytest.fail("measured"))
    with pytest.raises(BlockwrightError, match=match):
        run_of(llama(layers=1), **(FEW | options))


def test_a_word_that_is_not_allowed_is_refused():
    with pytest.raises(BlockwrightError, match="allow='melt'.*quantise, low-rank"):
        Wanted.checked(["melt"], [], [4], [32], [8], [], [])


def test_linears_that_are_kept_stay_dense():
    run = run_of(llama(), bits_per_weight=11.0, keep=["down_proj", "embedding"], **FEW)
    assert not any("down_proj" in name or "embed" in name for name in run.model.forms) and run.model.forms


# the claim


def test_the_claim_runs_at_a_tiny_size():
    model, ids = llama(hidden=128, vocab=512), text(8, 16, 512)
    made = claims.measure(model, ids, text(4, 16, 512), seed=0, device="cpu", sizes={"int4 g64": (4, 64)}, cure=2, trials=4)
    assert [p.name for p in made.parts][-1].startswith("4 random choices") and math.isfinite(made.measured)
    assert {row["model"] for row in made.rows} == {"best uniform", "fit", "best uniform, learned", "fit, learned"}
    json.dumps(made.rows)
    assert blockwright.fit is not None
