"""puzzle: distillation and scores against whole models, the choice against all choices, the stage, its refusals."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from parents import (
    ATTENTION,
    FFN,
    LEARN,
    V,
    block_of,
    chain_of,
    ids,
    kl_by_hand,
    learn_of,
    logits_of,
    model_of,
    options_of,
    parts_of,
    run_of,
    trained,
    with_options,
)
from scipy.stats import spearmanr
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
)

import blockwright as bw
from blockwright.blocks import deployment, subblocks
from blockwright.blocks.deployment import Costs, Deployment, Times
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer
from blockwright.blocks.stream import Block, Stream
from blockwright.blocks.subblocks import Option, swapped, variant
from blockwright.compress.cfsp import cfsp
from blockwright.compress.finequant import finequant
from blockwright.errors import BlockwrightError
from blockwright.search import puzzle as method
from blockwright.search.puzzle import Library, choose, distil, find_all, gkd_loss, normalised_mse, puzzle, realise, weigh

# distillation, block by block


def test_the_normalised_error_by_hand():
    parent = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    ours = torch.tensor([[[3.0, 1.0], [0.0, 6.0]]])
    assert normalised_mse(ours, parent).item() == pytest.approx((9 + 1) / 50)
    assert normalised_mse(torch.zeros_like(parent), parent).item() == 1.0 and normalised_mse(parent, parent).item() == 0.0
    assert normalised_mse(ours, parent, torch.tensor([[1, 0]])).item() == pytest.approx(9 / 25)
    assert normalised_mse(1e3 * ours, 1e3 * parent).item() == pytest.approx(0.2)


@pytest.mark.parametrize("option", [Option("attention", "heads", 2), Option("attention", "linear"), Option("ffn", "width", 24)])
def test_distillation_teaches_one_variant_on_the_parents_activations_and_nothing_else(option, monkeypatch):
    model, tokens = trained()
    block, x, y = block_of(model, 3, tokens)
    parts = parts_of(model)[3]
    before = {name: t.clone() for name, t in block.module.state_dict().items()}
    made = variant(block.module, parts, option)
    with swapped(block.module, made):
        start = normalised_mse(block.outputs(x), y)
    heard, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, h, rows: (heard.append((h, rows)), call(self, h, rows))[1])
    losses = distil(block, made, x, y, rng=torch.Generator().manual_seed(0), **(LEARN | dict(steps=30, lr=3e-3)))
    monkeypatch.undo()
    assert len(losses) == len(heard) == 30 and all(torch.equal(h, x[rows]) and len(rows) == 4 for h, rows in heard)
    with swapped(block.module, made):
        assert normalised_mse(block.outputs(x), y) < 0.8 * start
    assert all(p.grad is None for p in block.module.parameters())
    assert all(torch.equal(before[name], t) for name, t in block.module.state_dict().items())
    assert torch.equal(block.outputs(x), y)


def test_gradients_reach_the_variant_and_stop_there():
    model, tokens = trained()
    block, x, y = block_of(model, 3, tokens)
    made = variant(block.module, parts_of(model)[3], Option("attention", "heads", 1))
    weights = [p.requires_grad_() for m in made.values() for p in m.parameters()]
    inputs = x[:4].clone()
    with swapped(block.module, made):
        normalised_mse(block(inputs, [0, 1, 2, 3]), y[:4]).backward()
        mine = {id(p) for p in weights}
        assert all((p.grad is None) == (id(p) not in mine) for p in block.module.parameters()) and inputs.grad is None
    assert len(weights) == 5 and all(p.grad is not None and p.grad.abs().max() > 0 for p in weights)  # q, k, v, o and the norm


def test_all_variants_at_once_are_as_one_by_one():
    model, tokens = trained()
    learn = learn_of(steps=5, lr=3e-3)

    def facts(**offered):
        run = run_of(model, tokens[:16])
        parts = find_all(run.model)
        return weigh(run, parts, Library(parts, by="puzzle", **offered), learn=learn, windows=4)

    together = facts(widths=[0.5, 0.25])
    for alone in (facts(widths=[0.25], heads=[], linear=False, no_op=False), facts(heads=[2], linear=False, no_op=False), facts(heads=[])):
        for ours, theirs in zip(alone, together, strict=True):
            assert ours["scores"] and all(theirs["losses"][name] == losses for name, losses in ours["losses"].items())
            assert all(theirs["scores"][name] == pytest.approx(value, abs=1e-6) for name, value in ours["scores"].items())


def test_the_learning_rate_falls_along_a_cosine(monkeypatch):
    model, tokens = trained()
    block, x, y = block_of(model, 0, tokens)
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    made = variant(block.module, parts_of(model)[0], Option("ffn", "linear"))
    distil(block, made, x, y, rng=torch.Generator(), **(LEARN | dict(steps=4, lr=1e-2)))
    assert rates == pytest.approx([1e-2 * v for v in (1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)])


# scores


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neo"])
@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_score_is_that_of_the_whole_model_with_one_subblock_replaced(name, metric, padded):
    model, real = model_of(name), torch.ones(6, 12, dtype=torch.int64)
    if padded:
        real[1, :5] = real[4, :9] = 0
    parent = model(ids(), attention_mask=real if padded else None, use_cache=False).logits
    run = run_of(model, ids(), mask=real if padded else None)
    scorer, stream = Scorer(run, 5, metric), Stream(run.model, ids(), mask=real if padded else None)
    x = stream.embedded
    for i, (block, parts) in enumerate(zip(chain_of(model), parts_of(model), strict=True)):
        options = options_of(parts)
        found = scorer.of_variants(i, x, [variant(block, parts, option) for option in options])
        for option, score in zip(options, found, strict=True):
            mine = (option, FFN) if option.part == "attention" else (ATTENTION, option)
            picks = [mine if j == i else (ATTENTION, FFN) for j in range(len(chain_of(model)))]
            child = with_options(model, picks)
            logits = child(ids(), attention_mask=real if padded else None, use_cache=False).logits
            if metric == "kl":
                want = kl_by_hand(parent[:5], logits[:5], real[:5])
            else:
                keep = (real[:5, 1:] * real[:5, :-1]).bool()
                losses = [
                    nn.functional.cross_entropy(t[:5, :-1].transpose(1, 2), ids()[:5, 1:], reduction="none")[keep].mean().item()
                    for t in (logits, parent)
                ]
                want = losses[0] - losses[1]
            assert score == pytest.approx(want, rel=2e-3, abs=2e-6), (i, option)
        x = stream.block(run.model, i).outputs(x)
    child = with_options(model, [(Option("attention", "none"), FFN)] * len(chain_of(model)))
    if metric == "kl":
        logits = child(ids(), attention_mask=real if padded else None, use_cache=False).logits
        assert scorer.of_model(Blueprint.of_module(child)) == pytest.approx(kl_by_hand(parent[:5], logits[:5], real[:5]), rel=1e-3)


def test_what_stands_in_padding_changes_nothing():
    model, tokens = trained()
    real = torch.ones(8, 24, dtype=torch.int64)
    real[1, :10] = real[5, :15] = 0
    noise = torch.where(real.bool(), tokens[:8], (tokens[:8] + 5) % 12)
    options = dict(size=0.7, bld_steps=3, gkd_steps=2, score_windows=8, dtype="fp32", widths=[0.5])
    a, b = (puzzle(model, calibration=t, mask=real, **options) for t in (tokens[:8], noise))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_only_the_blocks_from_the_replaced_one_on_are_run(monkeypatch):
    model = model_of("llama")
    scorer = Scorer(run_of(model, ids()), 6)
    ran = []
    for i, block in enumerate(scorer.blocks):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    _, x, _ = block_of(model, 1)
    scorer.of_variants(1, x, [{}])
    assert ran == [1, 2]


def test_sums_of_scores_rank_architectures_as_their_true_divergence_does():
    model, tokens = trained()
    run = run_of(model, tokens[:32])
    parts = find_all(run.model)
    library = Library(parts, by="puzzle", widths=[0.75, 0.5, 0.25])
    facts = weigh(run, parts, library, learn=learn_of(), windows=16)
    scorer, rng = Scorer(run, 16), torch.Generator().manual_seed(5)
    estimates, truths = [], []
    for number in range(30):
        changed = 1 + number % 5
        picks = [0] * len(library.slots)
        for slot in torch.randperm(len(picks), generator=rng)[:changed].tolist():
            picks[slot] = int(torch.randint(1, len(library.slots[slot]), (1,), generator=rng))
        chosen = library.named(picks)
        pairs = [(i, option) for i, options in enumerate(chosen) for option in options if option.kind != "parent"]
        estimates.append(sum(facts[i]["scores"][str(option)] for i, option in pairs))
        run.model = run.entered
        realise(run, parts, chosen, facts, learn=learn_of())
        truths.append(scorer.of_model(run.model))
    assert spearmanr(estimates, truths).statistic >= 0.7


# the choice


def table_of(options, **seconds):
    return {
        str(o): seconds.get(o.kind, 1.0) * (o.size / 96 if o.kind == "width" else o.size / 4 if o.kind == "heads" else 1) for o in options
    }


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_within_two_budgets(seed):
    blueprint = Blueprint.of_module(model_of("llama"))
    parts = find_all(blueprint)[:2]
    blueprint = blueprint.with_layers([0, 1])
    library, use = Library(parts, by="puzzle", widths=[0.5], granularity=8, linear=False), Deployment(2, 4, 4, "fp32")
    rng = torch.Generator().manual_seed(seed)
    scores = [{str(o): float(torch.rand((), generator=rng)) for o in library.every if o.kind != "parent"} for _ in parts]
    costs = Costs(blueprint, parts, library.slots, use, Times(use, 0.5, table_of(library.every, none=0.0)))
    limits = {"memory": 0.8, "latency": 0.7}

    def total(picks):
        return sum(
            0 if o.kind == "parent" else scores[i // 2][str(o)] for i, o in enumerate(o for pair in library.named(picks) for o in pair)
        )

    def within(picks):
        cost = costs.of(picks)
        return cost.parameters + cost.kv <= 0.8 * (costs.parent.parameters + costs.parent.kv) and cost.time <= 0.7 * costs.parent.time

    fitting = [p for p in itertools.product(*(range(len(s)) for s in library.slots)) if within(p)]
    first = choose(library, scores, costs, limits)
    assert first in fitting and total(first) == pytest.approx(min(map(total, fitting)), abs=1e-6)
    second = choose(library, scores, costs, limits, unlike=[first])
    other = [p for p in fitting if sum(a == b for a, b in zip(p, first, strict=True)) <= math.floor(0.8 * 4)]
    assert second in other and total(second) == pytest.approx(min(map(total, other)), abs=1e-6)


def test_a_budget_below_the_cheapest_child_is_told_with_its_cost():
    model = model_of("llama")
    bare = sum(p.numel() for n, p in model.named_parameters() if "layers" not in n) * 2
    whole = sum(p.numel() for p in model.parameters()) * 2
    with pytest.raises(BlockwrightError, match=rf"size=0\.05: the cheapest child has {bare} bytes of parameters, the parent {whole}"):
        puzzle(model, calibration=ids(), size=0.05)
    with pytest.raises(BlockwrightError, match=r"size=0\.5: the cheapest child has \d+ bytes.*at least 0\.\d+"):
        puzzle(model, calibration=ids(), size=0.5, no_op=False, linear=False, widths=[], heads=[2])


def test_scores_that_are_not_finite_are_dropped_and_counted(monkeypatch):
    true = Scorer.of_variants

    def broken(self, index, x, variants):
        return [
            math.nan if i == 0 and index < 2 else math.inf if i == 1 and index == 2 else v
            for i, v in enumerate(true(self, index, x, variants))
        ]

    monkeypatch.setattr(Scorer, "of_variants", broken)
    options = dict(size=0.7, heads=[2, 1], widths=[0.5], granularity=8, linear=False, no_op=False)
    with pytest.warns(
        UserWarning, match=r"3 options are left out.*block 0 attention: heads 2, block 1 attention: heads 2, block 2 attention: heads 1"
    ):
        child = puzzle(model_of("llama"), calibration=ids(), **options)
    assert all(block.self_attn.k_proj.weight.shape[0] != 8 for block in child.model.layers[:2])


def test_times_of_another_deployment_are_refused(tmp_path):
    model = model_of("llama")
    blueprint = Blueprint.of_module(model)
    library = Library(find_all(blueprint), by="puzzle", widths=[0.5], granularity=8)
    path = tmp_path / "times.json"
    Times(Deployment(2, 8, 8, "bf16"), 1.0, table_of(library.every)).save(path)
    options = dict(calibration=ids(), widths=[0.5], granularity=8, latency=0.7, times=str(path))
    use = dict(batch=2, prefill=8, generation=8)
    for other, told in (
        (dict(batch=3), "batch=2"),
        (dict(dtype="fp32"), "dtype=bf16"),
        (dict(prefill=9), "prefill=8"),
        (dict(generation=1), "gen"),
    ):
        with pytest.raises(BlockwrightError, match=f"measured at {told}"):
            puzzle(model, **options, **(use | other))
    with pytest.raises(BlockwrightError, match="holds no 'ffn: width 24'"):
        puzzle(model, **(options | dict(widths=[0.25])), **use)
    child = puzzle(model, **options, **use)
    assert dict(Blueprint.of_module(child).forms)
    for damaged in ("", "[]", "{}", '{"format": 1}', path.read_text().replace('"around": 1.0', '"around": -1')):
        path.write_text(damaged)
        with pytest.raises(BlockwrightError, match="no table of times"):
            puzzle(model, **options, **use)


# the stage


SMALL = dict(size=0.6, widths=[0.5, 0.25], bld_steps=4, bld_lr=3e-3, score_windows=6, dtype="fp32")


def test_each_option_of_the_training_counts():
    def child(**changed):
        return logits_of(puzzle(model_of("llama"), calibration=ids(), **(SMALL | changed)), ids())

    base = child()
    for changed in (
        dict(size=0.5), dict(bld_steps=6), dict(bld_lr=1e-2), dict(batch_size=2), dict(gkd_steps=2), dict(blocks=[1, 2]),
        dict(memory=0.4, batch=64), dict(widths=[0.6]), dict(widths=[0.6], granularity=32),
    ):  # fmt: skip
        assert (child(**changed) - base).abs().max() > 1e-5, changed
    cheap = child(size=0.3)
    for changed in (dict(linear=False), dict(no_op=False)):
        assert (child(size=0.3, **changed) - cheap).abs().max() > 1e-5, changed
    healed = child(gkd_steps=2)
    for changed in (dict(gkd_lr=1e-3), dict(max_seq_length=8)):
        assert (child(gkd_steps=2, **changed) - healed).abs().max() > 1e-5, changed


def test_scores_are_measured_as_asked(monkeypatch):
    asked, true = [], Scorer.__init__
    monkeypatch.setattr(
        Scorer, "__init__", lambda self, run, windows, metric="kl": (asked.append((windows, metric)), true(self, run, windows, metric))[1]
    )
    puzzle(model_of("llama"), calibration=ids(), size=0.6, score="loss", score_windows=3)
    assert asked == [(3, "loss")]


def test_the_library_offers_what_is_asked_for():
    blueprint = Blueprint.of_module(model_of("llama"))
    parts = find_all(blueprint)

    def offered(**options):
        return [[(o.kind, o.size) for o in slot] for slot in Library(parts, by="puzzle", **options).slots[:2]]

    default = offered(widths=[0.75, 0.5, 0.1], granularity=8)
    assert default[0] == [("parent", 0), ("heads", 2), ("heads", 1), ("linear", 0), ("none", 0)]
    assert default[1] == [("parent", 0), ("width", 72), ("width", 48), ("width", 8), ("linear", 0), ("none", 0)]
    assert [subblocks._head_counts("x", n, None, "", 0) for n in (1, 2, 3, 6, 8)] == [[], [1], [1], [3, 1], [4, 2, 1]]
    assert offered(heads=[1], linear=False) == [[("parent", 0), ("heads", 1), ("none", 0)], [("parent", 0), ("none", 0)]]
    assert offered(heads=[], no_op=False, widths=[0.99, 0.5, 0.51], granularity=16)[1] == [("parent", 0), ("width", 48), ("linear", 0)]
    assert offered(heads=[], linear=False, no_op=False, blocks=[1]) == [[("parent", 0)], [("parent", 0)]]
    assert offered(widths=[0.52])[1][1] == ("width", 48)  # 96 channels: eight steps of 8 fit, of 16 do not


def test_blocks_that_may_not_change_stay_as_they_are():
    model, tokens = trained()
    child = puzzle(model, calibration=tokens[:8], **(SMALL | dict(blocks=[1, 3], size=0.8)))
    forms = Blueprint.of_module(child).forms
    assert forms and all(name.startswith(("model.layers.1.", "model.layers.3.")) for name in forms)
    for i in (0, 2):
        assert all(torch.equal(p, q) for p, q in zip(model.model.layers[i].parameters(), child.model.layers[i].parameters(), strict=True))


def test_distillation_and_the_whole_model_heal():
    model, tokens = trained()
    held_out = tokens[64:]

    def divergence(**options):
        child = puzzle(model, calibration=tokens[:64], **(SMALL | dict(size=0.5, widths=[0.5]) | options))
        return kl_by_hand(logits_of(model, held_out), logits_of(child, held_out))

    bare, distilled = divergence(bld_steps=0), divergence(bld_steps=30)
    assert distilled < 0.8 * bare
    assert divergence(bld_steps=30, gkd_steps=30, gkd_lr=1e-3, batch_size=8) < 0.9 * distilled


def test_of_several_candidates_the_one_that_truly_scores_best_is_kept():
    model, tokens = trained()
    options = SMALL | dict(bld_steps=0, size=0.5)

    def true(**more):
        child = puzzle(model, calibration=tokens[:16], **(options | more))
        return kl_by_hand(logits_of(model, tokens[:6]), logits_of(child, tokens[:6]))

    assert true(candidates=4) <= true() + 1e-6


def test_the_whole_models_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    theirs, ours = ([torch.randn(1, 3, 4, generator=rng, dtype=torch.float64) for _ in range(4)] for _ in range(2))

    class Out:
        def __init__(self, states):
            self.hidden_states, self.logits = states[:3], states[3]

    for mask in (None, torch.tensor([[1, 0, 1]])):
        real = [0, 1, 2] if mask is None else [0, 2]
        want = kl_by_hand(theirs[3][0, real], ours[3][0, real])
        for a, b in zip(ours[1:3], theirs[1:3], strict=True):
            want += sum(1 - float(a[0, t] @ b[0, t] / a[0, t].norm() / b[0, t].norm()) for t in real) / len(real)
        assert gkd_loss(Out(ours), Out(theirs), mask).item() == pytest.approx(want, rel=1e-5)


class Killed(Exception):
    """The process is gone."""


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    model, tokens = trained()
    options = SMALL | dict(size=0.5, latency=0.9, prefill=8, generation=4)

    def run(folder):
        run = run_of(model, tokens[:8], journal=tmp_path / folder)
        puzzle(run, **options)
        return run.model.build()

    monkeypatch.setattr(deployment, "least", lambda fn, repeats, prepare=lambda: None: 1.0)
    with pytest.raises(BlockwrightError, match="latency=0.9: the cheapest child"):
        run("same")  # no option is faster
    options["latency"] = None
    whole, true, calls = run("a"), Scorer.of_variants, []

    def dies(self, index, *rest):
        calls.append(index)
        if len(calls) == 4:
            raise Killed
        return true(self, index, *rest)

    monkeypatch.setattr(Scorer, "of_variants", dies)
    with pytest.raises(Killed):
        run("b")
    again = run("b")
    assert calls == [0, 1, 2, 3, 3]  # what was scored is not scored again
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("wanted", ["auto", "dense"])
def test_as_a_stage_of_a_recipe_then_packed(small_job, tmp_path, monkeypatch, wanted):
    small_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    stages = [
        {"puzzle": {"size": 0.65, "widths": [0.5], "granularity": 16, "linear": wanted == "auto", "bld_steps": 2, "score_windows": 2}}
    ]
    job = {
        "model": "model", "stages": stages, "out": "out", "export": wanted, "dtype": "fp32", "measure": {"use": False},
        "calibration": {"text": "learn.txt", "num": 4, "length": 32}, "evaluation": {"text": "judge.txt", "num": 3, "length": 24},
    }  # fmt: skip
    report = bw.run(job)
    child = bw.load("out", dtype=torch.float32)
    parent = LlamaForCausalLM.from_pretrained("model")
    tokens = torch.arange(2, 26).reshape(2, 12)
    run = bw.run(job | {"out": "again", "export": "blockwright"})
    again = bw.load("again", dtype=torch.float32)
    assert torch.allclose(logits_of(child, tokens), logits_of(again, tokens), atol=1e-5)
    assert (logits_of(child, tokens) - logits_of(parent, tokens)).abs().max() > 1e-4
    assert sum(p.numel() for p in again.parameters()) <= 0.65 * sum(p.numel() for p in parent.parameters())
    assert report["result"]["kl"] == pytest.approx(run["result"]["kl"], rel=1e-3) and report["stages"][0]["curves"]
    named = {t for row in run["blocks"] for t in row["treatment"]}
    assert named & {"no ffn", "no attention", "linear ffn", "linear attention"}
    if wanted == "auto":
        packed = bw.run(job | {"stages": [*stages, {"finequant": {"bits": 4, "group_size": 16}}], "out": "packed"})
        opened = bw.load("packed", dtype=torch.float32)
        assert packed["result"]["bytes"] < run["result"]["bytes"] and torch.isfinite(logits_of(opened, tokens)).all()
        assert opened.generate(tokens, max_new_tokens=4).shape == (2, 16)


# what is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(heads=[3]), "heads=[3]: 3 of 4 key and value heads in block 0. Allowed: 1, 2"),
        (dict(heads=[2, 4]), "heads=[2, 4]: 4 of 4"),
        (dict(heads=[0]), "heads=[0]: 0 of 4"),
        (dict(blocks=[]), "blocks=[]. Allowed: one or more of 0 to 2, each once"),
        (dict(blocks=[1, 1]), "blocks=[1, 1]"),
        (dict(blocks=[3]), "blocks=[3]"),
        (dict(blocks=[-1]), "blocks=[-1]"),
        (dict(widths=[1.0]), "widths=[1.0]. Allowed: shares above 0 and below 1"),
        (dict(widths=[0.0]), "widths=[0.0]"),
        (dict(size=0.0), "size=0.0"),
        (dict(size=1.0), "size=1.0"),
        (dict(memory=-1.0), "memory=-1.0"),
        (dict(latency=2.0), "latency=2.0. Allowed: a share of the parent above 0 and below 1"),
        (dict(latency=0.5, prefill=4096), "prefill=4096, generation=128: 4224 tokens. Allowed: up to 2048"),
        (dict(score="mse"), "score='mse'. Allowed: kl, loss"),
        (dict(dtype="int8"), "dtype='int8'. Allowed: bf16, fp16, fp32"),
        (dict(bld_lr=0.0), "bld_lr=0.0"),
        (dict(gkd_lr=math.nan), "gkd_lr=nan"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options, told, monkeypatch):
    monkeypatch.setattr(method, "weigh", lambda *args, **named: pytest.fail("it began"))
    unchecked = inspect.unwrap(method.puzzle)  # without the annotations' check
    with pytest.raises(BlockwrightError) as error:
        unchecked(run_of(model_of("llama"), ids()), **options)
    assert told in str(error.value)


def test_fused_attention_gets_what_can_be_done_and_the_rest_is_told():
    for name, told in (
        ("neox", "attention.query_key_value holds queries"),
        ("gpt2", "attn.c_attn holds"),
        ("opt", "OPTAttention has a key"),
    ):
        blueprint = Blueprint.of_module(model_of(name))
        library = Library(find_all(blueprint), by="puzzle", widths=[0.5])
        assert [o.kind for o in library.slots[0]] == ["parent", "none"] and "none" in {o.kind for o in library.slots[1]}
        assert len(library.left) == 3 and told in library.left[0]
        with pytest.raises(BlockwrightError, match=r"heads=\[2\]: in block 0"):
            Library(find_all(blueprint), by="puzzle", heads=[2])


def test_models_that_cannot_be_treated_are_refused_by_name():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(BlockwrightError, match="h.0.self_attention adds the residual itself"):
        puzzle(bloom, calibration=ids())
    narrow = cfsp(model_of("llama"), calibration=ids(), sparsity=0.5, granularity=8)
    with pytest.raises(BlockwrightError, match=r"mlp\.gate_proj is linear already.*Use puzzle first"):
        puzzle(narrow, calibration=ids())
    packed = finequant(model_of("llama"), bits=4, group_size=16)
    with pytest.raises(BlockwrightError, match="is packed already"):
        puzzle(packed, calibration=ids())
    shared = copy.deepcopy(model_of("llama"))
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BlockwrightError, match=r"layers\.1\.mlp\.up_proj\.weight is shared with model\.layers\.0\.mlp\.up_proj\.weight"):
        puzzle(shared, calibration=ids())


def test_tied_embeddings_stay_tied():
    child = puzzle(model_of("qwen2, tied"), calibration=ids(), size=0.6, dtype="fp32")
    assert child.lm_head.weight is child.model.embed_tokens.weight
