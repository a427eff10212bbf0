"""dsnot: the swaps against plain Python, the stage against whole-model hooks on three architectures, its refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from blockwright.blocks import tiles
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Moments
from blockwright.compress import dsnot as module
from blockwright.compress.dsnot import dsnot, magnitude_score, refine, sparsegpt_score, wanda_score
from blockwright.errors import BlockwrightError


def sign(v):
    return (v > 0) - (v < 0)


def row_by_hand(w, keep, score, mean, var, *, group=None, cycles=50, eps=0.1, p=1.0, accept="lower"):
    """One row, one swap at a time, in Python numbers: the new mask and the error that is left."""
    d = [2048 * a * b for a, b in zip(w, mean, strict=True)]
    pruned, kept = ({k for k in range(len(w)) if bool(keep[k]) is state} for state in (False, True))
    e, mask = sum(d[k] for k in sorted(pruned)), list(map(bool, keep))
    first = sign(e)
    for _ in range(cycles):
        grows = [k for k in pruned if sign(d[k]) == sign(e)]
        if abs(e) <= eps or not grows:
            break
        comes = min(grows, key=lambda k: (-abs(d[k]) / max(var[k], 1e-12) ** p, k))
        goes = [k for k in kept if (k // group == comes // group if group else sign(d[k]) == -sign(e))]
        if not goes and group:
            pruned.discard(comes)
            continue
        if not goes:
            break
        goes = min(goes, key=lambda k: (score[k], k))
        after = e + d[goes] - d[comes]
        if (group or accept == "same_sign") and sign(after) != first:
            break
        variance = 2048**2 * (w[goes] ** 2 * max(var[goes], 1e-12) - w[comes] ** 2 * max(var[comes], 1e-12))
        if accept == "lower" and not after**2 + variance < e**2:
            break
        e = after
        mask[comes], mask[goes] = True, False
        pruned.discard(comes)
        kept.discard(goes)
    return mask, e


def by_hand(w, keep, score, mean, var, **options):
    rows = zip(w.tolist(), keep.tolist(), score.tolist(), strict=True)
    masks, errors = zip(*(row_by_hand(*row, mean.tolist(), var.tolist(), **options) for row in rows), strict=True)
    return torch.tensor(masks), torch.tensor(errors, dtype=torch.float64)


def problem(seed, n=8, k=64, *, exact=False):
    """Weights, mean, variance and norm of inputs; exact: numbers of few bits, with ties, zeros and channels that are never on."""
    rng = torch.Generator().manual_seed(seed)
    if not exact:
        w = torch.randn(n, k, generator=rng)
        mean = torch.randn(k, generator=rng, dtype=torch.float64) / 2048
        return w, mean, *(torch.rand(k, generator=rng, dtype=torch.float64) / 2048**power for power in (2, 0))

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=rng).double()

    w, mean = whole(-9, 10, n, k).float() / 8, whole(-4, 5, k) / 2**14
    var, norm = 4 ** whole(-2, 3, k) / 2**28, 2 ** whole(-2, 3, k)  # their roots are exact too
    off = whole(0, 8, k) == 0
    return w, mean.masked_fill(off, 0), var.masked_fill(off, 0), norm.masked_fill(off, 0)


OPTIONS = [{"accept": "any"}, {"accept": "same_sign"}, {"p": 0.0, "eps": 0.5}, {}, {"accept": "any", "cycles": 3}]


@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_swaps_follow_the_algorithm_row_by_row(group, exact):
    changed = 0
    for seed in range(100):  # twice 100 seeds
        w, mean, var, norm = problem(seed, exact=exact)
        score = wanda_score(w, norm) if seed % 2 else magnitude_score(w)
        keep = tiles.row_mask(score, 0.6) if group is None else tiles.n_m_mask(score, group // 2, group)
        options = OPTIONS[seed % 5]
        names = {"p": "pow_of_var_regrowing", "eps": "update_threshold", "cycles": "max_cycles"}
        got, error = refine(w, keep, score, mean, var, group=group, **{names.get(o, o): v for o, v in options.items()})
        want, left = by_hand(w, keep, score, mean, var, group=group, **options)
        assert torch.equal(got, want), (seed, options)
        assert torch.allclose(error, left, rtol=1e-4, atol=1e-5)
        changed += int((got != keep).sum())
    assert changed > 1000


def test_one_row_by_hand():
    # d = w: e = 4 + 1 - 2 = 3. Comes 4 (the largest of 4 and 1), goes -1 (less score than -3): e = 3 - 1 - 4 = -2.
    # Now e < 0: comes -2, goes 2: e = -2 + 2 + 2 = 2. Then comes 1, goes -3: e = 2 - 3 - 1 = -2, and nothing negative is left to come.
    w = torch.tensor([[4.0, 1.0, -2.0, -3.0, -1.0, 2.0]])
    keep = torch.tensor([[False, False, False, True, True, True]])
    mean, var = torch.full((6,), 1 / 2048, dtype=torch.float64), torch.full((6,), 2048**-2, dtype=torch.float64)

    def refined(**options):
        mask, [error] = refine(w, keep, w.abs(), mean, var, **options)
        return mask[0].nonzero().flatten().tolist(), error.item()

    steps = [([3, 4, 5], 3), ([0, 3, 5], -2), ([0, 2, 3], 2), ([0, 1, 2], -2), ([0, 1, 2], -2)]
    assert [refined(max_cycles=cycles, accept="any") for cycles in range(5)] == steps
    assert refined(accept="same_sign") == steps[0]  # the first swap would turn the sign
    # Squared error e^2 + sum of w^2: the first swap takes 9 to 4 and removes 16 - 1; the second would leave 4 and 4 - 4
    assert refined() == refined(accept="lower") == steps[1]
    var[0] *= 8  # 4 / 8 < 1 / 1: now 1 comes first, then e = 3 - 1 - 1 = 1
    assert refined(max_cycles=1, accept="any") == ([1, 3, 5], 1)
    assert refined(max_cycles=1, accept="any", pow_of_var_regrowing=0.0) == steps[1]
    var[4] *= 20  # what goes would add 20 - 8 * 16 for the 4, and 20 - 1 for the 1: more than 9 - 1 is won
    assert refined() == steps[0]
    var[:2] = 0  # constant inputs: of 4 / 1e-12 and 1 / 1e-12 the larger one first, wherever it stands
    w, keep = w[:, [1, 0, 2, 3, 4, 5]], keep[:, [1, 0, 2, 3, 4, 5]]
    assert refined(max_cycles=1, accept="any") == ([1, 3, 5], -2)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5),
    groups=st.integers(1, 9),
    group=st.sampled_from([None, 2, 4]),
    sparsity=st.floats(0, 0.99),
    exact=st.booleans(),
    seed=st.integers(0, 999),
)
def test_counts_stay_and_the_error_is_that_of_the_mask(n, groups, group, sparsity, exact, seed):
    k = groups * (group or 3)
    w, mean, var, norm = problem(seed, n, k, exact=exact)
    before = [t.clone() for t in (w, mean, var)]
    score = wanda_score(w, norm)
    keep = tiles.row_mask(score, sparsity) if group is None else tiles.n_m_mask(score, 1, group)
    start = keep.clone()
    if module._pruned_already(w, keep):  # a small matrix of few values can look so
        return
    mask, error = refine(w, keep, score, mean, var, group=group, update_threshold=0.01)
    in_groups = (n, -1, group or k)
    assert torch.equal(mask.view(in_groups).sum(-1), start.view(in_groups).sum(-1)) and torch.equal(keep, start)
    assert all(torch.equal(a, b) for a, b in zip(before, (w, mean, var), strict=True))
    recomputed = (w.double() * 2048 * mean).masked_fill(mask, 0).sum(1)
    scale = (w.double() * 2048 * mean).abs().sum(1)
    assert bool(((recomputed - error).abs() <= 1e-6 * scale).all())  # of the summed magnitudes: e itself may be almost 0
    big = recomputed.abs() > 1e-2 * scale
    assert torch.allclose(recomputed[big], error[big], rtol=1e-4)
    for flipped in (
        refine(-w, keep, score, mean, var, group=group, update_threshold=0.01),
        refine(w, keep, score, -mean, var, group=group, update_threshold=0.01),
    ):
        assert torch.equal(flipped[0], mask) and torch.equal(flipped[1], -error)
    off = (mean == 0).nonzero().flatten()
    assert not bool((mask & ~start)[:, off].any())  # inputs that are always 0 never come back


@pytest.mark.parametrize("group", [None, 4])
def test_what_leaves_the_initial_mask(group):
    w, mean, var, norm = problem(3)
    score = wanda_score(w, norm)
    keep = tiles.row_mask(score, 0.5) if group is None else tiles.n_m_mask(score, 2, 4)
    start = refine(w, keep, score, mean, var, group=group, max_cycles=0)
    assert torch.equal(start[0], keep)
    assert torch.equal(refine(w, keep, score, mean, var, group=group, update_threshold=float("inf"))[0], keep)
    assert torch.equal(refine(w, keep, score, 0 * mean, var, group=group)[0], keep)
    between = float(start[1].abs().median())
    mask, _ = refine(w, keep, score, mean, var, group=group, update_threshold=between)
    done = start[1].abs() <= between
    assert torch.equal(mask[done], keep[done]) and not torch.equal(mask[~done], keep[~done])
    for sparsity in (0.0, 0.01):  # floor(64 * 0.01) = 0
        all_kept = tiles.row_mask(score, sparsity)
        assert bool(all_kept.all()) and bool(refine(w, all_kept, score, mean, var)[0].all())


@pytest.mark.parametrize("group", [None, 4])
def test_weights_that_the_pruner_updated(group):
    w, mean, var, norm = problem(4)
    keep = tiles.n_m_mask(wanda_score(w, norm), 2, 4)
    updated = torch.where(keep, w * 1.25, 0.0)
    score = wanda_score(updated, norm)
    got, error = refine(updated, keep, score, mean, var, group=group, dense_NK=w)
    want, left = by_hand(torch.where(keep, updated, w), keep, score, mean, var, group=group)
    assert torch.equal(got, want) and torch.allclose(error, left, rtol=1e-4, atol=1e-5) and not torch.equal(got, keep)


def test_the_score_of_sparsegpt():
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(5, 12, generator=rng), torch.randn(40, 12, generator=rng) @ torch.randn(12, 12, generator=rng)
    x[:, 3] = 0
    gram = x.T @ x
    before = gram.clone()
    h = gram.double()
    h[3, 3] = 1
    h += 0.01 * h.diagonal().mean() * torch.eye(12)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    want = w.double() ** 2 / u.diagonal() ** 2
    want[:, 3] = 0
    assert torch.allclose(sparsegpt_score(w, gram).double(), want, rtol=1e-4) and torch.equal(gram, before)
    assert torch.isfinite(sparsegpt_score(w, torch.zeros(12, 12))).all()


# the stage, on small models


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def neox():
    torch.manual_seed(2)
    config = GPTNeoXConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return GPTNeoXForCausalLM(config).eval()


MODELS = {"llama": (llama, "model.layers"), "gpt2": (gpt2, "transformer.h"), "neox": (neox, "gpt_neox.layers")}


def ids(n=5, length=16):
    return torch.randint(0, 60, (n, length), generator=torch.Generator().manual_seed(5))


def linears(model, path):
    """Name -> (module, weight as outputs x inputs) of the chain."""
    found = {n: m for n, m in model.named_modules() if n.startswith(path + ".") and type(m).__name__ in ("Linear", "Conv1D")}
    return {n: (m, m.weight if isinstance(m, nn.Linear) else m.weight.T) for n, m in found.items()}


def heard(model, names, tokens, **padded):
    """The inputs of named linears, [n, T, K] fp64, from one pass of the whole model."""
    seen, handles = {}, []
    for name in names:
        hook = lambda m, args, name=name: seen.__setitem__(name, args[0].detach().double())  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens, **padded)
    for handle in handles:
        handle.remove()
    return seen


CASES = [
    {},
    {"skip": ["mlp"], "accept": "any", "var": "within"},
    {"sparsity": 0.7, "initial_method": "magnitude", "var": "within", "accept": "same_sign"},
    {"initial_method": "sparsegpt", "update_threshold": 0.3, "max_cycles": 4, "pow_of_var_regrowing": 0.5},
    {"mask_structure": "1:4", "sparsity": 0.75},
    {"mask_structure": "2:4", "initial_method": "magnitude", "ignore": ["re:attn|attention"]},
]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_every_block_is_pruned_by_what_it_hears_from_the_pruned_ones(architecture, options):
    make, path = MODELS[architecture]
    model = make()
    pruned = dsnot(model, calibration=ids(), **options)
    o = {"sparsity": 0.5, "mask_structure": "unstructured", "initial_method": "wanda", "var": "pooled"} | options
    assert heard(model, [], ids()) == {}
    treated, swaps = linears(pruned, path), 0
    for i in range(model.config.num_hidden_layers):
        so_far = copy.deepcopy(model)  # the blocks before this one pruned, this one dense
        so_far.load_state_dict(
            {n: t for n, t in pruned.state_dict().items() if any(n.startswith(f"{path}.{j}.") for j in range(i))}, strict=False
        )
        mine = {n: w.detach() for n, (_, w) in linears(model, path).items() if n.startswith(f"{path}.{i}.")}
        for name, x in heard(so_far, mine, ids()).items():
            w, new = mine[name], treated[name][1]
            if "att" in name and "ignore" in o:
                assert torch.equal(w, new)
                continue
            flat = x.flatten(0, 1)
            var = flat.var(0, correction=0) if o["var"] == "pooled" else x.var(1, correction=0).mean(0)
            norm, score = flat.square().sum(0).sqrt(), w.double().abs()
            if o["initial_method"] == "wanda":
                score = score * norm
            elif o["initial_method"] == "sparsegpt":
                h = flat.T @ flat
                h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
                score = w.double() ** 2 / torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal() ** 2
            group = None if o["mask_structure"] == "unstructured" else 4
            keep = torch.ones_like(w, dtype=torch.bool)
            for row, r in zip(score.tolist(), range(len(w)), strict=True):
                for start in range(0, len(row), group or len(row)):
                    part = range(start, start + (group or len(row)))
                    for k in sorted(part, key=lambda k: row[k])[: int(len(part) * o["sparsity"])]:
                        keep[r, k] = False
            start = keep
            if not ("mlp" in name and o.get("skip")):
                rest = {"eps": o.get("update_threshold", 0.1), "cycles": o.get("max_cycles", 50), "p": o.get("pow_of_var_regrowing", 1.0)}
                guide = score if group else w.double().abs() * norm
                keep, _ = by_hand(w, keep, guide, flat.mean(0), var, group=group, accept=o.get("accept", "lower"), **rest)
            assert torch.equal(torch.where(keep, w, 0.0), new), name
            swaps += int((keep != start).sum())
    assert swaps > 30
    for name, t in pruned.state_dict().items():
        if name.removesuffix(".weight") not in treated:
            assert torch.equal(t, model.state_dict()[name])


def test_wandas_mask_is_the_rule_of_the_paper():
    model = llama()
    pruned = dsnot(model, calibration=ids(), max_cycles=0, sparsity=0.3)
    names = [n for n in linears(model, "model.layers") if n.startswith("model.layers.0.")]
    for name, x in heard(model, names, ids()).items():
        w = model.get_submodule(name).weight
        metric = w.abs() * x.flatten(0, 1).square().mean(0).sqrt()
        lowest = metric.sort(dim=1, stable=True).indices[:, : int(w.shape[1] * 0.3)]
        zeros = torch.zeros_like(w, dtype=torch.bool).scatter(1, lowest, True)
        assert torch.equal(pruned.get_submodule(name).weight, w.masked_fill(zeros, 0))


@pytest.mark.parametrize("length", [16, 5])
def test_moments_of_uneven_batches_are_those_of_all_tokens(length):
    model, tokens, pooled, within = llama(), ids(7, length), {}, {}

    def visit(block, x, y, rng):
        pooled.update(block.observe(x, Moments))
        within.update(block.observe(x, module._within(length)))

    Run(Blueprint.of_module(model), calibration=tokens, batch=3).blocks(visit, inputs="dense")  # batches of 3, 3 and 1
    for name, x in heard(model, pooled, tokens).items():
        flat = x.flatten(0, 1)
        for stat in (pooled[name], within[name]):
            assert torch.allclose(stat.mean, flat.mean(0), rtol=1e-6, atol=1e-8)
            assert torch.allclose(stat.norm, flat.square().sum(0).sqrt(), rtol=1e-6)
        assert torch.allclose(pooled[name].var, flat.var(0, correction=0), rtol=1e-6)
        assert torch.allclose(within[name].var, x.var(1, correction=0).mean(0), rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_of_padded_samples_are_those_of_their_own_tokens(side):
    model, tokens, within, mask = llama(), ids(5, 8), {}, torch.ones(5, 8, dtype=torch.int64)
    for row, length in ((1, 3), (2, 1), (4, 6)):
        mask[row, length:] = 0
    mask = mask.flip(1) if side == "left" else mask

    def visit(block, x, y, rng):
        within.update(block.observe(x, module._within(8)))

    Run(Blueprint.of_module(model), calibration=tokens, mask=mask, batch=2).blocks(visit, inputs="dense")
    for name, x in heard(model, within, tokens, attention_mask=mask).items():
        samples = [row[real.bool()] for row, real in zip(x, mask, strict=True)]
        stat, flat = within[name], torch.cat(samples)
        assert stat.count == len(flat) == 26
        assert torch.allclose(stat.mean, flat.mean(0), rtol=1e-5, atol=1e-6)
        by_tokens = sum(s.var(0, correction=0) * len(s) for s in samples) / 26
        assert torch.allclose(stat.var, by_tokens, rtol=1e-4, atol=1e-7)


def test_bf16_weights_stay_bf16_and_to_the_bit():
    model = llama().bfloat16()
    pruned = dsnot(model, calibration=ids())
    for name, (_, w) in linears(model, "model.layers").items():
        new = pruned.get_submodule(name).weight
        assert new.dtype == torch.bfloat16 and torch.equal(new, w.masked_fill(new == 0, 0))
        assert bool(((new == 0).sum(1) == w.shape[1] // 2).all())


def test_shared_weights_are_pruned_once():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight  # twins in one block
    shared = Blueprint.of_module(model).with_shared({2: 1}, lambda name: "norm" in name)  # and a block that is another's
    run = Run(shared, calibration=ids())
    dsnot(run)
    pruned = run.model.build()
    for name, (_, w) in linears(pruned, "model.layers").items():
        assert bool(((w == 0).sum(1) == w.shape[1] // 2).all()), name
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        first, second = (pruned.get_submodule(f"model.layers.{i}.{name}").weight for i in (1, 2))
        assert torch.equal(first, second)
    assert torch.equal(pruned.model.layers[1].mlp.up_proj.weight, pruned.model.layers[1].mlp.gate_proj.weight)


def test_zero_weights_of_a_dense_model_do_no_harm():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 3] = 0  # a dead column
        model.model.layers[1].self_attn.o_proj.weight[:] = 0
        model.model.layers[1].mlp.down_proj.weight[:, ::2] = 0.01
    pruned = dsnot(model, calibration=ids(), sparsity=0.4)
    for _, (_, w) in linears(pruned, "model.layers").items():
        assert bool(((w == 0).sum(1) >= int(w.shape[1] * 0.4)).all())
    assert torch.equal(dsnot(model, calibration=ids(), sparsity=0.02).lm_head.weight, model.lm_head.weight)


def test_sparsity_zero_changes_nothing():
    model = llama()
    pruned = dsnot(model, calibration=ids(), sparsity=0.0)
    assert all(torch.equal(t, pruned.state_dict()[name]) for name, t in model.state_dict().items())


# refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sparsity": 1.0}, r"dsnot: sparsity=1\.0\. Allowed: 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, r"sparsity=-0\.1"),
        ({"sparsity": float("nan")}, r"sparsity=nan"),
        ({"max_cycles": -1}, r"max_cycles=-1"),
        ({"update_threshold": -0.5}, r"update_threshold=-0\.5"),
        ({"update_threshold": float("nan")}, r"update_threshold=nan"),
        ({"pow_of_var_regrowing": -1.0}, r"pow_of_var_regrowing=-1\.0"),
        ({"mask_structure": "2-4"}, r"mask_structure='2-4'\. Allowed: \"unstructured\", or \"N:M\".*Try \"2:4\""),
        ({"mask_structure": "0:4", "sparsity": 0.99}, r"mask_structure='0:4'"),
        ({"mask_structure": "5:4"}, r"mask_structure='5:4'"),
        ({"mask_structure": "2:4", "sparsity": 0.7}, r"with sparsity=0\.7\. Allowed: sparsity=0\.5"),
        ({"mask_structure": "1:4"}, r"Allowed: sparsity=0\.75"),
        ({"mask_structure": "5:10"}, r"layers\.0\.self_attn\.q_proj: in_features 32 not divisible by M=10.*'q_proj' to ignore"),
        ({"targets": ["nothing"]}, r"targets=\['nothing'\].* name no linear.*down_proj"),
        ({"ignore": ["Linear"]}, r"name no linear"),
        ({"skip": ["ffn"]}, r"no linear's name holds 'ffn'.*skip=\[\]"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_work(options, said):
    run = Run(Blueprint.of_module(llama()), calibration=ids(), progress=lambda *a: pytest.fail("it began to work"))
    with pytest.raises(BlockwrightError, match=said):
        dsnot(run, **options)


@pytest.mark.parametrize("options", [{"initial_method": "wnda"}, {"var": "total"}, {"accept": "all"}])
def test_a_misspelt_choice_is_refused(options):
    good = {
        "sparsity": 0.5, "mask_structure": "unstructured", "initial_method": "wanda", "max_cycles": 50, "update_threshold": 0.1,
        "pow_of_var_regrowing": 1.0, "var": "pooled", "accept": "lower", "skip": [], "targets": ["Linear"], "ignore": [],
    }  # fmt: skip
    assert module.plan(block_parameters=10, tokens=10, **good)["bits"] is None
    [(name, value)] = options.items()
    with pytest.raises(BlockwrightError, match=f"dsnot: {name}='{value}'. Allowed: (wanda, magnitude|pooled, within|lower, same_sign)"):
        module.plan(block_parameters=10, tokens=10, **good | options)


def test_weights_that_are_pruned_already_are_refused():
    once = dsnot(llama(), calibration=ids())
    with pytest.raises(
        BlockwrightError, match=r"layers\.0\.self_attn\.q_proj: DSnoT needs the dense weights; got an already pruned tensor"
    ):
        dsnot(once, calibration=ids())
    more = dsnot(once, calibration=ids(), sparsity=0.7)  # beyond what is pruned there is something to choose
    for _, (_, w) in linears(more, "model.layers").items():
        assert bool(((w == 0).sum(1) >= int(w.shape[1] * 0.7)).all())


def test_statistics_that_are_not_finite_are_refused_by_name():
    w, mean, var, _ = problem(0)
    keep = tiles.row_mask(magnitude_score(w), 0.5)
    for bad in ((mean.clone().fill_(float("nan")), var), (mean, var.clone().fill_(float("inf")))):
        with pytest.raises(BlockwrightError, match=r"calibration inputs of layers\.7\.o_proj: mean or variance: (nan|inf)"):
            refine(w, keep, magnitude_score(w), *bad, name="layers.7.o_proj")
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = 3e38  # too large for a sum of products
    with pytest.raises(BlockwrightError, match=r"layers\.1"):
        dsnot(model, calibration=ids())
