"""dgq: both phases and the smoothing against brute force from the inputs, kernels in integers, the stage, its files and its refusals."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
)

import blockwright as bw
from blockwright import meter
from blockwright.blocks import dual_grained, layers
from blockwright.blocks.dual_grained import DualGrainedLinear
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block
from blockwright.compress import dgq as module
from blockwright.compress.dgq import coarse_scale, dgq, fine_scales, plan, quantize, smoothing_factors
from blockwright.errors import BlockwrightError
from blockwright.recipes import export, gguf, w8a8
from blockwright.recipes.convert import convert

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(n, k, t, seed=0):
    """Weights and correlated inputs with a few large channels, in fp64."""
    x = randn(t, k, seed=seed, dtype=torch.float64) @ randn(k, k, seed=seed + 1, dtype=torch.float64) / k**0.5
    x[:, ::7] *= 6
    return randn(n, k, seed=seed + 2, dtype=torch.float64), x


def restored(weight, group_size):
    """W_hat from the parts, in fp64, one group at a time."""
    out = torch.zeros(weight.codes.shape, dtype=torch.float64)
    g = weight.codes.shape[1] if group_size == -1 else group_size
    for j in range(weight.zero.shape[1]):
        part = slice(j * g, (j + 1) * g)
        steps = weight.codes[:, part].double() - weight.zero[:, j : j + 1].double()
        out[:, part] = weight.channel_scale.double()[:, None] * weight.group_scale[:, j : j + 1].double() * steps
    return out


# the representation


def adversarial(kind, n=6, k=70, seed=0):
    w = randn(n, k, seed=seed)
    if kind == "one outlier":
        w[2, 33] = 100
    elif kind == "constant rows":
        w = w[:, :1].expand(n, k).clone()
    elif kind == "all positive":
        w = w.abs() + 0.5
    elif kind == "all negative":
        w = -w.abs() - 0.5
    elif kind == "all zero":
        w.zero_()
    elif kind == "zeros beside":
        w[1] = 0
        w[:, 16:48] = 0
    elif kind == "tiny":
        w *= 1e-38
    elif kind == "wide":
        w *= 10.0 ** torch.arange(k).div(5).sub(7)
    return w


@pytest.mark.parametrize(
    "kind", ["one outlier", "constant rows", "all positive", "all negative", "all zero", "zeros beside", "tiny", "wide"]
)
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_weights_stay_in_range_whatever_the_weights(kind, group_size, bits):
    w, x = adversarial(kind), randn(50, 70, seed=9)
    weight = quantize(w, x.T @ x, bits=bits, group_size=group_size)
    half = 2 ** (bits - 1)
    assert weight.group_scale.dtype == weight.codes.dtype == torch.int8 and int(weight.group_scale.min()) >= 1
    for part in (weight.codes, weight.zero):  # [0, 2**bits - 1], stored minus 2**(bits-1)
        assert int(part.min()) >= -half and int(part.max()) < half
    spread = (weight.group_scale.int().repeat_interleave(70 if group_size == -1 else group_size, 1))[:, :70]
    zero = (weight.zero.int().repeat_interleave(70 if group_size == -1 else group_size, 1))[:, :70]
    product = spread * (weight.codes.int() - zero)
    assert int(product.abs().max()) <= 127
    assert torch.equal(dual_grained.expand(*weight[:3], group_size=group_size).int(), product)
    assert bool((weight.channel_scale > 0).all()) and bool(torch.isfinite(weight.channel_scale).all())
    dead = (w == 0).all(1)
    assert not bool(product[dead].any()) and bool((weight.channel_scale[dead] == 1).all()) and bool((weight.group_scale[dead] == 1).all())
    if kind == "zeros beside" and group_size == 16:
        assert not bool(product[:, 16:48].any()) and bool((weight.zero[:, 1:3] == -half).all())
        assert bool((weight.group_scale[:, 1:3] == 1).all())
    if kind in ("constant rows", "all positive", "all negative"):
        error = (restored(weight, group_size) - w).norm() / w.norm()
        assert error < (0.06 if bits == 4 else 0.02)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 5), k=st.integers(1, 90), group_size=st.sampled_from([-1, 8, 24, 64]), power=st.integers(-20, 20))
def test_a_power_of_two_scales_only_the_channel_scales(n, k, group_size, power):
    w, x = randn(n, k, seed=k), randn(30, k, seed=n)
    gram = x.T @ x
    before = w.clone()
    a, b = quantize(w, gram, group_size=group_size), quantize(w * 2.0**power, gram, group_size=group_size)
    assert torch.equal(w, before) and all(torch.equal(p, q) for p, q in zip(a[:3], b[:3], strict=True))
    assert torch.equal(a.channel_scale * 2.0**power, b.channel_scale)
    assert a.codes.shape == (n, k) and a.zero.shape == (n, 1 if group_size == -1 else -(-k // group_size))


# phase 1 and phase 2, by brute force from the inputs


def fine_by_hand(w, x, levels):
    """One group of one output: (scale, zero, least error) over the 20 ranges, and the error of each."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    tried = []
    for i in range(1, 21):
        r = 1.02 - 0.22 * i / 20
        s = (high - low) * r / levels
        z = float(round(-low * r / s))
        q = [min(max(round(min(max(v, low * r), high * r) / s) + z, 0), levels) for v in w.tolist()]
        wrong = x @ (w - s * (torch.tensor(q, dtype=torch.float64) - z))
        tried.append((float(wrong.square().mean()), s, z))
    return min(tried), tried


@pytest.mark.parametrize("bits", [4, 8])
def test_phase_one_takes_the_range_with_the_least_error_of_the_outputs(bits):
    w, x = problem(4, 16, 32)
    scale, zero = fine_scales(w, x.T @ x / 32, bits=bits, group_size=8)
    chosen = set()
    for n in range(4):
        for j in range(2):
            part = slice(8 * j, 8 * j + 8)
            (error, s, z), tried = fine_by_hand(w[n, part], x[:, part], 2**bits - 1)
            assert scale[n, j].item() == pytest.approx(s, rel=1e-9) and zero[n, j].item() == z
            chosen.add(tried.index((error, s, z)))
    assert len(chosen) > (2 if bits == 4 else 1)  # not always the first


def test_the_gram_form_of_the_error_is_the_direct_one():
    w, x = problem(4, 16, 32)
    d, gram = w * 0.01, x.T @ x / 32
    for j in range(2):
        part = slice(8 * j, 8 * j + 8)
        block = module._diagonal_blocks(gram, 2, 8)[j]
        direct = (x[:, part] @ d[:, part].T).square().mean(0)
        assert torch.allclose(((d[:, part] @ block) * d[:, part]).sum(1), direct, rtol=1e-6, atol=0)


def coarse_by_hand(w, x, fine, zero, group, levels):
    """One output: the error of each of the 80 channel scales."""
    tried = []
    for i in range(1, 81):
        s8 = (1.02 - 0.82 * i / 80) * float(w.abs().max()) / 127
        out = []
        for k, v in enumerate(w.tolist()):
            s, z = fine[k // group], zero[k // group]
            s4 = max(1, round(s / s8))
            most = math.floor(127 / s4)
            q = round(min(max(v, -127 * s8), 127 * s8) / (s4 * s8)) + z
            out.append(s8 * s4 * (min(max(q, max(0, z - most)), min(levels, z + most)) - z))
        tried.append((float((x @ (w - torch.tensor(out, dtype=torch.float64))).square().mean()), s8))
    return tried


@pytest.mark.parametrize("n,k,group,bits", [(3, 40, 8, 4), (3, 96, 32, 4), (2, 70, 32, 4), (2, 72, 24, 8)])
def test_phase_two_takes_the_channel_scale_with_the_least_error_of_the_outputs(n, k, group, bits):
    w, x = problem(n, k, 150, seed=k)
    gram = x.T @ x / 150
    fine, zero = fine_scales(w, gram, bits=bits, group_size=group)
    found = coarse_scale(w, gram, fine, zero, bits=bits, group_size=group)
    weight = quantize(w, gram, bits=bits, group_size=group)
    for i in range(n):
        tried = coarse_by_hand(w[i], x, fine[i].tolist(), zero[i].tolist(), group, 2**bits - 1)
        error, s8 = min(tried)
        assert found[i].item() == pytest.approx(s8, rel=1e-9) and weight.channel_scale[i].item() == pytest.approx(s8, rel=1e-6)
        mine = (x @ (w - restored(weight, group))[i]).square().mean().item()
        assert mine == pytest.approx(error, rel=1e-5)  # the codes are those of the search


@settings(deadline=None, max_examples=15)
@given(k=st.integers(64, 140), t=st.integers(1, 200), seed=st.integers(0, 99))
def test_the_bound_lies_below_the_error(k, t, seed):
    x = randn(t, k, seed=seed) * torch.logspace(-2, 2, k)
    gram = x.T @ x
    f, d = module._factor_below(gram, k // 8), randn(9, k, seed=seed + 1)
    error = (d.double() @ x.double().T).square().sum(1)
    bound = (d.double() @ f.double()).square().sum(1)
    assert bool((bound <= error * 1.0005).all())
    assert bool((bound > 0.3 * error).all())  # and is worth having: a few large directions hold most of this error
    assert not bool(module._factor_below(torch.zeros(k, k), k // 8).any())


def test_integer_group_scales_cost_little_on_gaussian_data():
    w, x = randn(64, 256, dtype=torch.float64), randn(600, 256, seed=1, dtype=torch.float64)
    gram = x.T @ x
    scale, zero = fine_scales(w, gram, group_size=64)
    s, z = (v.repeat_interleave(64, 1) for v in (scale, zero))
    with_floats = s * (torch.clamp(torch.round(w / s) + z, 0, 15) - z)

    def error(w_hat):
        return float((x @ (w - w_hat).T).square().mean())

    ours = error(restored(quantize(w, gram, group_size=64), 64))
    assert ours <= 1.1 * error(with_floats)
    top = w.abs().amax(1)
    s4 = (scale / (top / 127)[:, None]).round().clamp(min=1).repeat_interleave(64, 1)
    once = (top / 127)[:, None] * s4 * torch.clamp(torch.round(w / ((top / 127)[:, None] * s4)), -z, 15 - z)
    assert ours < 0.97 * error(once)  # the search is worth having


def test_all_samples_count_not_the_last_alone():
    w, x = problem(8, 32, 100)
    y = x.flip(1)
    both = quantize(w, x.T @ x + y.T @ y, group_size=16)
    assert torch.equal(both.codes, quantize(w, y.T @ y + x.T @ x, group_size=16).codes)
    assert not torch.equal(both.codes, quantize(w, y.T @ y, group_size=16).codes)


# smoothing


def test_smoothing_factors_by_hand():
    top = torch.tensor([5.0, 1.0, 2.0, 8.0])  # k = int(0.02 + 1.5) = 1: the largest is the percentile
    assert smoothing_factors(top).tolist() == [1, 1, 1, 1]
    top = torch.ones(300)
    top[[4, 7, 9]] = torch.tensor([3.0, 30.0, 1.5])  # k = int(1.5 + 1.5) = 3: the third largest is 1.5
    want = torch.ones(300)
    want[[4, 7]] = torch.tensor([2.0, 20.0])
    assert torch.equal(smoothing_factors(top), want)
    assert torch.equal(smoothing_factors(top * 0.9e-4 / 1.5), torch.ones(300))


@settings(deadline=None, max_examples=20)
@given(k=st.integers(1, 2000), seed=st.integers(0, 99))
def test_hardly_any_channel_is_scaled(k, seed):
    t = smoothing_factors(randn(k, seed=seed).abs() ** 4)
    assert bool((t >= 1).all()) and int((t > 1).sum()) <= max(0.01 * k, 0)


COMMON = dict(vocab_size=60, num_hidden_layers=2, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_key_value_heads=2, **COMMON))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=96, num_key_value_heads=2, **COMMON))


def opt(**changes):
    return OPTForCausalLM(OPTConfig(hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, **COMMON, **changes))


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=64, intermediate_size=96, **COMMON))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None))


MODELS = {"llama": llama, "qwen2": qwen2, "opt": opt, "neox": neox, "gpt2": gpt2}
PAIRS = {
    "llama": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "post_attention_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "opt": {
        "self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"out_proj"},
        "final_layer_norm": {"fc1"},
        "fc1": {"fc2"},  # ReLU
    },
    "neox": {"input_layernorm": {"query_key_value"}, "post_attention_layernorm": {"dense_h_to_4h"}},  # GELU
    "gpt2": {"ln_1": {"c_attn"}, "ln_2": {"c_fc"}},
}
PAIRS["qwen2"] = PAIRS["llama"]


def made(name, seed=0):
    """A random model whose norms and biases matter, with outlier channels."""
    model = MODELS[name]().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.dim() == 2 else noise * 0.1 + (0 if p_name.endswith("bias") else 1))
            if p.dim() == 1 and p_name.endswith("weight"):
                p[5] *= 12
    return model


def ids(n=6, length=16, seed=5):
    return torch.randint(0, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def last(name):
    return name.rpartition(".")[2]


@pytest.mark.parametrize("name", MODELS)
def test_scales_move_where_that_changes_nothing_and_only_there(name):
    found = []

    def visit(block, x, y, rng):
        wiring = module.trace(block, x)
        before = block.outputs(x)
        weights = {n: t.clone() for n, t in block.module.state_dict().items()}
        pairs = module.smoothing_pairs(block, x, wiring, block.linears(), [], rng)
        assert all(torch.equal(t, weights[n]) for n, t in block.module.state_dict().items())  # trying leaves nothing behind
        found.append({last(p.source): {last(r) for r in p.readers} for p in pairs})
        for pair in pairs:
            k = layers.size(block.module.get_submodule(pair.readers[0].removeprefix(block.name + ".")))[1]
            module.fold(block, pair, torch.rand(k, generator=rng) * 9 + 1)
        after = block.outputs(x)
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        changed = {last(n.rpartition(".")[0]) for n, t in block.module.state_dict().items() if not torch.equal(t, weights[n])}
        assert changed == set(PAIRS[name]) | set().union(*PAIRS[name].values())
        frozen = module.smoothing_pairs(block, x, wiring, [n for n in block.linears() if last(n) != "q_proj"], [], rng)
        assert all("q_proj" not in {last(r) for r in p.readers} for p in frozen)
        first = pairs[0].source
        assert first not in {p.source for p in module.smoothing_pairs(block, x, wiring, block.linears(), [first], rng)}

    Run(Blueprint.of_module(made(name)), calibration=ids()).blocks(visit, inputs="dense")
    assert found == [PAIRS[name]] * 2


def test_norms_on_both_sides_do_not_hide_a_scale():
    common = {k: v for k, v in COMMON.items() if k != "num_attention_heads"}
    config = Gemma3TextConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **common)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape) * 0.25)  # far above the epsilon of the norms

    def visit(block, x, y, rng):  # queries are normalised, and so is what attention makes; norms multiply by 1 + weight
        pairs = module.smoothing_pairs(block, x, module.trace(block, x), block.linears(), [], rng)
        assert [last(p.source) for p in pairs] == ["up_proj"]

    Run(Blueprint.of_module(model), calibration=ids()).blocks(visit, inputs="dense")


def test_a_norm_that_the_residual_reads_too_stays():
    model = opt(do_layer_norm_before=False).eval()

    def visit(block, x, y, rng):
        pairs = module.smoothing_pairs(block, x, module.trace(block, x), block.linears(), [], rng)
        assert {last(p.source) for p in pairs} == {"v_proj", "fc1"}

    Run(Blueprint.of_module(model), calibration=ids()).blocks(visit, inputs="dense")


def test_statistics_after_smoothing_are_those_of_smoothed_inputs():
    x, t = randn(3 * 20, 8) * torch.arange(1, 9), torch.rand(8, generator=torch.Generator().manual_seed(1)) * 4 + 1
    for act_range in module.ACT_RANGES:
        stats = [module._inputs(20, act_range)(8) for _ in range(2)]
        for part in (slice(0, 40), slice(40, 60)):
            stats[0].add(x[part])
            stats[1].add(x[part] / t)
        stats[0].divide(t)
        assert torch.allclose(stats[0].gram.sum, stats[1].gram.sum, rtol=1e-5) and torch.allclose(stats[0].top, stats[1].top)
        assert stats[0].amax() == pytest.approx(stats[1].amax(), rel=1e-6)


# the range of activations


def test_ranges_by_hand():
    # two samples of 200 tokens, 2 channels: maxima 10 and 3, then 4 and 5; the 99th percentile drops the two largest of each
    x = torch.full((400, 2), 0.5)
    x[7], x[30] = torch.tensor([10.0, 3.0]), torch.tensor([2.0, 2.5])
    x[31] = torch.tensor([-1.5, -2.0])
    x[205], x[390] = torch.tensor([-4.0, 5.0]), torch.tensor([1.0, -4.5])

    def amax(act_range, *parts):
        stat = module._inputs(200, act_range)(2)
        for part in parts:
            stat.add(x[part])
        return stat.amax()

    both = (slice(0, 200), slice(200, 400))
    for parts in ((slice(0, 400),), both):
        assert amax("max", *parts) == 10
        assert amax("min_of_max", *parts) == 4  # of channel 0: min(10, 4); of channel 1: min(3, 5)
        assert amax("percentile", *parts) == 2  # of channel 1: the third largest of 3, 2.5, 2.0
    assert amax("max", slice(0, 0), slice(200, 400)) == 5


def test_inputs_that_are_zero_leave_a_range_that_is_not():
    for act_range in module.ACT_RANGES:
        stat = module._inputs(5, act_range)(3)
        stat.add(torch.zeros(10, 3))
        assert stat.amax() > 0
    stat = module._inputs(5, "min_of_max")(3)
    stat.add(torch.cat([torch.zeros(5, 3), torch.ones(5, 3)]))
    assert stat.amax() == 1  # the least maximum is 0


# kernels


CASES = [(1, 64, 256, 64), (3, 33, 200, 32), (17, 80, 72, -1), (33, 48, 600, 256), (16, 20, 128, 128)]


@pytest.mark.parametrize("m,n,k,group", CASES)
def test_kernels_give_the_sums_of_torchs_int8_product(m, n, k, group):
    from blockwright.compress import dgq_triton as kernels

    w, x = randn(n, k, seed=m), randn(99, k)
    weight = quantize(w, x.T @ x, group_size=group)
    w8 = dual_grained.expand(*weight[:3], group_size=group)
    there = type(weight)(*(t.to(DEVICE) for t in weight))
    prepared = kernels.prepare(there, group_size=group)
    assert torch.equal(kernels.expand(prepared).cpu(), w8)
    x16, amax, bias = randn(m, k, seed=4).half(), torch.tensor(2.0), randn(n, seed=5)
    x16[0, :3] = torch.tensor([300.0, -300.0, 2 / 127 / 2])  # clipped, and a tie
    x8 = dual_grained.to_int8(x16, amax)
    sums = x8.long() @ w8.long().T
    for cut in (kernels.Cut(16, 32, 1, 4, 3), kernels.Cut(32, 64, 3, 4, 3), kernels.Cut(16, 16, 50, 4, 3)):
        assert torch.equal(kernels.accumulate(x8.to(DEVICE), prepared, cut).cpu().long(), sums)
    assert torch.equal(torch._int_mm(x8, w8.T).long(), sums) or not torch.cpu._is_vnni_supported()
    want = sums.double() * (weight.channel_scale.double() * (2.0 / 127)) + bias.double()
    for cut in (None, kernels.Cut(16, 32, 1, 4, 3), kernels.Cut(16, 32, 2, 4, 3)):
        got = kernels.multiply(x16.to(DEVICE), prepared, amax.to(DEVICE), bias.to(DEVICE), cut).cpu()
        assert got.dtype == torch.float16 and (got.double() - want).abs().max() <= 1e-3 * want.abs().max()
    plain = kernels.multiply(x16.to(DEVICE), prepared, amax.to(DEVICE)).cpu()
    assert (plain.double() - (want - bias)).abs().max() <= 1e-3 * want.abs().max()
    assert kernels.multiply(x16[:0].to(DEVICE), prepared, amax.to(DEVICE)).shape == (0, n)


def test_many_rows_expand_the_weights_first():
    from blockwright.compress import dgq_triton as kernels

    weight = quantize(randn(24, 80), torch.eye(80), group_size=32)
    stored = DualGrainedLinear.of(nn.Linear(80, 24), weight, 3.0, bits=4, group_size=32).to(DEVICE)
    x = randn(kernels.FUSED_ROWS + 5, 80).half().to(DEVICE)
    assert kernels.cut_for(len(x), 24, 80) is None and kernels.cut_for(1, 24, 80) is not None
    fast = kernels.KernelLinear(stored)
    assert (fast(x).double() - stored(x).double()).abs().max() <= 1e-3 * stored(x).abs().max().double()
    assert fast(x.view(3, 87, 80)).shape == (3, 87, 24)


@pytest.mark.parametrize("bits,group,fits", [(4, 64, True), (4, -1, True), (4, 96, False), (4, 16, False), (8, 64, False), (4, 500, True)])
def test_what_the_kernels_are_made_for(bits, group, fits):
    from blockwright.compress import dgq_triton as kernels

    weight = quantize(randn(8, 200), torch.eye(200), bits=bits, group_size=group)
    stored = DualGrainedLinear.of(nn.Linear(200, 8), weight, 3.0, bits=bits, group_size=group)
    assert kernels.KernelLinear.fits(stored) is fits


# the stage


def heard(model, names, tokens):
    """The inputs of named linears, [n, T, K], from one pass of the whole model."""
    seen, handles = {}, []
    for name in names:
        hook = lambda m, args, name=name: seen.__setitem__(name, args[0].detach())  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def treated(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DualGrainedLinear)}


def dense_weight(m):
    return m.weight if isinstance(m, nn.Linear) else m.weight.T


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "options", [{"smooth": False}, {"act_range": "max", "group_size": 32}, {"act_range": "min_of_max", "bits": 8}], ids=str
)
def test_every_linear_is_rounded_by_what_it_hears_from_the_rounded_blocks_before(name, options):
    model = made(name)
    result = dgq(model, calibration=ids(), **options)
    group, bits, smooth = options.get("group_size", 64), options.get("bits", 4), options.get("smooth", True)
    new = treated(result)
    path = next(n for n in new).split(".0.")[0]
    assert len(new) == 2 * len([n for n in new if n.startswith(f"{path}.0.")])
    so_far = copy.deepcopy(result)  # blocks before the one that is looked at as they became, that one as it was
    for i in (1, 0):
        so_far.get_submodule(path)[i] = copy.deepcopy(model.get_submodule(path)[i])
        mine = [n for n in new if n.startswith(f"{path}.{i}.")]
        for linear, x in heard(so_far, mine, ids()).items():
            w = dense_weight(model.get_submodule(linear)).detach()
            source = next((s for s, r in PAIRS[name].items() if last(linear) in r), None)
            t = torch.ones(x.shape[-1])
            if smooth and source:
                top = x.abs().amax((0, 1))
                t = (top / top.sort(descending=True).values[int(0.005 * len(top) + 1.5) - 1]).clamp(min=1)
            x, w = x / t, w * t
            if smooth and (readers := PAIRS[name].get(last(linear))):  # its own rows were divided
                [reader] = [n for n in mine if last(n) in readers and n.rpartition(".")[0] == linear.rpartition(".")[0]]
                top = heard(so_far, [reader], ids())[reader].abs().amax((0, 1))
                w = w / (top / top.sort(descending=True).values[int(0.005 * len(top) + 1.5) - 1]).clamp(min=1)[:, None]
            flat = x.flatten(0, 1).double()
            weight = quantize(w.double(), flat.T @ flat, bits=bits, group_size=group)
            ours = new[linear].dequantize()
            close = torch.isclose(ours, restored(weight, group).float(), rtol=1e-4, atol=1e-5)
            assert close.double().mean() > 0.98, linear  # a tie may fall the other way in fp32
            per_sample = x.abs().amax(1)
            if options.get("act_range") == "max":
                assert new[linear].amax.item() == per_sample.max().bfloat16().item()
            elif options.get("act_range") == "min_of_max":
                assert new[linear].amax.item() == per_sample.amin(0).max().bfloat16().item()
            else:
                ratio = math.log2(per_sample.max().item() / new[linear].amax.item()) * 4
                assert abs(ratio - round(ratio)) < 0.05 and 0 <= round(ratio) < 16
            bias = model.get_submodule(linear).bias
            if bias is not None and not (smooth and last(linear) in PAIRS[name]):
                assert torch.equal(new[linear].bias, bias)
    for n, p in model.named_parameters():
        if not n.startswith(path):
            assert torch.equal(p, result.get_parameter(n))


@pytest.mark.parametrize("name", MODELS)
def test_a_treated_model_says_much_the_same_and_so_does_its_fast_form(name):
    model = made(name)
    result = dgq(model, calibration=ids(), bits=8)
    with torch.no_grad():
        dense, rounded = model(ids()).logits, result(ids()).logits
        fast = module.accelerate(copy.deepcopy(result))
        assert not treated(fast) and any(isinstance(m, dual_grained.Int8Linear) for m in fast.modules())
        assert (rounded - dense).norm() / dense.norm() < 0.25  # int8 weights and activations, and a channel that is 12 times the others
        assert torch.equal(fast(ids()).logits, rounded)
        assert not torch.equal(dgq(model, calibration=ids())(ids()).logits, rounded)


def test_smoothing_helps_where_there_are_outliers():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=320, intermediate_size=64, num_key_value_heads=2, **COMMON)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[7] *= 60  # one of 320 channels: above the percentile
            layer.post_attention_layernorm.weight[9] *= 60
        dense = model(ids()).logits
        error = {
            s: float((dgq(model, calibration=ids(), smooth=s, act_range="max", bits=8)(ids()).logits - dense).norm()) for s in (True, False)
        }
    assert error[True] < 0.6 * error[False]


def test_shared_blocks_stay_consistent():
    shared = Blueprint.of_module(made("llama")).with_shared({1: 0}, lambda name: "norm" in name)
    run = Run(shared, calibration=ids())
    dgq(run, smooth=True)
    model = run.model.build()
    for name, p in made("llama").named_parameters():
        if "norm" in name:
            assert torch.equal(model.get_parameter(name), p), name  # its readers are another block's too
    a, b = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    assert isinstance(b, DualGrainedLinear) and torch.equal(a.weight_packed, b.weight_packed) and a.amax == b.amax


def test_targets_and_ignore_say_what_is_treated():
    model = made("llama")
    result = dgq(model, calibration=ids(), targets=["re:mlp"], ignore=["down_proj"])
    assert {last(n) for n in treated(result)} == {"gate_proj", "up_proj"}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert torch.equal(result.model.layers[0].get_submodule(name).weight, model.model.layers[0].get_submodule(name).weight)
    assert torch.equal(result.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_one_token_and_bf16_and_dead_channels():
    model = made("llama").bfloat16()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        model.model.layers[0].input_layernorm.weight[9] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    result = dgq(model, calibration=ids(1, 1), act_range="percentile")
    logits = result(ids(1, 1)).logits
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())
    assert not bool(treated(result)["model.layers.0.mlp.up_proj"].int8_weight()[3].any())
    assert not bool(treated(result)["model.layers.1.self_attn.o_proj"].int8_weight().any())


# files


def folder_of(model, path, layout="auto", dtype=torch.float32):
    path.mkdir(exist_ok=True)
    return export.write(Blueprint.of_module(model), path, source=path, layout=layout, dtype=dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_layout_holds_the_very_weights(tmp_path, name, dtype):
    result = dgq(made(name), calibration=ids(), group_size=40)
    assert folder_of(result, tmp_path, dtype=dtype) == "blockwright"
    again = bw.load(tmp_path, dtype=dtype, fast=False, check=False)
    mine, theirs = treated(result), treated(again)
    assert mine.keys() == theirs.keys() and mine
    for n, m in mine.items():
        assert torch.equal(m.int8_weight(), theirs[n].int8_weight()) and m.amax == theirs[n].amax.float()
        assert torch.equal(m.channel_weight_scale, theirs[n].channel_weight_scale)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(again(ids()).logits, result(ids()).logits)
            assert torch.equal(bw.load(tmp_path, dtype=dtype, check=False)(ids()).logits, result(ids()).logits)


def test_a_stored_range_of_zero_is_refused(tmp_path):
    result = dgq(made("llama"), calibration=ids())
    treated(result)["model.layers.1.mlp.up_proj"].amax.zero_()
    folder_of(result, tmp_path)
    with pytest.raises(BlockwrightError, match=r"model\.layers\.1\.mlp\.up_proj\.amax: 0\.0\. Allowed: positive"):
        bw.load(tmp_path, check=False)


def weights_alone(result):
    """The model with the restored weights in dense linears: 16-bit activations."""
    model = copy.deepcopy(result)
    for name, m in treated(model).items():
        linear = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
        linear.weight.data, linear.bias = restored(m.weight(), m.group_size).float(), m.bias
        model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["standard", "dense", "unrolled"])
def test_other_layouts_open_in_plain_transformers_with_16_bit_activations(tmp_path, name, layout):
    result = dgq(made(name), calibration=ids(), group_size=32)
    assert folder_of(result, tmp_path, layout) == "standard"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        want = weights_alone(result)(ids()).logits
        assert torch.allclose(again(ids()).logits, want, rtol=1e-4, atol=1e-4)
    if layout == "standard":
        packed = module.weight_only(Blueprint.of_module(result)).build()
        for n, m in treated(result).items():
            assert torch.allclose(packed.get_submodule(n).dequantize(), m.dequantize(), rtol=1e-6, atol=0)
        size = export.predicted_bytes(Blueprint.of_module(result), torch.float32, layout)
        assert size == sum(t.numel() * t.element_size() for t in packed.state_dict().values())


def test_a_standard_layout_without_place_for_short_groups_is_refused(tmp_path):
    result = dgq(made("llama"), calibration=ids(), group_size=40)
    with pytest.raises(BlockwrightError, match="groups of 40 do not divide"):
        folder_of(result, tmp_path, "standard")
    assert folder_of(result, tmp_path, "dense") == "standard"


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_w8a8_is_the_same_product_in_compressed_tensors(tmp_path, name):
    result = dgq(made(name), calibration=ids(), group_size=40)
    w8a8.write(Blueprint.of_module(result), tmp_path, source=tmp_path, dtype=torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    for n, m in treated(result).items():
        assert stored[f"{n}.weight"].dtype == torch.int8
        assert torch.equal(stored[f"{n}.weight"].float() * stored[f"{n}.weight_scale"], m.dequantize())
        assert torch.equal(stored[f"{n}.input_scale"][0] * 127, m.amax) or stored[f"{n}.input_scale"][0] == m.amax / 127
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        want, alone = result(ids()).logits, weights_alone(result)(ids()).logits
        got = again(ids()).logits
    assert (got - want).norm() < 0.02 * want.norm() < (alone - want).norm()  # activations are rounded there too
    with pytest.raises(BlockwrightError, match="already quantised"):
        bw.load(tmp_path, check=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_w8a8_is_refused_where_it_has_no_place(tmp_path, name):
    model = made(name) if name == "llama" else dgq(made(name), calibration=ids())
    with pytest.raises(BlockwrightError, match=r"export=w8a8: .*Allowed: dual-grained linears"):
        w8a8.write(Blueprint.of_module(model), tmp_path, source=tmp_path)


def test_gguf_keeps_the_codes(monkeypatch):
    packed = module.weight_only(Blueprint.of_module(dgq(made("llama"), calibration=ids(), group_size=32)))
    built = packed.build()
    kinds = {gguf.on_grid(m)[0].name for m in built.modules() if type(m).__name__ == "PackedLinear"}
    assert kinds == {"Q4_1"}


def test_as_a_stage_of_a_recipe(small_job, tmp_path, monkeypatch):
    small_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = {"num": 4, "length": 32}
    made = bw.run(
        {
            "model": "model", "stages": [{"dgq": {"group_size": 32}}], "out": "cheaper", "dtype": "fp32", "measure": {"use": False},
            "calibration": {"text": "learn.txt", **text}, "evaluation": {"text": "judge.txt", **text},
        }
    )  # fmt: skip
    assert made["result"]["layout"] == "blockwright" and made["result"]["perplexity"] > 1
    part = next(p for p in made["blocks"][0]["parts"] if p["name"].endswith("up_proj"))
    assert part["treatment"] == "int4 g32, int8 inputs" and part["bits"] < 4.375 + 32 / 64 + 0.1
    tokens = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slow, fast = (bw.load("cheaper", dtype=torch.float32, fast=f)(tokens).logits for f in (False, True))
        assert torch.equal(slow, fast)
        direct = dgq(LlamaForCausalLM.from_pretrained("model"), calibration=tokens)
    assert treated(direct).keys() == treated(bw.load("cheaper", fast=False)).keys()
    served = convert("cheaper", "served", to="w8a8")
    assert served["layout"] == "w8a8" and served["bytes"] == (tmp_path / "served" / "model.safetensors").stat().st_size
    assert AutoModelForCausalLM.from_pretrained("served").config.quantization_config.quantization_config.format == "int-quantized"
    with pytest.raises(BlockwrightError, match=r"dgq leaves dual-grained ones"):
        bw.run({"model": "model", "stages": ["dgq", "finequant"], "out": "other", "calibration": {"text": "learn.txt", **text}})


# refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"group_size": 0}, r"group_size=0\. Allowed: a positive number"),
        ({"group_size": -2}, r"group_size=-2"),
        ({"targets": ["nothing"]}, r"targets=\['nothing'\].* name no linear.*down_proj"),
        ({"ignore": ["Linear"]}, r"name no linear"),
        ({"group_size": 40, "pad": False}, r"q_proj: group_size 40 does not divide in_features 64\. Use 64, or pad=True"),
        ({"group_size": 64, "pad": False}, r"down_proj: group_size 64 does not divide in_features 96\. Use 32, or pad=True"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_work(options, said):
    run = Run(Blueprint.of_module(llama()), calibration=ids(), progress=lambda *a: pytest.fail("it began to work"))
    with pytest.raises(BlockwrightError, match=said):
        dgq(run, **options)


@pytest.mark.parametrize(
    "changes, said", [({"bits": 3}, r"bits=3\. Allowed: 4, 8"), ({"act_range": "mean"}, r"'mean'\. Allowed: max, min_of_max, percentile")]
)
def test_a_misspelt_choice_is_refused(changes, said):
    with pytest.raises(BlockwrightError, match=said):
        module._check(**{"bits": 4, "group_size": 64, "act_range": "max"} | changes)


def test_pad_false_is_fine_where_groups_divide():
    assert len(treated(dgq(made("llama"), calibration=ids(), group_size=32, pad=False))) == 14


def test_no_tokens_are_refused():
    with pytest.raises(BlockwrightError, match="no samples"):
        dgq(llama(), calibration=ids()[:0])


def test_a_linear_that_hears_nothing_is_told_with_its_name(monkeypatch):
    observe = Block.observe
    monkeypatch.setattr(Block, "observe", lambda self, x, make, linears: observe(self, x[:0], make, linears))
    with pytest.raises(BlockwrightError, match=r"model\.layers\.0\.self_attn\.q_proj was given no tokens.*add 'model.*' to ignore"):
        dgq(llama(), calibration=ids())


def test_inputs_that_are_not_finite_are_told_with_their_linear():
    model = made("llama")

    def poison(block, x, y, rng):
        x = x.clone()
        x[1, 2, 3] = float("nan")
        with pytest.raises(BlockwrightError, match=rf"model\.layers\.{block.index}"):
            block.observe(x, module._inputs(16, "max"))

    Run(Blueprint.of_module(model), calibration=ids()).blocks(poison, inputs="dense")
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight.mul_(1e25)
    with pytest.raises(BlockwrightError, match=r"model\.layers\.0"):
        dgq(model, calibration=ids())
    with pytest.raises(BlockwrightError, match=r"up: nan"):
        quantize(torch.tensor([[1.0, float("nan")]]), torch.eye(2), name="up")


def test_the_plan_counts_both_grains():
    options = dict(bits=4, group_size=128, pad=True, smooth=True, act_range="max", targets=["Linear"], ignore=[])
    cost = plan(block_parameters=10_000_000, tokens=4096, **options)
    assert cost["bits"] == 4.09375 and plan(block_parameters=10, tokens=1, **options | {"group_size": -1})["bits"] == 4
    with pytest.raises(BlockwrightError, match="bits=5"):
        plan(block_parameters=10, tokens=1, **options | {"bits": 5})


# the claim


def test_the_claim_of_the_gpu_multiplies_right(monkeypatch):
    from blockwright.claims import dgq as claim

    monkeypatch.setattr(claim, "DEVICE", DEVICE)
    monkeypatch.setattr(meter, "COLD_BYTES", 1)
    monkeypatch.setattr(meter, "graph_microseconds", lambda calls, number: float(calls[0]().shape[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = claim._products(256, 64, (3, 70))
    assert [row["rows"] for row in rows] == [3, 70] and all(row["x_bf16"] == row["x_int_mm"] == 1 for row in rows)
