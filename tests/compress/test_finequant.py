"""finequant: grids and choices against plain Python, products against fp64, small models of five families, refusals."""

import itertools
import math
import warnings

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import tiles
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.compress import finequant as fq
from blockwright.compress.finequant import choose_group_size, finequant, matmul, quantize, quantize_experts
from blockwright.errors import BlockwrightError
from blockwright.recipes import export

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.float16  # bf16 is silently wrong in Triton's interpreter
quick = settings(deadline=None, max_examples=25)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(w, *, bits, group_size, formula="centred", dtype=torch.bfloat16):
    """Codes and scales of a list of rows, one number at a time."""
    codes, scales = [], []
    for row in w.tolist():
        g = len(row) if group_size == -1 else group_size
        groups = [row[i : i + g] for i in range(0, len(row), g)]
        scale = []
        for group in groups:
            top = max(abs(v) for v in group)
            s = torch.tensor(top or (2**bits - 1) / 2) * (2 / (2**bits - 1) if formula == "centred" else 0.5 ** (bits - 1))
            scale.append((s if top else torch.tensor(1.0)).to(dtype).item())
        q = [round(v / s) for group, s in zip(groups, scale, strict=True) for v in group]  # Python too rounds halves to even
        codes.append([max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, v)) for v in q])
        scales.append(scale)
    return codes, scales


def restored(w, *, bits=4, group_size=64, formula="centred"):
    """The weights after quantisation, by an expression that shares nothing with the method."""
    g = w.shape[1] if group_size == -1 else group_size
    parts = []
    for part in w.float().split(g, dim=1):
        top = part.abs().amax(1, keepdim=True)
        s = (top * (2 / (2**bits - 1)) if formula == "centred" else top / 2 ** (bits - 1)).bfloat16().float()
        parts.append(torch.clamp(torch.round(part / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s)
    return torch.cat(parts, 1)


# grids and packing


def test_one_row_by_hand():
    codes, scale = quantize(torch.tensor([[-7.5, 7.5, 1.2, 0.0] + [0.0] * 12 + [0.0] * 16 + [2.5]]), group_size=16)
    assert scale.tolist() == [[1, 1, 1 / 3 - 1 / 3 + torch.tensor(5 / 15).bfloat16().item()]]  # |max| 7.5: 1; zeros: 1; 2.5: 1/3 in bf16
    assert codes.tolist() == [[-8, 7, 1, 0] + [0] * 12 + [0] * 16 + [7]]  # halves go to even, then 8 is clamped to 7
    codes, scale = quantize(torch.tensor([[-8.0, 8.0, 1.4] + [0.0] * 13]), group_size=-1, formula="full")
    assert scale.tolist() == [[1]] and codes.tolist() == [[-8, 7, 1] + [0] * 13]


@quick
@given(
    n=st.integers(1, 3), k=st.integers(1, 70), group=st.sampled_from([-1, 16, 32, 64]), bits=st.sampled_from([3, 4, 5, 6, 8]),
    formula=st.sampled_from(["centred", "full"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_and_scales_follow_the_formula(n, k, group, bits, formula, seed):
    w = randn(n, k, seed=seed)
    before = w.clone()
    codes, scale = quantize(w, bits=bits, group_size=group, formula=formula)
    want_codes, want_scale = by_formula(w, bits=bits, group_size=group, formula=formula)
    assert scale.dtype == torch.bfloat16 and scale.tolist() == want_scale and torch.equal(w, before)
    assert (codes - torch.tensor(want_codes)).abs().max() <= 1  # fp32 and Python may break a near tie differently
    assert (codes == torch.tensor(want_codes)).float().mean() > 0.98
    s = torch.tensor(want_scale).repeat_interleave(k if group == -1 else group, 1)[:, :k]
    error, clamped = (w - codes * s).abs(), (codes == -(2 ** (bits - 1))) | (codes == 2 ** (bits - 1) - 1)
    rounded_scale = 2 ** (bits - 1) * 2**-8  # steps by which bf16 moves the end of the grid
    assert bool((error <= s * torch.where(clamped, (1.0 if formula == "full" else 0.5) + rounded_scale, 0.5 + 1e-5)).all())


@quick
@given(power=st.integers(-20, 20), k=st.integers(1, 130), group=st.sampled_from([-1, 32, 64]))
def test_a_power_of_two_scales_only_the_scales(power, k, group):
    w = randn(3, k)
    codes, scale = quantize(w, group_size=group)
    codes2, scale2 = quantize(w * 2.0**power, group_size=group)
    assert torch.equal(codes, codes2) and torch.equal(scale.float() * 2.0**power, scale2.float())


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("k", [1, 16, 35, 64])
def test_packing_is_that_of_compressed_tensors(bits, k):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.arange(low, high + 1).repeat(5 * k)[: 3 * k].view(3, k).to(torch.int8)
    assert torch.equal(tiles.unpack(tiles.pack(codes, bits), bits, k), codes)
    assert torch.equal(tiles.pack(codes, bits), pack_to_int32(codes, bits))


# products


def product(m, n, k, group, bits, dtype, *, cut=None, bias=True, device=DEVICE):
    """The kernel's answer and fp64's, and what the kernel is called with."""
    from blockwright.compress import finequant_triton as kernels

    codes, scale = quantize(randn(n, k, seed=n), bits=bits, group_size=group)
    w = codes.double() * scale.double().repeat_interleave(k if group == -1 else group, 1)[:, :k]
    x, b = randn(m, k, seed=m).to(dtype), randn(n, seed=7) if bias else None
    want = x.double() @ w.T + (0 if b is None else b.double())
    weight = kernels.prepare(codes.to(device), scale.to(device), bits=bits, group_size=group)

    def run():
        return kernels.multiply(x.to(device), weight, None if b is None else b.to(device), cut)

    return run, want, kernels, weight, w


def close(got, want, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    return got.dtype == dtype and bool((got.cpu().double() - want).abs().max() <= tolerance * want.abs().max())


CASES = [  # every M, K, N, group and width of the kernels at least once, small enough for the interpreter
    (1, 80, 64, 32, 4), (3, 1, 512, 64, 4), (16, 33, 1000, 128, 4), (17, 80, 64, -1, 8), (64, 20, 512, 32, 8), (129, 12, 200, 64, 4),
    (1, 20, 1000, 64, 8), (3, 80, 1000, -1, 4), (16, 1000, 64, 16, 4), (129, 8, 64, 32, 8), (64, 40, 200, 256, 4), (16, 9, 600, 256, 4),
]  # fmt: skip
GRID = list(itertools.product([1, 3, 16, 17, 64, 129], [1, 80, 1000], [64, 512, 1000], [32, 64, 128, -1], [4, 8]))


@pytest.mark.parametrize("m,n,k,group,bits", GRID if CUDA else CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float16])
def test_the_kernel_multiplies_by_codes_and_scales(m, n, k, group, bits, dtype):
    run, want, _, _, _ = product(m, n, k, group, bits, dtype, bias=m != 3)
    first = run()
    assert close(first, want, dtype)
    assert torch.equal(first, run())  # no sum depends on the order in which programs end


@pytest.mark.parametrize("bits,group", [(4, 64), (4, -1), (8, 32)])
@pytest.mark.parametrize("cut", [(16, 32, 3, 4, 3, True), (16, 64, 50, 4, 3, False), (32, 16, 1, 4, 3, False), (16, 16, 2, 4, 3, True)])
def test_every_cut_gives_the_same_product(bits, group, cut):
    from blockwright.compress import finequant_triton as kernels

    cut = kernels.Cut(*cut)
    dtype = HALF if CUDA else torch.float32
    run, want, _, _, _ = product(19, 50, 400, group, bits, dtype, cut=cut._replace(outputs=64) if CUDA else cut)
    assert close(run(), want, dtype)


@pytest.mark.parametrize("bits,group,k", [(4, 64, 200), (4, -1, 72), (8, 128, 300), (4, 16, 40)])
def test_many_rows_go_through_dense_slices(bits, group, k):
    run, want, kernels, weight, w = product(530, 300, k, group, bits, HALF)
    assert close(run(), want, HALF) and kernels.cut_for(530, 300, k, bits) == kernels.SLICE_BYTES
    run, want, _, _, _ = product(20, 300, k, group, bits, HALF, cut=2 * k * 128)  # three slices
    assert close(run(), want, HALF)
    assert torch.equal(kernels.dense(weight, torch.float32).cpu().double(), w)
    assert torch.equal(kernels.dense(weight, HALF, 7, 101).cpu(), w[7:101].half())


@pytest.mark.parametrize("bits,group", [(3, 32), (4, 64), (4, -1), (5, 16), (6, 128), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_backends_agree_with_fp64_on_any_x(bits, group, dtype):
    k, n = 100, 24
    codes, scale = quantize(randn(n, k), bits=bits, group_size=group)
    packed = tiles.pack(codes, bits)
    w = torch.tensor(by_formula(randn(n, k), bits=bits, group_size=group)[1]).double()
    w = codes.double() * w.repeat_interleave(k if group == -1 else group, 1)[:, :k]
    bias = randn(n, seed=3)
    backends = ["auto", "reference", "torch"] + ["triton"] * (bits in (4, 8) and (CUDA or dtype != torch.bfloat16))
    wide = randn(2, 3, 2 * k).to(dtype)
    for backend, x in itertools.product(backends, [wide[..., :k], wide[0, :1, :k], wide[:0, :, :k], wide[..., ::2]]):
        for b in (None, bias):
            y = matmul(x, packed, scale, bits=bits, group_size=group, bias=b, backend=backend)
            want = x.double() @ w.T + (0 if b is None else b.double())
            assert y.shape == want.shape and y.dtype == dtype
            assert not y.numel() or close(y, want, dtype)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_gradient_goes_to_x_and_bias_and_never_to_w(backend):
    codes, scale = quantize(randn(12, 40), group_size=32)
    w = torch.tensor(by_formula(randn(12, 40), bits=4, group_size=32)[1]).repeat_interleave(32, 1)[:, :40] * codes
    x, bias, dy = randn(5, 40, seed=1).requires_grad_(), randn(12, seed=2).requires_grad_(), randn(5, 12, seed=3)
    y = matmul(x, tiles.pack(codes, 4), scale.requires_grad_(), bits=4, group_size=32, bias=bias, backend=backend)
    y.backward(dy)
    assert torch.allclose(x.grad, dy @ w, rtol=1e-5, atol=1e-5) and torch.allclose(bias.grad, dy.sum(0), rtol=1e-6)
    assert scale.grad is None


def test_a_kernel_asked_for_on_a_cpu_gives_the_reference_and_warns_once(monkeypatch):
    monkeypatch.setattr(fq, "_interpreted", lambda: False)
    fq._warn_once.cache_clear()
    codes, scale = quantize(randn(12, 40), group_size=32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ys = [matmul(randn(3, 40), tiles.pack(codes, 4), scale, bits=4, group_size=32, backend="triton") for _ in range(3)]
    assert [str(w.message)[:9] for w in seen] == ["finequant"]
    want = matmul(randn(3, 40), tiles.pack(codes, 4), scale, bits=4, group_size=32, backend="reference")
    assert all(torch.equal(y, want) for y in ys)


def test_what_matmul_refuses():
    codes, scale = quantize(randn(12, 40), group_size=32)
    packed = tiles.pack(codes, 4)
    with pytest.raises(BlockwrightError, match=r"x is torch.float64. Allowed: expects fp16/bf16/fp32"):
        matmul(randn(3, 40).double(), packed, scale, bits=4, group_size=32)
    with pytest.raises(BlockwrightError, match=r"x has 64 inputs, W 5 words and 2 scales a row. Allowed: 8 words and 2 scales"):
        matmul(randn(3, 64), packed, scale, bits=4, group_size=32)
    with pytest.raises(BlockwrightError, match="1 scales for 40"):
        matmul(randn(3, 40), packed, scale, bits=4, group_size=-1)
    with pytest.raises(BlockwrightError, match="no kernel for 5 bits. Allowed: 4, 8"):
        matmul(randn(3, 40), tiles.pack(codes, 5), scale, bits=5, group_size=32, backend="triton")


def test_quant_linear_from_float_for_linear_and_conv1d():
    for dense in (nn.Linear(96, 20), nn.Linear(96, 20, bias=False), Conv1D(20, 96)):
        weight = (dense.weight.T if isinstance(dense, Conv1D) else dense.weight).detach()
        with torch.no_grad():
            weight.copy_(randn(20, 96))
        module = fq.QuantLinear.from_float(dense, group_size=32).to(DEVICE)
        w = restored(randn(20, 96), group_size=32)
        x = randn(2, 3, 96, seed=5).half().requires_grad_()
        y = module(x.to(DEVICE)).cpu()
        assert close(y.flatten(0, 1), (x.double() @ w.double().T + (0 if dense.bias is None else dense.bias.double())).flatten(0, 1), HALF)
        y.sum().backward()
        assert torch.allclose(x.grad, w.sum(0).half().expand(2, 3, 96), rtol=1e-2, atol=1e-2)
        assert torch.equal(module.dequantize().cpu(), w)
    with pytest.raises(BlockwrightError, match="QuantLinear: bits=3. Allowed: 4, 8"):
        fq.QuantLinear.from_float(nn.Linear(96, 20), bits=3)


def test_a_measured_cut_is_used_for_its_product_only(monkeypatch):
    from blockwright.compress import finequant_triton as kernels

    monkeypatch.setitem(kernels.TUNED, (32, 80, 96, 4), kernels.Cut(16, 16, 3, 4, 2, False))
    assert [kernels.cut_for(m, 80, 96, 4) == kernels.TUNED[32, 80, 96, 4] for m in (16, 17, 32, 33)] == [False, True, True, False]
    assert kernels.cut_for(20, 80, 96, 8) != kernels.TUNED[32, 80, 96, 4] != kernels.cut_for(20, 96, 80, 4)


# the choice of a group size


def planted(w, sigmas=50.0):
    w = w.clone()
    rows = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))[: len(w) // 20]
    w[rows, torch.randint(0, w.shape[1], (len(rows),), generator=torch.Generator().manual_seed(2))] = sigmas
    return w


def test_gaussian_weights_keep_a_coarse_group_and_outliers_drive_it_down():
    for k, spiky in ((576, 32), (1024, 32), (4096, 64)):  # one outlier in 4096 weights is worth less
        w = randn(400, k, seed=k)
        assert choose_group_size(w) in (-1, 128) and choose_group_size(planted(w)) == spiky
    one = randn(3000, 576)
    one[3, 5] = 20.0  # a single outlier in a single output
    assert choose_group_size(one, alpha=2.5) == -1 and choose_group_size(one, alpha=2.5, reduce="max") == 32
    assert choose_group_size(randn(400, 1024), alpha=0.01) == 32 and choose_group_size(randn(400, 1024), alpha=100.0) == -1
    assert choose_group_size(randn(400, 1024), alpha=1.2, scale_bits=16) < choose_group_size(randn(400, 1024), alpha=1.2, scale_bits=32)


@quick
@given(power=st.integers(-30, 30), k=st.sampled_from([32, 64, 96, 100, 128, 384, 576]), seed=st.integers(0, 9))
def test_the_choice_ignores_the_unit_of_the_weights(power, k, seed):
    w = randn(6, k, seed=seed) ** 3
    g = choose_group_size(w)
    assert choose_group_size(w * 2.0**power) == g and (g == -1 or (g in (128, 64, 32) and k % g == 0 and g < k))


def test_the_choice_follows_its_rule_number_by_number():
    w = randn(3, 256, seed=4) ** 3

    def ranges(row, g):
        return [max(abs(v) for v in row[i : i + g]) for i in range(0, len(row), g)]

    for reduce, alpha in itertools.product(("mean", "max"), (0.3, 0.8, 1.3, 2.0, 3.0, 4.0)):
        want, width = -1, 256
        for finer in (128, 64, 32):
            squares = [[(ranges(row, width)[i * finer // width] / r) ** 2 for i, r in enumerate(ranges(row, finer))] for row in w.tolist()]
            rows = [sum(s) / len(s) for s in squares]
            won = 0.5 * math.log2(max(rows) if reduce == "max" else sum(rows) / 3)
            if won < alpha * (16 / finer - 16 / width):
                break
            want, width = finer, finer
        assert choose_group_size(w, alpha=alpha, reduce=reduce) == want


def test_zeros_ask_for_nothing():
    w = torch.zeros(4, 256)
    assert choose_group_size(w) == -1
    w[:, 128:] = torch.tensor([1.0, -1.0]).repeat(64)
    assert choose_group_size(w) == -1  # half a row of zeros: they are on every grid


def test_a_finer_group_errs_less():
    def error(g):
        return sum(float((w - restored_by_method(w, g)).square().sum()) for w in (randn(64, 512, seed=i) for i in range(4)))

    def restored_by_method(w, g):
        codes, scale = quantize(w, group_size=g)
        return tiles.from_codes(codes, scale, group_size=g)

    errors = [error(g) for g in (-1, 256, 128, 64, 32, 16)]
    assert all(fine <= 1.001 * coarse for coarse, fine in itertools.pairwise(errors)) and errors[-1] < 0.7 * errors[0]


# experts


def test_experts_together_are_as_each_alone():
    w = randn(4, 10, 96)
    for g in (32, 64, -1):
        codes, scale, used = quantize_experts(w, group_size=g)
        for e in range(4):
            alone = quantize(w[e], group_size=g)
            assert torch.equal(codes[e], alone[0]) and torch.equal(scale[e], alone[1]) and used == g
    spiky = torch.stack([planted(randn(80, 256, seed=i)) if i == 2 else randn(80, 256, seed=i) for i in range(3)])
    codes, scale, used = quantize_experts(spiky, group_size="adaptive", bits=8, scale_dtype=torch.float32)
    assert used == choose_group_size(spiky.flatten(0, 1), scale_bits=32) and scale.shape == (3, 80, 1 if used == -1 else 256 // used)
    assert torch.equal(codes[1], quantize(spiky[1], bits=8, group_size=used, scale_dtype=torch.float32)[0])


# the stage, on small models


def models():
    torch.manual_seed(0)
    small = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=4)
    return {
        "llama": LlamaForCausalLM(
            LlamaConfig(**small, hidden_size=64, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**small, hidden_size=64, intermediate_size=96)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**small, hidden_size=64, intermediate_size=128, num_key_value_heads=2)),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(**small, hidden_size=64, intermediate_size=96, num_key_value_heads=2, num_local_experts=3)
        ),
    }


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


def with_restored(model, **options):
    """The dense model whose block linears hold what quantisation leaves of their weights."""
    with torch.no_grad():
        for m in blocks_of(model).modules():
            if isinstance(m, Conv1D):
                m.weight.copy_(restored(m.weight.T, **options).T)
            elif isinstance(m, nn.Linear):
                m.weight.copy_(restored(m.weight, **options))
    return model


IDS = torch.arange(24).view(2, 12) * 7 % 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"bits": 3, "group_size": 32}, {"bits": 8, "group_size": -1, "formula": "full"}])
def test_a_model_computes_with_the_restored_weights_of_its_block_linears(family, options):
    model = models()[family].eval()
    cheaper = finequant(model, **options)
    packed = {n: m for n, m in cheaper.named_modules() if isinstance(m, PackedLinear)}
    dense = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "head" not in n and "embed_out" not in n}
    assert packed.keys() == dense and all(m.bits == options.get("bits", 4) for m in packed.values())
    assert cheaper.get_output_embeddings().weight.dtype == torch.float32  # the head, tied or not, stays as it is
    with torch.no_grad():
        want = with_restored(models()[family].eval(), **options)(IDS).logits
        assert torch.allclose(cheaper(IDS).logits, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


def llama(**changes):
    torch.manual_seed(1)
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def schemes(model):
    return {n.split("layers.")[1]: (m.bits, m.group_size) for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def test_overrides_targets_and_ignore_say_what_is_treated_how():
    model = llama(num_hidden_layers=2)
    cheaper = finequant(
        model, bits=4, group_size=32, targets=["re:proj$"], ignore=["o_proj"],
        overrides={"down_proj": {"bits": 8, "group_size": -1}, "model.layers.1": {"bits": 3},
                   "re:1.*v_proj": {"group_size": "adaptive", "alpha": 90}},
    )  # fmt: skip
    found = schemes(cheaper)
    for i, part in itertools.product((0, 1), ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")):
        bits = 3 if i else 8 if "down" in part else 4
        group = -1 if "down" in part or (i and "v_proj" in part) else 32
        assert found[f"{i}.{part}"] == (bits, group), (i, part)
    assert not any("o_proj" in n for n in found) and len(found) == 12


def test_adaptive_follows_the_choice_of_each_matrix():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.copy_(planted(randn(256, 128)))
    found = schemes(finequant(model, group_size="adaptive"))
    want = {
        n.split("layers.")[1]: (4, choose_group_size(m.weight))
        for n, m in model.named_modules()
        if "layers.0" in n and isinstance(m, nn.Linear)
    }
    assert found == want and found["0.mlp.gate_proj"] == (4, 32) and found["0.mlp.up_proj"] != (4, 32)


def test_scales_are_stored_in_their_dtype_and_codes_use_the_stored_one():
    model = llama()
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        m = finequant(model, scale_dtype=name).model.layers[0].mlp.up_proj
        scale = torch.tensor(by_formula(model.model.layers[0].mlp.up_proj.weight, bits=4, group_size=64, dtype=dtype)[1])
        assert m.weight_scale.dtype == dtype and torch.equal(m.weight_scale.float(), scale)
        w = model.model.layers[0].mlp.up_proj.weight
        assert ((m.dequantize() - w).abs() / scale.repeat_interleave(64, 1)).flatten().quantile(0.9) <= 0.5 + 1e-5


def test_a_budget_is_met_and_no_cheaper_choice_errs_less():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(planted(randn(128, 256)) * 0.02)
    linears = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    errors, bits = [], []
    for w in linears.values():
        sizes = [g for g in (-1, 128, 64, 32) if g < w.shape[1]]
        errors.append([float((w - restored(w, group_size=g)).square().sum() / w.square().sum()) for g in sizes])
        bits.append([w.numel() * 4 + 16 * w.numel() // (w.shape[1] if g == -1 else g) for g in sizes])
    total = sum(w.numel() for w in linears.values())
    for limit in (4.15, 4.25, 4.4):
        best = min(
            sum(e[i] for e, i in zip(errors, picks, strict=True))
            for picks in itertools.product(*(range(len(e)) for e in errors))
            if sum(b[i] for b, i in zip(bits, picks, strict=True)) <= limit * total
        )
        cheaper = finequant(model, bits_per_weight=limit)
        mine = {n: m for n, m in cheaper.named_modules() if isinstance(m, PackedLinear)}
        spent = sum(32 * m.weight_packed.numel() + 16 * m.weight_scale.numel() for m in mine.values())
        error = sum(float((w - mine[n].dequantize()).square().sum() / w.square().sum()) for n, w in linears.items())
        assert spent <= limit * total and error == pytest.approx(best, rel=1e-4)
    fixed = schemes(finequant(model, bits_per_weight=4.4, overrides={"up_proj": {"group_size": 16}, "q_proj": {"bits": 3}}))
    assert fixed["0.mlp.up_proj"] == (4, 16) and fixed["0.self_attn.q_proj"][0] == 3
    with pytest.raises(BlockwrightError, match=r"bits_per_weight=4.0. Allowed: at least 4\.1"):
        finequant(model, bits_per_weight=4.0)


def test_a_standard_folder_opens_in_plain_transformers(tmp_path):
    cheaper = finequant(llama(), group_size=32, overrides={"down_proj": {"bits": 8, "group_size": -1}, "q_proj": {"bits": 5}})
    assert export.write(Blueprint.of_module(cheaper), tmp_path, source=tmp_path, dtype=torch.float32) == "standard"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, cheaper(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_group_that_holds_the_whole_row_is_a_channel():
    found = schemes(finequant(llama(), group_size=128))
    assert found["0.self_attn.q_proj"] == (4, -1) and found["0.mlp.down_proj"] == (4, 128)


PLAN = dict(bits=4, group_size=64, formula="centred", alpha=2.0, reduce="mean", scale_dtype="bf16", bits_per_weight=None)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits": 7}, r"bits=7. Allowed: 3, 4, 5, 6, 8; 4 and 8 have kernels"),
        ({"bits": 2}, r"bits=2"),
        ({"group_size": 48}, r"group_size=48. Allowed: a power of two >= 16 .* or -1"),
        ({"group_size": 8}, r"group_size=8\."),
        ({"group_size": 0}, r"group_size=0"),
        ({"group_size": "coarse"}, r"group_size='coarse'"),
        ({"formula": "asymmetric"}, r"formula='asymmetric'. Allowed: centred, full"),
        ({"alpha": 0}, r"alpha=0. Allowed: a positive number"),
        ({"reduce": "median"}, r"reduce='median'"),
        ({"scale_dtype": "fp8"}, r"scale_dtype='fp8'. Allowed: bf16, fp16, fp32"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(BlockwrightError, match="finequant: " + said):
        fq.plan(block_parameters=10, tokens=10, **PLAN | options)
    with pytest.raises(BlockwrightError, match=r"finequant: overrides\['q_proj'\]: " + said):
        finequant(llama(), overrides={"q_proj": options})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"targets": ["attn"]}, r"targets=\['attn'\], ignore=\[\] leave no linear. Allowed: linears of the blocks: down_proj, .*q_proj"),
        ({"ignore": ["Linear"]}, r"ignore=\['Linear'\] leave no linear"),
        ({"overrides": {"x_proj": {"bits": 8}}}, r"overrides\['x_proj'\] names no targeted linear"),
        ({"ignore": ["q_proj"], "overrides": {"q_proj": {"bits": 8}}}, r"overrides\['q_proj'\] names no targeted linear"),
        ({"overrides": {"q_proj": {"ignore": []}}}, r"overrides\['q_proj'\]: ignore. Allowed: bits, group_size"),
        ({"alpha": -1.0}, r"alpha=-1.0. Allowed: a positive number"),
        ({"bits_per_weight": 0.0}, r"bits_per_weight=0.0. Allowed: at least 4"),
    ],
)
def test_what_the_stage_refuses(options, said):
    with pytest.raises((BlockwrightError, TypeCheckError), match=said if "alpha" not in options else ""):
        finequant(llama(), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(BlockwrightError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        finequant(model)
    with pytest.raises(BlockwrightError, match="NaN or infinite"):
        quantize(torch.tensor([[1.0, value]]))


def test_a_scale_that_does_not_fit_its_dtype_is_told_with_its_linear():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-8)
    with pytest.raises(BlockwrightError, match=r"layers\.0\.mlp\.up_proj: a scale of .* does not fit torch.float16.*bf16"):
        finequant(model, scale_dtype="fp16")
    assert finequant(model, scale_dtype="bf16") is not None


def test_the_plan_counts_scales():
    for change, bits in [
        ({}, 4.25), ({"group_size": -1}, 4), ({"bits": 8, "group_size": 32, "scale_dtype": "fp32"}, 9), ({"group_size": "adaptive"}, 4.5),
        ({"bits_per_weight": 4.1}, 4.1),
    ]:  # fmt: skip
        assert fq.plan(block_parameters=10, tokens=10, **PLAN | change)["bits"] == bits


# the fastest form


def packed_linear(n, k, *, bits=4, group_size=64, bias=True, dtype=torch.bfloat16, seed=0):
    dense = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        dense.weight.copy_(randn(n, k, seed=seed))
        if bias:
            dense.bias.copy_(9 * randn(n, seed=8))
    codes, scale = quantize(dense.weight.detach(), bits=bits, group_size=group_size, scale_dtype=dtype)
    return PackedLinear.of(dense, codes, scale, bits=bits, group_size=group_size).to(torch.bfloat16)


@pytest.mark.parametrize(
    "n,k,group,used", [(32, 128, 32, 32), (16, 192, 64, 64), (48, 256, -1, 256), (16, 96, -1, 32), (16, 1024, 512, 256)]
)
def test_the_int4_product_of_the_cpu_multiplies_by_codes_and_scales(n, k, group, used):
    model = nn.Sequential(packed_linear(n, k, group_size=group))
    w = model[0].dequantize().double()
    bias = model[0].bias.double()
    fq.accelerate(model)
    assert isinstance(model[0], fq.Int4CpuLinear) and model[0].group == used
    assert torch.equal(model[0].dequantize().double(), w.bfloat16().double())
    for shape in [(1, k), (2, 5, k), (fq.INT4_CPU_ROWS + 1, k), (0, k)]:
        x = randn(*shape, seed=2).bfloat16()
        y, want = model(x), x.double() @ w.T + bias
        assert y.shape == want.shape and (not y.numel() or close(y.flatten(0, -2), want.flatten(0, -2), torch.bfloat16))
    wide = randn(3, 2 * k).bfloat16()
    assert close(model(wide[:, ::2]), wide[:, ::2].double() @ w.T + bias, torch.bfloat16)
    x = randn(4, k).bfloat16().requires_grad_()
    model(x).sum().backward()
    assert torch.allclose(x.grad.double(), w.sum(0).expand(4, k), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "n,k,options",
    [(32, 128, {"bits": 5}), (32, 128, {"bits": 8}), (32, 128, {"bits": 3}), (20, 128, {}), (32, 100, {}), (32, 128, {"group_size": 16})],
)  # fmt: skip
def test_what_has_no_kernel_is_made_dense_once(n, k, options):
    model = nn.Sequential(packed_linear(n, k, **options))
    w = model[0].dequantize()
    fq.accelerate(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, w.bfloat16()) and not model[0].weight.requires_grad
    assert model[0].bias is not None and model[0].weight.dtype == torch.bfloat16


def test_scales_that_bf16_cannot_hold_are_not_rounded_away():
    model = nn.Sequential(packed_linear(32, 128))
    model[0].weight_scale = model[0].weight_scale.float() * 1.001
    want = model[0].dequantize().bfloat16()
    assert torch.equal(fq.accelerate(model)[0].weight, want)


def test_asymmetric_codes_are_made_dense():
    w = randn(32, 128)
    scale, zero = tiles.asymmetric_grid(w, bits=4, group_size=64, dtype=torch.bfloat16)
    codes = tiles.to_codes(w, scale, zero, bits=4, group_size=64)
    model = nn.Sequential(
        PackedLinear.of(nn.Linear(128, 32, bias=False), codes, scale, zero, bits=4, group_size=64), nn.LayerNorm(32).bfloat16()
    )
    want = model[0].dequantize().bfloat16()
    assert torch.equal(fq.accelerate(model)[0].weight, want)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = PackedEmbedding.of(randn(48, 64), bits=4, group_size=32)
        self.head = packed_linear(48, 64, bias=False)
        self.first, self.second = packed_linear(64, 64, bits=5), packed_linear(64, 64, bits=5)
        for name in ("weight_packed", "weight_scale"):
            setattr(self.head, name, getattr(self.table, name))
            setattr(self.second, name, getattr(self.first, name))
        self.head.group_size = 32


def test_tied_tensors_stay_one():
    model = Tied()
    table, head = model.table.dequantize().bfloat16(), model.head.dequantize().bfloat16()
    fq.accelerate(model)
    assert torch.equal(table, head) and torch.equal(model.table(torch.tensor([3, 5])), table[[3, 5]])
    assert type(model.head) is nn.Linear and model.head.weight.data_ptr() == model.table.weight.data_ptr()
    assert model.first.weight.data_ptr() == model.second.weight.data_ptr() and torch.equal(model.head.weight, head)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2", "mixtral"])
def test_a_model_made_fast_says_the_same(family):
    model = finequant(models()[family].eval(), group_size=32, overrides={"re:0.*": {"bits": 8}}).bfloat16()
    with torch.no_grad():
        want = model(IDS).logits
        fq.accelerate(model)
        assert not any(isinstance(m, (PackedLinear, PackedEmbedding)) for m in model.modules())
        assert CUDA or any(isinstance(m, fq.Int4CpuLinear) for m in model.modules())
        assert (model(IDS).logits - want).abs().max() <= 0.03 * want.abs().max()
