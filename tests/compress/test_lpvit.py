"""lpvit: tile sums, curves and budgets against plain Python and brute force, the kernel against fp64, whole models, refusals."""

import copy
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import blockwright as bw
from blockwright.blocks import budget
from blockwright.blocks.block_sparse import BlockSparseLinear, GatheredLinear, cut, multiplications
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.compress import lpvit as method
from blockwright.compress import lpvit_triton
from blockwright.compress.lpvit import Layer, allocate, curve_prices, distortion_curve, lpvit
from blockwright.errors import BlockwrightError
from blockwright.recipes import export

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vit(seed=0, **options):
    torch.manual_seed(seed)
    config = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2, num_channels=1,
        num_labels=5, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(ViTConfig(**config | options)).eval()


def images(n=6):
    return randn(n, 1, 8, 8, seed=5)


def run_of(model, calibration, seed=0):
    run = Run(Blueprint.of_module(model), calibration=calibration, seed=seed)
    run.begin("lpvit")
    return run


def sparse_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def tiles_of(w, r, c):
    """The tiles of a list of rows, rows of tiles first, as lists of numbers."""
    n, k = len(w), len(w[0])
    for i, j in itertools.product(range(0, n, r), range(0, k, c)):
        yield [w[a][b] for a in range(i, min(i + r, n)) for b in range(j, min(j + c, k))]


def sums_of(w, gradients, tile):
    found = method.Gradients(w, tile)
    for g in gradients:
        found.add(g)
    return found.sums()


# tiles


def test_tile_scores_of_a_ragged_matrix_equal_a_double_loop():
    w, g = randn(33, 70, seed=1), randn(33, 70, seed=2)
    sums = sums_of(w, [g, -2 * g], (16, 32))
    scores = {key: method.tile_scores("a", sums, key).tolist() for key in ("taylor", "l1")}
    products = (w.double() * g.double()).tolist()
    for found, tile, dots in zip(zip(*scores.values(), strict=True), tiles_of(w.tolist(), 16, 32), tiles_of(products, 16, 32), strict=True):
        assert found[0] == pytest.approx(1.5 * sum(abs(v) for v in dots) / len(dots), rel=1e-6)
        assert found[1] == pytest.approx(sum(abs(v) for v in tile) / len(tile), rel=1e-6)
    assert sums.weights.tolist() == [len(t) for t in tiles_of(w.tolist(), 16, 32)] and len(sums.weights) == 9


@pytest.mark.parametrize("samples", [1, 3])
def test_by_distortion_a_tile_is_ranked_by_what_its_removal_alone_adds(samples):
    w, g = randn(5, 7, seed=1, dtype=torch.float64), randn(samples, 5, 7, seed=2, dtype=torch.float64)
    found = method.tile_scores("a", sums_of(w, g, (2, 3)), "distortion").tolist()
    tiles = [list(tiles_of(v.tolist(), 2, 3)) for v in (w, *g)]
    for score, weights, *each in zip(found, *tiles, strict=True):
        second = sum(sum(a * b for a, b in zip(weights, one, strict=True)) ** 2 for one in each) / samples
        first = sum((a * b) ** 2 for one in each for a, b in zip(weights, one, strict=True)) / 35 / samples
        assert score * len(weights) == pytest.approx(first + (second + 1e-7 * sum(a * a for a in weights)) / 2, rel=1e-9)


def test_the_mask_has_exactly_the_zeros_of_the_tiles_that_went():
    linear = nn.Linear(70, 33)
    layer = Layer.of("a", linear.requires_grad_(False), (16, 32))
    layer.prune(torch.tensor([0, 5, 8]))
    mask = layer.mask()
    assert torch.equal(linear.weight == 0, ~mask)
    assert mask.shape == (33, 70) and int((~mask).sum()) == 16 * 32 + 16 * 6 + 1 * 6
    assert not mask[:16, :32].any() and not mask[16:32, 64:].any() and not mask[32, 64:].any() and bool(mask[16:32, :64].all())


# curves


@pytest.mark.parametrize("samples", [1, 3])
def test_the_second_order_term_equals_the_explicit_hessian(samples):
    w, g = randn(6, 10, seed=3, dtype=torch.float64), randn(samples, 6, 10, seed=4, dtype=torch.float64)
    tile, order = (2, 5), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    curve = distortion_curve(sums_of(w, g, tile), order)
    for d in range(0, 101, 7):
        gone = 6 - int(6 * (100 - d) / 100 + 1e-9)
        delta = torch.zeros(6, 10, dtype=torch.float64)
        for t in order[:gone].tolist():
            i, j = 2 * (t // 2), 5 * (t % 2)
            delta[i : i + 2, j : j + 5] = -w[i : i + 2, j : j + 5]
        step = delta.flatten()
        hessian = sum(torch.outer(one.flatten(), one.flatten()) for one in g) / samples + 1e-7 * torch.eye(60, dtype=torch.float64)
        want = float((delta * g).square().mean() + 0.5 * step @ hessian @ step)
        assert curve[d] == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_closed_form_is_what_adding_up_step_by_step_gives():
    """0.5 D^T H D of a growing D, from its increments d: 0.5 d^T H d + d^T H D each."""
    w, g = randn(8, 8, seed=6, dtype=torch.float64), randn(8, 8, seed=7, dtype=torch.float64)
    order = torch.arange(16)
    sums = sums_of(w, [g], (2, 2))
    curve = distortion_curve(sums, order)
    hessian = torch.outer(g.flatten(), g.flatten()) + 1e-7 * torch.eye(64, dtype=torch.float64)
    gone, total = torch.zeros(8, 8, dtype=torch.float64), 0.0
    for t in range(16):
        i, j = 2 * (t // 4), 2 * (t % 4)
        step = torch.zeros(8, 8, dtype=torch.float64)
        step[i : i + 2, j : j + 2] = -w[i : i + 2, j : j + 2]
        total += float(0.5 * step.flatten() @ hessian @ step.flatten() + step.flatten() @ hessian @ gone.flatten())
        gone += step
    assert curve[100] == pytest.approx(total + float((gone * g).square().mean()), rel=1e-9)


def test_with_the_true_hessian_curves_order_layers_as_the_loss_does():
    """y = w x, loss 0.5 mean (y - y0)^2: the curves of sample gradients x_s are the loss itself."""
    ends = []
    for seed, scale in ((0, 1.0), (1, 3.0)):
        w, x = randn(1, 12, seed=seed, dtype=torch.float64), scale * randn(40, 12, seed=seed + 10, dtype=torch.float64)
        sums = sums_of(w, x[:, None], (1, 3))._replace(square=torch.zeros(4))  # the second-order term alone
        curve = distortion_curve(sums, torch.arange(4))
        losses = []
        for gone in range(5):
            cut_w = w.clone()
            cut_w[:, : 3 * gone] = 0
            losses.append(float(0.5 * ((x @ cut_w.T - x @ w.T) ** 2).mean()))
        assert curve[[0, 25, 50, 75, 100]] == pytest.approx(losses, rel=1e-5, abs=1e-12)
        ends.append((curve[50], losses[2]))
    assert (ends[0][0] < ends[1][0]) == (ends[0][1] < ends[1][1])


# allocation


A = np.arange(101) / 100


def shares(curves, work, tiles, target, *, power_units=None, power=0.0):
    prices = curve_prices(
        curves, [w * t for w, t in zip(work, tiles, strict=True)], [float(u) for u in power_units or tiles], smooth=0.0, power=power
    )
    costs = [[w] * t for w, t in zip(work, tiles, strict=True)]
    gone = allocate(prices, costs, [0] * len(tiles), target * sum(map(sum, costs)))
    return [g / t for g, t in zip(gone, tiles, strict=True)]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.62])
def test_equal_slopes_within_a_step_and_the_budget_to_a_fifth_of_a_percent(target):
    a, b = shares([A**2, 4 * A**2], [1, 1], [1000, 1000], target)
    assert abs(a + b - 2 * (1 - target)) <= 2 * 0.002
    assert a == 1 or abs(2 * a - 8 * b) <= 8 * 0.01
    assert (a + b) / 2 >= 1 - target - 1e-9  # never above the budget


def test_a_layer_of_twice_the_work_loses_more_at_the_same_curve():
    a, b = shares([A**2, A**2], [1, 2], [1000, 1000], 0.6)
    assert b == pytest.approx(min(2 * a, 1.0), abs=0.01)  # slopes per multiplication: 2 a = 2 b / 2


def test_it_agrees_with_the_exact_choice_within_a_step():
    curves, work = [A**2, 4 * A**2, 2 * A**3, 0.3 * A**2 + 0.1 * A], [3, 1, 2, 1]
    found = shares(curves, work, [100] * 4, 0.55)
    sizes = [[w * (100 - d) for d in range(101)] for w in work]
    exact = budget.choose([c.tolist() for c in curves], sizes, int(0.55 * 700))
    for mine, best in zip(found, exact.picks, strict=True):
        assert abs(mine - best / 100) <= 0.011 + 0.01  # a grid step, and the tile that does not fit


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), targets=st.tuples(st.floats(0.15, 1), st.floats(0.15, 1)))
def test_a_smaller_budget_makes_no_layer_denser(seed, targets):
    rng = np.random.default_rng(seed)
    prices = [np.sort(rng.integers(0, 5, n)).astype(float) for n in rng.integers(1, 30, 4)]
    costs = [rng.integers(1, 9, len(p)).tolist() for p in prices]
    whole = sum(map(sum, costs))
    more, less = (allocate(prices, costs, [0] * 4, t * whole) for t in sorted(targets))
    assert all(m >= s for m, s in zip(more, less, strict=True))
    left = whole - sum(sum(c[:g]) for c, g in zip(costs, less, strict=True))
    assert max(targets) * whole - max(map(max, costs)) < left <= max(targets) * whole + 1e-6


def test_power_moves_pruning_to_wide_inputs_and_the_official_sign_away_from_them():
    curves, work, tiles = [A**2, A**2], [1, 1], [500, 500]
    wide = [500 * 4, 500]  # the first layer has four times the inputs
    none, paper, official = (shares(curves, work, tiles, 0.5, power_units=wide, power=p) for p in (0.0, 0.3, -0.3))
    assert none == pytest.approx([0.5, 0.5], abs=0.002) and paper[0] > 0.55 > 0.45 > paper[1]
    assert official[0] < 0.45 < 0.55 < official[1]
    # beta = power * mean max slope / mean |P'| = 0.3 * 2 / 1250: prices 2 a - beta * 2000 and 2 b - beta * 500 are equal
    assert paper[0] - paper[1] == pytest.approx(0.3 * 2 / 1250 * 1500 / 2, abs=0.01)


def test_every_layer_keeps_its_floor_and_the_reachable_least_is_told():
    prices, costs = [np.zeros(4), np.ones(4)], [[5] * 4, [5] * 4]
    assert allocate(prices, costs, [1, 1], 10.0) == [3, 3] and allocate(prices, costs, [1, 1], 25.0) == [3, 0]
    with pytest.raises(BlockwrightError, match=r"amount=0\.8: .*0\.25 of the multiplications.*at most 0\.75"):
        allocate(prices, costs, [1, 1], 8.0)


# gradients


@pytest.mark.parametrize("fisher", ["samples", "mean"])
def test_statistics_equal_autograd_one_sample_at_a_time(fisher):
    model, x = vit(), images(5)
    found = method.prunable(model, (8, 8), ["Linear", "Conv2d"], [])
    run = run_of(model, x)
    sums = method.statistics(run, model, found, fisher=fisher, batch_size=2)
    names = [layer.name for layer in found]
    assert "vit.embeddings.patch_embeddings.projection" in names and "classifier" not in names and len(names) == 13
    rng, reference = run.generator("signs"), vit().requires_grad_()
    gradients = {name: [] for name in names}
    for i in range(5):
        reference.zero_grad()
        out = reference(x[i : i + 1]).logits
        signs = torch.randint(0, 2, (1, 5), generator=rng) * 2 - 1
        ((signs * out).sum() / 5**0.5 if fisher == "samples" else (out * out).sum() / 5).backward()
        for name in names:
            gradients[name].append(reference.get_submodule(name).weight.grad.flatten(1).clone())
    for layer, s in zip(found, sums, strict=True):
        w = layer.weight
        r, c = min(8, w.shape[0]), min(8, w.shape[1])
        each = gradients[layer.name] if fisher == "samples" else [torch.stack(gradients[layer.name]).mean(0)]
        for found_slopes, g in zip(s.slopes, each, strict=True):
            assert found_slopes.tolist() == pytest.approx([sum(t) for t in tiles_of((w * g).tolist(), r, c)], rel=1e-3, abs=1e-5)
        for power, found_sums in ((1, s.taylor), (2, s.square)):
            mean = torch.stack([(w * g).abs() ** power for g in each]).mean(0)
            assert found_sums.tolist() == pytest.approx([sum(t) for t in tiles_of(mean.tolist(), r, c)], rel=1e-3, abs=1e-6)


def test_signed_outputs_tell_how_far_the_outputs_move():
    """The mean of (gradient . D)^2 over samples is the mean square change of the outputs under a small D, whichever way it goes."""
    model, x = vit(), images(300)
    layer = next(found for found in method.prunable(model, (8, 8), ["fc1"], []))
    moved = copy.deepcopy(model)
    step = 1e-3 * randn(*layer.weight.shape, seed=9)
    moved.get_submodule(layer.name).weight.data += step
    with torch.no_grad():
        want = float((moved(x).logits - model(x).logits).square().mean())
    rng = torch.Generator().manual_seed(0)
    layer.module.weight.requires_grad_()
    squares = []
    for i in range(300):
        scalar = method.signed_output(model(x[i : i + 1]).logits, None, rng)
        (g,) = torch.autograd.grad(scalar, [layer.module.weight])
        squares.append(float((g * step).sum()) ** 2)
    assert sum(squares) / 300 == pytest.approx(want, rel=0.25)


def test_padding_has_no_part_in_energy_and_signed_outputs():
    out, real = randn(1, 4, 3), torch.tensor([[1, 1, 0, 0]])
    assert float(method.output_energy(out, real)) == pytest.approx(float(out[:, :2].square().mean()), rel=1e-5)
    signs = torch.randint(0, 2, out.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    want = float((signs * out)[:, :2].sum()) / 6**0.5
    assert float(method.signed_output(out, real, torch.Generator().manual_seed(3))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("fisher", "what"), [("samples", "squared gradient"), ("mean", "gradient")])
def test_a_gradient_that_is_not_finite_is_told_by_the_name_of_its_layer(fisher, what):
    model = vit()
    with torch.no_grad():
        model.classifier.weight.mul_(1e30)
    with pytest.raises(BlockwrightError, match=rf"lpvit: {what} of vit\.embeddings\.patch_embeddings\.projection"):
        lpvit(model, calibration=images(), block_size=[8, 8], fisher=fisher)


# whole models


def kept_by_hand(model, dense, positions):
    """Multiplications left and of the dense model, from the weights' own zeros in tiles, patch embedding included."""
    left = whole = 0
    for name, p in dense.named_modules():
        if (isinstance(p, nn.Linear) and ".layers." in name) or isinstance(p, nn.Conv2d):
            now = model.get_submodule(name)
            w = now.plain_weight() if isinstance(now, BlockSparseLinear) else now.weight
            t = 16 if isinstance(p, nn.Conv2d) else positions
            left, whole = left + t * int((w != 0).sum()), whole + t * w.numel()
    return left, whole


@pytest.mark.parametrize("allocation", ["curves", "uniform", "global"])
@pytest.mark.parametrize("amount", [0.0, 0.4, 0.7])
def test_the_budget_is_met_to_a_tile_and_what_stays_is_unchanged(amount, allocation):
    dense = vit()
    model = lpvit(dense, calibration=images(), amount=amount, block_size=[8, 8], allocation=allocation)
    left, whole = kept_by_hand(model, dense, 17)
    assert (1 - amount) * whole - 8 * 8 * 17 < left <= (1 - amount) * whole
    for name, m in sparse_of(model).items():
        w = dense.get_submodule(name).weight
        kept = m.mask().repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(m.plain_weight(), w * kept) and m.mask().sum() >= 0.05 * m.mask().numel()
        assert torch.equal(m.bias, dense.get_submodule(name).bias)
    assert len(sparse_of(model)) == 12 and torch.equal(model.classifier.weight, dense.classifier.weight)
    counted = multiplications(model, images()[:1])
    chain = 17 * sum(int((m.plain_weight() != 0).sum()) for m in sparse_of(model).values())
    assert sum(kept for kept, _ in counted.values()) == chain and len(counted) == 12


def test_an_uniform_budget_takes_the_same_share_of_every_layer():
    model = lpvit(vit(), calibration=images(), amount=0.5, block_size=[8, 8], allocation="uniform", ranking="l1")
    assert {round(float(m.mask().float().mean()), 2) for m in sparse_of(model).values()} == {0.5}
    w = vit().vit.layers[1].mlp.fc1.weight.abs()
    scores = [sum(t) / len(t) for t in tiles_of(w.tolist(), 8, 8)]
    best = sorted(range(len(scores)), key=lambda i: scores[i])[len(scores) // 2 :]
    assert sorted(best) == model.vit.layers[1].mlp.fc1.mask().flatten().nonzero().flatten().tolist()


def test_final_masks_use_the_ranking_of_the_curves():
    masks = {
        ranking: torch.cat(
            [m.mask().flatten() for m in sparse_of(lpvit(vit(), calibration=images(), block_size=[8, 8], ranking=ranking)).values()]
        )
        for ranking in ("distortion", "taylor", "l1")
    }
    assert not any(torch.equal(masks[a], masks[b]) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize(
    "option", [{"fisher": "mean"}, {"smooth": 0.9}, {"lambda_power": 0.5}, {"lambda_power": 0.5, "power_sign": "official"}]
)
def test_every_option_of_the_curves_changes_what_is_kept(option):
    seen = [
        [int(m.mask().sum()) for m in sparse_of(lpvit(vit(), calibration=images(), block_size=[4, 4], **o)).values()] for o in ({}, option)
    ]
    assert seen[0] != seen[1]


def test_power_prunes_the_wide_layer_of_a_model_and_the_official_sign_spares_it():
    def kept_of_fc2(**options):
        model = lpvit(vit(), calibration=images(), block_size=[8, 8], **options)
        return sum(int(b.mlp.fc2.mask().sum()) for b in model.vit.layers)

    assert kept_of_fc2(lambda_power=2.0) < kept_of_fc2() < kept_of_fc2(lambda_power=2.0, power_sign="official")


def test_positions_are_those_of_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(self.used(x)[:, :2])

    model = Twice()
    found = [Layer.of("used", model.used, (2, 2)), Layer.of("idle", model.idle, (2, 2))]
    method.count_positions(model, found, torch.zeros(1, 5, 6))
    assert [layer.positions for layer in found] == [7, 0]


def test_targets_and_ignore():
    model = lpvit(vit(), calibration=images(), block_size=[8, 8], targets=["Linear"], ignore=["fc2", "re:layers.0"])
    assert [n.rpartition(".")[2] for n in sparse_of(model)] == ["q_proj", "k_proj", "v_proj", "o_proj", "fc1"]
    before = vit().vit.embeddings.patch_embeddings.projection.weight
    assert torch.equal(model.vit.embeddings.patch_embeddings.projection.weight, before)


def test_two_heads_and_stages_of_different_token_counts():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2, num_channels=1
    )
    deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, num_labels=5)).eval()
    made = lpvit(deit, calibration=images(), block_size=[8, 8], epochs=1, labels=[0, 1, 2, 3, 4, 0])
    assert len(sparse_of(made)) == 12 and bool(torch.isfinite(made(images()).logits).all())
    swin = SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, num_channels=1, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=5)
    ).eval()
    x = randn(4, 1, 16, 16)
    made = lpvit(swin, calibration=x, block_size=[8, 8])
    counts = multiplications(made, x[:1])
    share = sum(k for k, _ in counts.values()) / sum(w for _, w in counts.values())
    assert 0.4 < share < 0.55 and bool(torch.isfinite(made(x).logits).all())
    first = next(w for n, (_, w) in counts.items() if "layers.0" in n and n.endswith(("query", "q_proj")))
    assert first == 64 * 16 * 16  # 8 x 8 places, whatever the windows


def test_a_layer_without_gradient_is_ranked_by_its_weights_with_a_warning():
    model = vit()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight.zero_()
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.fc1 has no gradient"):
        made = lpvit(model, calibration=images(), block_size=[8, 8])
    mask = made.vit.layers[1].mlp.fc1.mask()
    scores = torch.tensor([sum(t) / len(t) for t in tiles_of(model.vit.layers[1].mlp.fc1.weight.abs().tolist(), 8, 8)])
    assert 0 < int(mask.sum()) < mask.numel() and scores[mask.flatten()].min() > scores[~mask.flatten()].max()


SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
}


def ids(n=6):
    return torch.randint(0, 60, (n, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_are_pruned_written_and_opened_again(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    run = run_of(model, ids())
    lpvit.__wrapped__(run, block_size=[8, 8], epochs=1)
    made = run.model.build()
    assert len(sparse_of(made)) >= 8 and bool(torch.isfinite(made(ids()).logits).all())
    folder, plain = tmp_path / "out", tmp_path / "plain"
    for f in (folder, plain):
        f.mkdir()
    assert export.write(run.model, folder, source=tmp_path, dtype=torch.float32) == "blockwright"
    opened = export.read(folder).build()
    assert torch.equal(opened(ids()).logits, made(ids()).logits) and len(sparse_of(opened)) == len(sparse_of(made))
    assert export.write(run.model, plain, source=tmp_path, layout="dense", dtype=torch.float32) == "standard"
    loaded, told = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True, dtype=torch.float32)
    assert not any(told.values()) and torch.allclose(loaded.eval()(ids()).logits, made(ids()).logits, atol=1e-5)


def test_a_vision_model_is_written_and_opened_again(tmp_path):
    run = run_of(vit().bfloat16(), images())
    lpvit.__wrapped__(run, block_size=[8, 8], epochs=1)
    made = run.model.build(dtype=torch.float32)
    assert {p.dtype for p in run.model.build().parameters() if p.is_floating_point()} == {torch.bfloat16}
    folder, plain = tmp_path / "out", tmp_path / "plain"
    for f in (folder, plain):
        f.mkdir()
    export.write(run.model, folder, source=tmp_path)
    assert torch.equal(export.read(folder).build(dtype=torch.float32)(images()).logits, made(images()).logits)
    assert export.write(run.model, plain, source=tmp_path, layout="dense") == "standard"
    loaded = ViTForImageClassification.from_pretrained(plain, dtype=torch.float32).eval()
    assert torch.allclose(loaded(images()).logits, made(images()).logits, atol=1e-4)


def test_the_main_job_prunes_and_opens_again(small_job, tmp_path):
    small_job(tmp_path)
    texts = {
        name: {"text": str(tmp_path / f"{file}.txt"), "num": 4, "length": 24}
        for name, file in (("calibration", "learn"), ("evaluation", "judge"))
    }
    options = {"amount": 0.7, "block_size": [32, 16], "epochs": 1, "batch_size": 2}
    job = {
        "model": str(tmp_path / "model"),
        "stages": [{"lpvit": options}],
        "out": str(tmp_path / "out"),
        "measure": {"use": False},
        "dtype": "fp32",
        **texts,
    }
    report = bw.run(job)
    opened = bw.load(tmp_path / "out", dtype=torch.float32, fast=False)
    assert len(sparse_of(opened)) == 21 and len(report["stages"][0]["curves"]["fine-tuning: loss"]) == 2
    kept, whole = map(sum, zip(*multiplications(opened, torch.zeros(1, 24, dtype=torch.long)).values(), strict=True))
    assert kept <= 0.3 * whole < kept + 32 * 16 * 24
    tokens = torch.arange(40).view(2, 20)
    fast = bw.load(tmp_path / "out", dtype=torch.float32)
    few = {n for n, m in sparse_of(opened).items() if m.mask().float().mean() <= 0.4}
    assert few and few == {n for n, m in fast.named_modules() if isinstance(m, GatheredLinear)} and not sparse_of(fast)
    assert torch.allclose(fast(tokens).logits, opened(tokens).logits, atol=1e-5)
    assert torch.allclose(fast(tokens.repeat(2, 1)).logits[:2], opened(tokens).logits, atol=1e-5)  # 80 rows are many
    bw.export(tmp_path / "out", tmp_path / "plain", to="dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    assert torch.allclose(plain(tokens).logits, opened(tokens).logits, atol=1e-5)


# fine-tuning


@pytest.mark.parametrize("conv", [False, True])
def test_pruned_weights_stay_zero_through_twenty_steps_of_adamw(conv):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module = Conv1D(12, 20) if conv else nn.Linear(20, 12)
    layer = Layer.of("a", module, (4, 8))
    layer.prune(torch.tensor([0, 2, 4, 7]))
    mask, before = layer.mask(), layer.weight.clone()
    method.hold_masked(layer)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    for i in range(20):
        optimizer.zero_grad()
        module(randn(5, 20, seed=i)).square().sum().backward()
        optimizer.step()
        assert bool((layer.weight[~mask] == 0).all())
    assert bool((layer.weight[mask] != before[mask]).all())


def test_fine_tuning_brings_the_outputs_nearer_and_keeps_the_tiles():
    dense, x = vit(), images(32)

    def made(**options):
        return lpvit(dense, calibration=x, block_size=[8, 8], batch_size=16, **options)

    before, after = made(), made(epochs=12, lr=3e-3)
    want = dense(x).logits.softmax(-1)
    kl = [float((want * (want.log() - m(x).logits.log_softmax(-1))).sum(-1).mean()) for m in (before, after)]
    assert kl[1] < 0.5 * kl[0]
    for a, b in zip(sparse_of(before).values(), sparse_of(after).values(), strict=True):
        assert torch.equal(a.mask(), b.mask()) and not torch.equal(a.values, b.values)
    patch = [m.vit.embeddings.patch_embeddings.projection.weight for m in (before, after)]
    assert torch.equal(patch[0] == 0, patch[1] == 0)
    assert not torch.equal(after.classifier.weight, dense.classifier.weight)


def test_labels_teach_what_the_dense_model_does_not_know():
    dense, x = vit(), images(20)
    labels = [i % 5 for i in range(20)]
    options = dict(calibration=x, block_size=[8, 8], amount=0.2, epochs=60, lr=3e-3, alpha=0.0, batch_size=20)
    right = [
        float((m(x).logits.argmax(-1) == torch.tensor(labels)).float().mean()) for m in (dense, lpvit(dense, labels=labels, **options))
    ]
    assert right[0] < 0.6 and right[1] > 0.9


def test_the_distillation_term_by_hand():
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    # softmax(1, 0) = (e, 1) / (e + 1); KL((1/2, 1/2) || that) = 1/2 log((e + 1)^2 / (4 e))
    e = np.e
    want = 0.5 * np.log((e + 1) ** 2 / (4 * e))
    assert float(method.distillation(p, q, None)) == pytest.approx(want, rel=1e-5)
    both = torch.stack([p, p + 9], 1)
    real = torch.tensor([[1, 0]])
    assert float(method.distillation(both, torch.stack([q, q], 1), real)) == pytest.approx(want, rel=1e-5)


# running the result


def test_on_a_cpu_each_linear_takes_its_fastest_form_and_twins_stay_twins():
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[[0, 2, 2], [1, 0, 3]] = True
    few, many = (BlockSparseLinear.of(nn.Linear(60, 90).requires_grad_(False), k, (32, 16)) for k in (keep, ~keep))
    flat = BlockSparseLinear.of(nn.Linear(60, 90).requires_grad_(False), torch.zeros(6, 4, dtype=torch.bool), (16, 16))
    model = nn.ModuleDict({"few": few, "twin": few, "many": many, "flat": flat, "other": nn.Linear(60, 90)}).eval()
    other, x = model["other"], randn(2, 35, 60)
    want = {name: m(x) for name, m in model.items()}
    fast = method.accelerate(model)
    assert fast is model and isinstance(fast["few"], GatheredLinear) and fast["twin"] is fast["few"] and fast["other"] is other
    assert all(type(fast[name]) is nn.Linear for name in ("many", "flat")) and not any(m.training for m in fast.modules())
    assert all(torch.allclose(m(x), want[name], atol=1e-5) for name, m in fast.items())


def sparse_linear(n, k, r, c, share, dtype, seed=0, bias=True):
    linear = nn.Linear(k, n, bias=bias)
    linear.weight.data, keep = (
        randn(n, k, seed=seed),
        torch.rand(-(-n // r), -(-k // c), generator=torch.Generator().manual_seed(seed)) < share,
    )
    if share == 0.5:
        keep[0] = False  # a row of tiles of which nothing stays
    return BlockSparseLinear.of(linear.requires_grad_(False).to(DEVICE, dtype), keep.to(DEVICE), (r, c)).requires_grad_(False)


HALF = torch.bfloat16 if CUDA else torch.float16  # bf16 is silently wrong in Triton's interpreter


@pytest.mark.parametrize(("r", "c"), [(16, 16), (32, 32), (32, 64), (64, 32), (64, 64), (128, 128), (24, 48)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, 2e-2)])
def test_the_kernel_equals_the_masked_product(r, c, dtype, tolerance):
    for share, (m, n, k) in itertools.product((0.0, 0.5, 1.0), ((37, 2 * r + 5, 2 * c + 7), (1, r, 3 * c))):
        sparse = sparse_linear(n, k, r, c, share, dtype)
        x = randn(m, k, seed=3).to(DEVICE, dtype)
        got = lpvit_triton.product(x, sparse)
        assert got.dtype == dtype and got.shape == (m, n)
        want = x.double() @ sparse.dense().double().T + sparse.bias.double()
        assert (got.double() - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def test_the_kernel_takes_the_rows_of_three_images():
    sparse = sparse_linear(96, 70, 32, 32, 0.5, torch.float32, bias=False)
    x = randn(3, 197, 70, seed=4).to(DEVICE)
    got = lpvit_triton.product(x, sparse)
    want = x.double() @ sparse.dense().double().T
    assert got.shape == (3, 197, 96) and (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_gradient_of_the_kernel_is_that_of_the_masked_product():
    sparse = sparse_linear(40, 50, 16, 16, 0.5, torch.float32)
    x, dy = randn(9, 50, seed=5).to(DEVICE).requires_grad_(), randn(9, 40, seed=6).to(DEVICE)
    lpvit_triton.product(x, sparse).backward(dy)
    assert torch.allclose(x.grad, dy @ sparse.dense(), atol=1e-6)


def test_the_kernel_refuses_tiles_it_is_not_made_for():
    for r, c in ((8, 32), (32, 256)):
        with pytest.raises(BlockwrightError, match="16 to 128"):
            lpvit_triton.product(torch.zeros(2, 300, device=DEVICE), sparse_linear(300, 300, r, c, 1.0, torch.float32))


def test_the_timed_side_of_the_claim_runs_small():
    pytest.importorskip("transformers")
    from blockwright.claims import lpvit as claim

    row = claim.products(64, 64, 20, 16, 0.5, device=DEVICE, dtype=torch.float32)
    assert row["error"] <= 1e-5 and row["against dense"] > 0 and row["against BSR"] > 0
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=8, patch_size=2)
    assert claim.whole_model(0, config=config, batch=2, device=DEVICE)["speed"] > 0


# refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"amount": 1.0}, "amount=1.0"),
        ({"amount": -0.1}, "amount=-0.1"),
        ({"block_size": [8]}, "block_size"),
        ({"block_size": [0, 8]}, "block_size"),
        ({"block_size": [128, 128]}, r"block_size=\[128, 128\]: vit\.embeddings\.patch_embeddings\.projection is 32 x 4"),
        ({"lambda_power": -1.0}, "lambda_power"),
        ({"alpha": 1.5}, "alpha"),
        ({"smooth": 1.0}, "smooth"),
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch_size": 0}, "batch_size"),
        ({"labels": [1, 2]}, "2 labels"),
        ({"targets": ["nothing"]}, "name no layer"),
        ({"block_size": [32, 64], "amount": 0.9}, "of the multiplications.*an amount of at most"),
    ],
)
def test_wrong_options_are_refused(options, told):
    with pytest.raises(BlockwrightError, match=told):
        lpvit(vit(), calibration=images(), **options)


@pytest.mark.parametrize(("option", "allowed"), [(o, ", ".join(words)) for o, words in method.CHOICES.items()])
def test_unknown_words_are_refused(option, allowed):
    defaults = {name: p.default for name, p in inspect.signature(lpvit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options = {"block_parameters": 1000, "tokens": 10, **defaults}
    assert method.plan(**options) == {"copies": 2, "passes": 3, "bits": 8.0, "resident": 4}
    with pytest.raises(BlockwrightError, match=f"lpvit: {option}='best'. Allowed: {allowed}"):
        method.plan(**options | {option: "best"})


def test_a_model_without_data_or_with_other_forms_is_refused():
    with pytest.raises(BlockwrightError, match="needs calibration"):
        lpvit(vit())
    once = lpvit(vit(), calibration=images(), block_size=[8, 8])
    with pytest.raises(BlockwrightError, match=r"q_proj is block_sparse.*a dense model"):
        lpvit(once, calibration=images(), block_size=[8, 8])


def test_the_input_stays_and_the_same_seed_gives_the_same_bits():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (lpvit(model, calibration=images(), block_size=[8, 8], epochs=1, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert cut(torch.ones(3, 3), (2, 2)).sum() == 9
