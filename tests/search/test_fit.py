"""fit: the choice against every choice there is, bytes against files, scores against KL, tables, structure, refusals, the recipe stage."""

import itertools
import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import blockwright
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.blocks.replacement import divergence
from blockwright.blocks.run import Run
from blockwright.claims import fit as claims
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
        assert run.details["fit"]["rounds"][0]["bytes"] <= target


def test_what_was_chosen_is_what_stands():
    run = run_of(llama(hidden=128, vocab=512), bits_per_weight=7.0, samples=1, bits=[4, 8], group_sizes=[32, 64])
    model, told = run.model.build(), run.details["fit"]
    for block in told["blocks"]:
        for name, t in block["linears"].items():
            module = model.get_submodule(name)
            if t == "dense":
                assert type(module) is torch.nn.Linear
            else:
                assert isinstance(module, PackedLinear) and t == f"int{module.bits} g{module.group_size}"
    embedding = model.get_input_embeddings()
    assert (embedding.bits if isinstance(embedding, PackedEmbedding) else 0) == told["embedding"]


# scores


def test_corrected_scores_predict_the_divergence():
    model = llama(layers=3, hidden=64)
    run = run_of(model, bits_per_weight=9.0, bits=[5, 8], group_sizes=[32], samples=3, refine=1, score_windows=8, embedding=[8])
    last = run.details["fit"]["rounds"][-1]
    true = divergence(Blueprint.of_module(model), run.model, text())
    assert true == pytest.approx(min(r["measured"] for r in run.details["fit"]["rounds"]), rel=1e-4)
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


# tables


def test_a_table_is_used_again_and_one_of_another_model_text_or_offer_is_refused(tmp_path, monkeypatch):
    table, model = tmp_path / "table.json", llama()
    first = run_of(model, bits_per_weight=7.0, table=str(table), **FEW)
    monkeypatch.setattr(method, "measure", lambda *a: pytest.fail("measured again"))
    again = run_of(model, bits_per_weight=7.0, table=str(table), **FEW)
    assert first.details == again.details
    for what, changed, options in (
        ("model", llama(hidden=32), FEW),
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
def test_what_cannot_be_is_refused(options, match):
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
