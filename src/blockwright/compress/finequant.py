"""Int4/int8 weights with one scale per group of inputs, for small-batch decoding that is bound by weight bytes. Needs no data.

Use it when a model must be smaller now and no text is at hand, or as the first thing to try. Not for 3 bits, nor for 4 bits with one
scale a row, where learned rounding keeps far more; and not to speed up large batches, which are bound by arithmetic.

FineQuant, arXiv 2308.09723, with the grids of MoQE, arXiv 2310.02410, and of FasterTransformer.
Re-measure its claim: `blockwright reproduce finequant`.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from blockwright.blocks import budget, layers, tiles
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
from blockwright.errors import BlockwrightError
from blockwright.options import Rate, Targets

CARD = {
    "slug": "finequant",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2308.09723",
    "title": "FineQuant: fine-grained weight-only quantisation",
    "summary": "int8/int4 weights with a scale per group of inputs",
    "saves": "weight bytes: 2x (int8) to 3.8x (int4)",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "packed",
    "writes": "compressed-tensors pack-quantized",
    "claim": {"figure": "up to 3.65x throughput", "against": "16-bit weights on the same GPUs", "where": "abstract, OPT-175B"},
}

BITS = (3, 4, 5, 6, 8)
KERNEL_BITS = (4, 8)
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
CHOICES = (-1, 128, 64, 32)  # group sizes among which one is chosen per matrix, from coarse to fine: those that every server reads
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT4_CPU_GROUPS = (256, 128, 64, 32)  # inputs per scale that torch's int4 product on the CPU knows
INT4_CPU_ROWS = 96  # above so many rows of x, making W dense and multiplying is faster than the int4 product on the CPU
EACH = ("bits", "group_size", "formula", "alpha", "reduce", "scale_dtype")  # what an override may change

Backend = Literal["auto", "reference", "torch", "triton"]


@stage
def finequant(
    run: Run,
    *,
    bits: Literal[3, 4, 5, 6, 8] = 4,
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024, "adaptive"] = 64,
    formula: Literal["centred", "full"] = "centred",
    alpha: Rate = 2.0,
    reduce: Literal["mean", "max"] = "mean",
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    bits_per_weight: Rate | None = None,
    targets: Targets = ["Linear"],
    ignore: Targets = [],
    overrides: dict[str, dict[str, Any]] = {},
) -> None:
    """Replace every targeted linear of the blocks by packed codes with a scale per group of inputs.

    Embeddings, norms and head stay as they are, and so do experts that a model holds as one 3-D parameter: see `quantize_experts`.

    bits : of a code. 4 and 8 have kernels; 3, 5 and 6 only save bytes: at use they are made dense.
    group_size : inputs that share a scale, a power of two from 16; -1: the whole row; "adaptive": chosen per matrix from its weights. Where
        it does not divide the inputs of a matrix, the last group is shorter: only our own layout can store that.
    formula : step of the grid. centred: 2 max|w| / (2**bits - 1); full: max|w| / 2**(bits-1), which loses up to a step of the largest.
    alpha : for "adaptive": bits of precision that a finer group must win for each bit of scale that it costs.
    reduce : for "adaptive": judge a matrix by the mean over its outputs, or by the output that wins most (max), which sees single outliers.
    scale_dtype : of the stored scales; codes are rounded with the stored one.
    bits_per_weight : average bits of a treated weight, scales included; the group size of each matrix is then chosen from -1, 128, 64
        and 32 so that the sum of relative squared errors is least. null: group_size decides.
    targets : linears to pack: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.
    overrides : other bits, group_size, formula, alpha, reduce or scale_dtype for some linears: pattern -> options, later ones win.

    Raises BlockwrightError, before anything is computed, for options out of range and targets or overrides that name no linear; later for
    weights that are not finite, scales that do not fit their dtype and a budget below the least possible.
    """
    options = dict(bits=bits, group_size=group_size, formula=formula, alpha=alpha, reduce=reduce, scale_dtype=scale_dtype)  # noqa: C408
    _check(options)
    for pattern, values in overrides.items():
        unknown = sorted(values.keys() - set(EACH))
        if unknown:
            raise BlockwrightError(f"finequant: overrides[{pattern!r}]: {unknown[0]}", allowed=", ".join(EACH))
        _check(options | values, f"overrides[{pattern!r}]: ")
    _check_patterns(run, targets, ignore, overrides)
    decide = partial(_options_of, options, overrides)
    sizes: dict[str, int] = {}
    if bits_per_weight is not None:
        facts = run.blocks(partial(_measure_block, targets=targets, ignore=ignore, decide=decide))
        sizes = _within_budget({name: fact for block in facts for name, fact in block.items()}, bits_per_weight)
    run.blocks(partial(_pack_block, targets=targets, ignore=ignore, decide=decide, sizes=sizes), write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight.

    row_bits : of the scale of a whole row, beside them.
    """
    _check(options)
    group, scale, mean = options["group_size"], 8 * DTYPES[options["scale_dtype"]].itemsize, options["bits_per_weight"]
    finest = CHOICES[-1] if group == "adaptive" else group
    bits = options["bits"] + (0 if finest == -1 else scale / finest)
    return {"copies": 3, "passes": 0, "bits": mean or bits, "row_bits": scale if finest == -1 and not mean else 0}


def quantize(
    w_NK: Float[Tensor, "N K"],
    *,
    bits: int = 4,
    group_size: int = 64,
    formula: Literal["centred", "full"] = "centred",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N G"]]:
    """Round each run of `group_size` inputs of an output to a symmetric grid of 2**bits levels.

    w : weights, outputs x inputs, any float dtype, computed in fp32. Not modified.
    Returns codes in [-2**(bits-1), 2**(bits-1) - 1] and scales in `scale_dtype`, G = ceil(K / group_size), 1 for an all-zero group.
    Raises BlockwrightError for bits or group_size out of range, weights that are not finite, a scale that does not fit its dtype.
    """
    _check({"bits": bits, "group_size": group_size, "formula": formula})
    scale = tiles.symmetric_scale(w_NK, bits=bits, group_size=group_size, formula=formula, dtype=scale_dtype)
    return tiles.to_codes(w_NK, scale, bits=bits, group_size=group_size), scale


def quantize_experts(
    w_ENK: Float[Tensor, "E N K"],
    *,
    bits: int = 4,
    group_size: int | Literal["adaptive"] = 64,
    formula: Literal["centred", "full"] = "centred",
    scale_dtype: torch.dtype = torch.bfloat16,
    alpha: float = 2.0,
    reduce: Literal["mean", "max"] = "mean",
) -> tuple[Int8[Tensor, "E N K"], Float[Tensor, "E N G"], int]:
    """The experts of a mixture, [E, N, K], each quantised as a matrix of its own, with one group size for all.

    Returns codes, scales and the group size; "adaptive" chooses it from all experts together. Raises as `quantize` does.
    """
    e, n, k = w_ENK.shape
    w = w_ENK.reshape(e * n, k)
    if group_size == "adaptive":
        group_size = choose_group_size(w, alpha=alpha, reduce=reduce, scale_bits=8 * scale_dtype.itemsize)
    codes, scale = quantize(w, bits=bits, group_size=group_size, formula=formula, scale_dtype=scale_dtype)
    return codes.view(e, n, k), scale.view(e, n, -1), group_size


def choose_group_size(
    w_NK: Float[Tensor, "N K"], *, alpha: float = 2.0, reduce: Literal["mean", "max"] = "mean", scale_bits: int = 16
) -> int:
    """The group size of a matrix, from its weights alone: from the whole row to 128, 64 and 32 inputs while the finer one pays.

    The rounding error of a group is proportional to r = max|w|, so finer groups win log2 of the quadratic mean of r_coarse / r_fine bits
    of precision. They cost scale_bits / g_fine - scale_bits / g_coarse bits a weight, and pay where they win at least alpha times that.
    (A constant bound on the shrinking of r would not do: r shrinks faster the finer groups are, even in Gaussian noise, and at twice the
    price.)
    Sizes that do not divide K are passed over. Multiplying w by a power of two does not change the choice.
    """
    k = w_NK.shape[1]
    chosen, width = -1, k
    ranges = _ranges(w_NK, -1)
    for finer in CHOICES[1:]:
        if finer >= width or k % finer:
            continue
        fine = _ranges(w_NK, finer)
        coarse = ranges.repeat_interleave(width // finer, dim=1)
        shrink = torch.where(fine > 0, coarse / fine, 1.0)  # [N, K / finer], >= 1; zeros are on every grid: nothing to win
        per_output = shrink.square().mean(1)
        gain = 0.5 * math.log2(float(per_output.mean() if reduce == "mean" else per_output.max()))
        if gain < alpha * scale_bits * (1 / finer - 1 / width):
            break
        chosen, width, ranges = finer, finer, fine
    return chosen


def matmul_reference(
    x: Float[Tensor, "*b K"],
    packed_NP: Int32[Tensor, "N P"],
    scale_NG: Float[Tensor, "N G"],
    *,
    bits: int,
    group_size: int,
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "*b N"]:
    """y = x (codes * scale)^T + bias in fp64, in the dtype of x: as slow as it likes. What every backend is compared with."""
    k = x.shape[-1]
    codes = tiles.unpack(packed_NP, bits, k).double()
    w_NK = codes * tiles.spread(scale_NG.double(), group_size, k)
    y = x.double() @ w_NK.T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def matmul(
    x: Float[Tensor, "*b K"],
    packed_NP: Int32[Tensor, "N P"],
    scale_NG: Float[Tensor, "N G"],
    *,
    bits: int,
    group_size: int,
    bias: Float[Tensor, " N"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "*b N"]:
    """y = x W^T + bias with W = codes * scale, in the dtype of x; differentiable in x and bias, never in W.

    packed : codes as `blocks.tiles.pack` packs them. backend : triton (4 and 8 bits; lays W out anew at every call, which `accelerate` does
    once for all), torch (W is made dense in the dtype of x), reference (fp64), auto (triton on a GPU where it can, else torch).
    Raises BlockwrightError where K does not match, x is not fp16, bf16 or fp32, or triton is asked for bits that have no kernel. Triton on
    a CPU without its interpreter falls back to the reference, with one warning.
    """
    n, k = packed_NP.shape[0], x.shape[-1]
    if x.dtype not in DTYPES.values():
        raise BlockwrightError(f"finequant.matmul: x is {x.dtype}", allowed="expects fp16/bf16/fp32", do="Convert x first")
    if packed_NP.shape[1] != -(-k * bits // 32) or scale_NG.shape[1] != tiles.num_groups(k, group_size):
        raise BlockwrightError(
            f"finequant.matmul: x has {k} inputs, W {packed_NP.shape[1]} words and {scale_NG.shape[1]} scales a row",
            allowed=f"{-(-k * bits // 32)} words and {tiles.num_groups(k, group_size)} scales for {k} inputs of {bits} bits",
            do="Check that x belongs to this weight",
        )
    if backend == "triton" and bits not in KERNEL_BITS:
        raise BlockwrightError(f"finequant.matmul: no kernel for {bits} bits", allowed="4, 8", do="Use backend='torch'")
    if backend == "auto":
        backend = "triton" if x.is_cuda and bits in KERNEL_BITS and x.dtype != torch.float32 and _has_triton() else "torch"
    elif backend == "triton" and not x.is_cuda and not _interpreted():
        _warn_once()
        backend = "reference"

    def dense(dtype: torch.dtype) -> Tensor:
        return tiles.from_codes(tiles.unpack(packed_NP, bits, k), scale_NG, group_size=group_size).to(dtype)

    def forward(x_MK: Tensor, bias: Tensor | None) -> Tensor:
        if backend == "reference":
            return matmul_reference(x_MK, packed_NP, scale_NG, bits=bits, group_size=group_size, bias=bias)
        if backend == "torch":
            return nn.functional.linear(x_MK, dense(x_MK.dtype), None if bias is None else bias.to(x_MK.dtype))
        from blockwright.compress import finequant_triton

        weight = finequant_triton.prepare(tiles.unpack(packed_NP, bits, k), scale_NG, bits=bits, group_size=group_size)
        return finequant_triton.multiply(x_MK, weight, bias)

    return _product(x.reshape(-1, k), bias, forward, dense).view(*x.shape[:-1], n)


class QuantLinear(nn.Module):
    """y = x W^T + b with W in the layout of the GPU kernels: small batches read the packed bytes only.

    A run-time form, made of a PackedLinear, which is what files hold; or of a dense linear by `from_float`.
    """

    def __init__(self, packed: PackedLinear) -> None:
        from blockwright.compress import finequant_triton

        super().__init__()
        self.in_features, self.out_features, self.bits = packed.in_features, packed.out_features, packed.bits
        self.kernels = finequant_triton
        weight = finequant_triton.prepare(packed.codes(), packed.weight_scale, bits=packed.bits, group_size=packed.group_size)
        self.words: Tensor
        self.scale: Tensor
        self.register_buffer("words", weight.words)
        self.register_buffer("scale", weight.scale)
        self.bias = packed.bias

    @classmethod
    def from_float(cls, linear: nn.Module, *, bits: int = 4, group_size: int = 64) -> "QuantLinear":
        """A dense linear (nn.Linear or Conv1D), quantised. Raises as `quantize` does, and for bits without a kernel."""
        if bits not in KERNEL_BITS:
            raise BlockwrightError(f"QuantLinear: bits={bits}", allowed="4, 8", do="Other widths are stored only")
        codes, scale = quantize(layers.matrix(linear), bits=bits, group_size=group_size)
        return cls(PackedLinear.of(linear, codes, scale, bits=bits, group_size=group_size))

    @staticmethod
    def fits(packed: PackedLinear, dtype: torch.dtype) -> bool:
        """Whether the kernels are made for these codes and this dtype of x."""
        known = packed.symmetric and packed.bits in KERNEL_BITS and packed.group_size in GROUPS
        return known and dtype in (torch.bfloat16, torch.float16) and _has_triton()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N K"]:
        """The weights, dense."""
        dense: Tensor = self.kernels.dense(self._weight(), dtype)
        return dense

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        rows = x.reshape(-1, self.in_features)
        y = _product(rows, self.bias, lambda x_MK, bias: self.kernels.multiply(x_MK, self._weight(), bias), self.dequantize)
        return y.view(*x.shape[:-1], self.out_features)

    def _weight(self) -> Any:
        return self.kernels.KernelWeight(self.words, self.scale, self.out_features, self.in_features, self.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class Int4CpuLinear(nn.Module):
    """y = x W^T + b by torch's int4 product on the CPU, in bf16; for many rows W is made dense first, which is faster then.

    A run-time form, made of a PackedLinear that `fits`.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        n, k = packed.out_features, packed.in_features
        self.in_features, self.out_features, self.group, self.bias = k, n, _int4_cpu_group(packed), packed.bias
        scale = tiles.spread(packed.weight_scale.bfloat16(), packed.group_size, k).expand(-1, k)[:, :: self.group]
        self.words: Tensor  # uint8, in the order that torch's product reads
        self.pairs: Tensor  # uint8 [N, K / 2], two codes + 8 a byte, from which W is made dense
        self.scales_and_zeros: Tensor  # bf16 [K / group, N, 2]: w = code * scale + zero, and zero is 0
        self.register_buffer("words", torch.ops.aten._convert_weight_to_int4pack_for_cpu(packed.codes().to(torch.int32) + 8, 1))
        self.register_buffer("pairs", packed.weight_packed.view(torch.uint8)[:, : k // 2].contiguous())
        self.register_buffer("scales_and_zeros", torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous())

    @staticmethod
    def fits(packed: PackedLinear, dtype: torch.dtype) -> bool:
        """Whether torch's int4 product takes these codes and x of this dtype, and the scales as they are."""
        scale = packed.weight_scale
        known = packed.symmetric and packed.bits == 4 and packed.out_features % 16 == 0 and _int4_cpu_group(packed) > 0
        return known and dtype == torch.bfloat16 and torch.equal(scale.bfloat16().float(), scale.float())

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "N K"]:
        """The weights, dense, each rounded once to bf16."""
        codes = _codes_of_bytes().index_select(0, self.pairs.int().flatten()).view(torch.bfloat16)
        scale = self.scales_and_zeros[..., 0].T
        return (codes.view(self.out_features, -1, self.group) * scale[..., None]).view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        y = _product(x.reshape(-1, self.in_features), self.bias, self._multiply, self.dequantize)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, x_MK: Tensor, bias: Tensor | None) -> Tensor:
        if 0 < len(x_MK) <= INT4_CPU_ROWS:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.contiguous(), self.words, self.group, self.scales_and_zeros)
            return y if bias is None else y + bias
        return nn.functional.linear(x_MK, self.dequantize(x_MK.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits=4"


def accelerate(model: nn.Module) -> nn.Module:
    """Replace each packed linear and embedding of `model` by its fastest form on its device, in place. Returns the model, for use only.

    GPU: the fused kernels, for symmetric codes of 4 and 8 bits. CPU: torch's int4 product, in bf16, where shapes and scales allow it.
    Everything else is made dense once, in the dtype of the model, so that decoding is never slower than with the dense model; what was one
    tensor stays one.
    """
    packed = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, (PackedLinear, PackedEmbedding))}
    dtype = next((p.dtype for p in model.parameters()), torch.bfloat16)
    tables = {m.weight_packed.data_ptr() for m in packed.values() if isinstance(m, PackedEmbedding)}
    weights: dict[int, nn.Parameter] = {}
    forms: dict[tuple[int, ...], nn.Module] = {}
    for name, module in packed.items():
        place = module.weight_packed.data_ptr()
        key = (place, isinstance(module, PackedLinear), id(getattr(module, "bias", None)))
        if key not in forms:
            forms[key] = _fast_form(module, dtype, is_table=place in tables, weights=weights).train(module.training)
        layers.swap(model, name, forms[key])
    return model


def _check(options: Mapping[str, Any], place: str = "") -> None:
    """Raise BlockwrightError for the first option that is out of range."""
    allowed: dict[str, tuple[Any, ...]] = {
        "bits": BITS,
        "group_size": (*GROUPS, "adaptive"),
        "formula": ("centred", "full"),
        "reduce": ("mean", "max"),
        "scale_dtype": tuple(DTYPES),
    }
    words = {
        "bits": "3, 4, 5, 6, 8; 4 and 8 have kernels, the others only save bytes",
        "group_size": "a power of two >= 16 (up to 1024) or -1 for the whole row; in a stage also 'adaptive'",
    }
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            raise BlockwrightError(f"finequant: {place}{name}={options[name]!r}", allowed=words.get(name, ", ".join(map(str, values))))
    if not options.get("alpha", 1) > 0:
        raise BlockwrightError(f"finequant: {place}alpha={options['alpha']!r}", allowed="a positive number", do="Try alpha=2")


def _check_patterns(run: Run, targets: Targets, ignore: Targets, overrides: Mapping[str, Any]) -> None:
    """Raise BlockwrightError where targets or an override name no linear of the blocks."""
    linears = layers.block_linears(run.model.skeleton())
    some = ", ".join(sorted({n.rpartition(".")[2] for n in linears}))
    treated = layers.targeted(linears, targets, ignore)
    if not treated:
        raise BlockwrightError(f"finequant: targets={targets}, ignore={ignore} leave no linear", allowed=f"linears of the blocks: {some}")
    for pattern in overrides:
        if not any(layers.selected(n, m, [pattern], []) for n, m in treated.items()):
            raise BlockwrightError(f"finequant: overrides[{pattern!r}] names no targeted linear", allowed=f"linears of the blocks: {some}")


def _options_of(options: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]], name: str, linear: nn.Module) -> dict[str, Any]:
    """The options of one linear; `fixed` where an override names its group size."""
    chosen = options | {"fixed": False}
    for pattern, values in overrides.items():
        if layers.selected(name, linear, [pattern], []):
            chosen |= values
            chosen["fixed"] |= "group_size" in values
    return chosen


def _quantized(name: str, linear: nn.Module, o: Mapping[str, Any], group_size: int | str) -> tuple[Tensor, Tensor, int]:
    """Codes, scales and group size of one linear, chosen from its weights where it is "adaptive"."""
    w, dtype = layers.matrix(linear), DTYPES[o["scale_dtype"]]
    if group_size == "adaptive":
        group_size = choose_group_size(w, alpha=float(o["alpha"]), reduce=o["reduce"], scale_bits=8 * dtype.itemsize)
    size = -1 if int(group_size) >= w.shape[1] else int(group_size)
    try:
        codes, scale = quantize(w, bits=o["bits"], group_size=size, formula=o["formula"], scale_dtype=dtype)
    except BlockwrightError as error:
        raise BlockwrightError(f"{name}: {error.what}", allowed=error.allowed, do=error.do) from None
    return codes, scale, size


def _pack_block(
    block: Block,
    x: Tensor | None,
    y: Tensor | None,
    rng: torch.Generator,
    *,
    targets: Targets,
    ignore: Targets,
    decide: Callable[[str, nn.Module], dict[str, Any]],
    sizes: Mapping[str, int],
) -> Facts:
    for name, linear in block.linears(targets, ignore).items():
        o = decide(name, linear)
        codes, scale, size = _quantized(name, linear, o, sizes.get(name, o["group_size"]))
        block.swap(name, PackedLinear.of(linear, codes, scale, bits=o["bits"], group_size=size))
    return {}


def _measure_block(
    block: Block,
    x: Tensor | None,
    y: Tensor | None,
    rng: torch.Generator,
    *,
    targets: Targets,
    ignore: Targets,
    decide: Callable[[str, nn.Module], dict[str, Any]],
) -> Facts:
    """For each linear: its number of weights, and for each group size it may have the relative squared error and the bits it takes."""
    facts: Facts = {}
    for name, linear in block.linears(targets, ignore).items():
        w, o = layers.matrix(linear), decide(name, linear)
        choices = [o["group_size"]] if o["fixed"] else [g for g in CHOICES if g == -1 or (g < w.shape[1] and w.shape[1] % g == 0)]
        errors, sizes, bits = [], [], []
        for choice in choices:
            codes, scale, size = _quantized(name, linear, o, choice)
            error = (w - tiles.from_codes(codes, scale, group_size=size)).square().sum() / w.square().sum().clamp(min=1e-30)
            errors.append(float(error))
            sizes.append(size)
            bits.append(32 * len(w) * -(-w.shape[1] * o["bits"] // 32) + 8 * scale.numel() * scale.element_size())
        facts[name] = {"weights": w.numel(), "errors": errors, "sizes": sizes, "bits": bits}
    return facts


def _within_budget(facts: Mapping[str, Facts], bits_per_weight: float) -> dict[str, int]:
    """A group size for each linear: least sum of errors with at most so many bits a weight on average."""
    weights = sum(f["weights"] for f in facts.values())
    least = sum(min(f["bits"]) for f in facts.values())
    if bits_per_weight * weights < least:
        raise BlockwrightError(
            f"finequant: bits_per_weight={bits_per_weight}",
            allowed=f"at least {math.ceil(1000 * least / weights) / 1000} for these linears with their bits",
            do="Raise it, or use fewer bits",
        )
    costs, bits = [f["errors"] for f in facts.values()], [f["bits"] for f in facts.values()]
    best = budget.choose(costs, bits, int(bits_per_weight * weights), gap=1e-6)
    return {name: f["sizes"][i] for (name, f), i in zip(facts.items(), best.picks, strict=True)}


def _ranges(w_NK: Tensor, group_size: int) -> Tensor:
    return tiles.grouped(w_NK.float(), group_size).abs().amax(-1)


class _FrozenProduct(torch.autograd.Function):
    """multiply(x, bias), whose gradient is dX = dY W: `dense(dtype)` gives W."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, bias: Tensor | None, multiply: Callable[..., Tensor], dense: Callable[..., Tensor]) -> Tensor:
        ctx.dense = dense
        return multiply(x_MK, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_MN,) = grads
        d_x = grad_MN @ ctx.dense(grad_MN.dtype) if ctx.needs_input_grad[0] else None
        return d_x, grad_MN.sum(0) if ctx.needs_input_grad[1] else None, None, None


def _product(x_MK: Tensor, bias: Tensor | None, multiply: Callable[..., Tensor], dense: Callable[..., Tensor]) -> Tensor:
    """multiply(x, bias), through autograd only where a gradient is wanted: that takes 10 us a call."""
    wanted = torch.is_grad_enabled() and (x_MK.requires_grad or (bias is not None and bias.requires_grad))
    y: Tensor = _FrozenProduct.apply(x_MK, bias, multiply, dense) if wanted else multiply(x_MK, bias)
    return y


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()


@cache
def _warn_once() -> None:
    warnings.warn("finequant: Triton kernels need a GPU, or TRITON_INTERPRET=1; the fp64 reference is used", stacklevel=4)


@cache
def _codes_of_bytes() -> Int32[Tensor, "256"]:
    """The two 4-bit codes that each byte holds, as two bf16 numbers in one word: one look-up gives both."""
    byte = torch.arange(256)
    return (torch.stack([byte & 15, byte >> 4], -1) - 8).bfloat16().view(torch.int32).flatten()


def _int4_cpu_group(packed: PackedLinear) -> int:
    """The largest group size of torch's product that this matrix can be given in; 0: none."""
    k = packed.in_features
    mine = k if packed.group_size == -1 else packed.group_size
    return next((g for g in INT4_CPU_GROUPS if k % g == 0 and mine % g == 0), 0)


def _fast_form(
    packed: PackedLinear | PackedEmbedding, dtype: torch.dtype, *, is_table: bool, weights: dict[int, nn.Parameter]
) -> nn.Module:
    """The module to run in place of a packed one. weights : the dense weights made so far, by the packed tensor that modules may share."""
    if isinstance(packed, PackedLinear) and not is_table:
        if packed.weight_packed.is_cuda:
            if QuantLinear.fits(packed, dtype):
                return QuantLinear(packed)
        elif Int4CpuLinear.fits(packed, dtype):
            return Int4CpuLinear(packed)
    place = packed.weight_packed.data_ptr()
    if place not in weights:
        weights[place] = nn.Parameter(packed.dequantize().to(dtype), requires_grad=False)
    if isinstance(packed, PackedEmbedding):
        return nn.Embedding(packed.num_embeddings, packed.embedding_dim, _weight=weights[place], _freeze=True)
    new = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    new.weight, new.bias = weights[place], packed.bias
    return new
