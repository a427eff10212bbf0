"""4-bit weights in groups whose scales are small integers: a group expands exactly to int8, and one int8 product runs the whole row.

Use it when a model shall take the memory of 4-bit weights and compute in int8, on hardware that is faster so (CPUs with int8 dot products).
On an H100 its kernel is as yet slower than finequant's at few rows and than bf16 at many: there it saves memory alone.
Not where activations must stay in 16 bits (they are rounded to int8 by one fixed scale a linear), not for decoding alone, where plain 4-bit
weights lose less, and not without calibration text like that of use, which fixes what is clipped: with all blocks of SmolLM2 treated the
loss is 1.2 times that of 4-bit weights with float scales on such text, and 1.7 times on source code.

DGQ (Dual Grained Quantization), arXiv 2310.04836. Re-measure its claim: `blockwright reproduce dgq`.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.dual_grained import DualGrained, DualGrainedLinear, Int8Linear
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Run, stage
from blockwright.blocks.stream import Block, Gram, Stat
from blockwright.errors import BlockwrightError
from blockwright.options import GroupSize, Targets

CARD = {
    "slug": "dgq",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2310.04836",
    "title": "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM",
    "summary": "int4 weights with integer group scales that expand exactly to int8, and int8 activations",
    "saves": "weight bytes 3.8x; arithmetic in int8",
    "needs": ["calibration"],
    "accepts": ["dense"],
    "leaves": "dual-grained",
    "writes": "own layout; exports to compressed-tensors: int-quantized (w8a8), pack-quantized with 16-bit activations (standard)",
    "claim": {
        "figure": "1.12x less memory, 3.24x speed, better accuracy than other W4A8",
        "against": "an A16W4 implementation; A8W4 methods before it",
        "where": "abstract, LLaMA and OPT",
    },
}

FINE_STEPS, FINE_RANGE = 20, 0.22  # phase 1: range ratios 1.02 - 0.22 i / 20, i = 1..20
COARSE_STEPS, COARSE_RANGE = 80, 0.82  # phase 2: 1.02 - 0.82 i / 80, i = 1..80
LARGEST = 127  # of an int8 weight or activation
PERCENTILE = 0.99  # of the tokens of a sample, for act_range="percentile"
TINY = 1e-30  # channels of weights with no larger number count as zeros
CANDIDATES_AT_ONCE = 2**21  # weights of all candidates of the rows that are searched together: they stay in the cache
ACT_RANGES = ("max", "min_of_max", "percentile")


@stage
def dgq(
    run: Run,
    *,
    bits: Literal[4, 8] = 4,
    group_size: GroupSize = 64,
    pad: bool = True,
    smooth: bool = True,
    act_range: Literal["max", "min_of_max", "percentile"] = "max",
    targets: Targets = ["Linear"],
    ignore: Targets = [],
) -> None:
    """Replace every targeted linear of the blocks by its dual-grained form, with int8 activations; inputs come from the blocks before it
    as they are by then, weights and activations rounded.

    Embeddings, head, and norms that feed no outliers stay as they are. A linear that several blocks share is calibrated in the first.

    bits : of a weight as stored. 8 is plain int8 with the same search.
    group_size : inputs that share a fine scale; the paper has 128. -1: the whole row.
    pad : where group_size does not divide the inputs of a linear, its last group is shorter; false: that is refused.
    smooth : move outlier channels of activations into the weights: the largest 0.5 % of the channels are scaled down to the next one.
    act_range : the largest input that is not clipped: of the calibration text (max; nothing in it is clipped), or the largest over channels
        of the least over samples of a channel's maximum (min_of_max; the official code), or of its 99th percentile within a sample
        (percentile).
    targets : linears to treat: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.

    Raises BlockwrightError before anything is computed for options out of range, targets that name no linear and, without pad, a
    group_size that does not divide; later for weights or inputs that are not finite, with the linear's name.
    """
    _check(bits=bits, group_size=group_size, act_range=act_range)
    _check_linears(run, group_size, pad, targets, ignore)
    holders = Counter(run.model.tensors.values())
    held_twice = {name.removesuffix(".weight") for name, place in run.model.tensors.items() if holders[place] > 1}

    def treat(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        assert x is not None
        linears = block.linears(targets, ignore)
        if not linears:
            return
        wiring = trace(block, x)
        first_reader: dict[int, str] = {}  # one Gram matrix for all linears that read one tensor
        reads = {name: first_reader.setdefault(wiring.reads.get(name, id(m)), name) for name, m in linears.items()}
        make = _inputs(x.shape[1], act_range)
        seen: dict[str, Any] = block.observe(x, make, set(reads.values()))
        for name, reader in reads.items():
            if not seen[reader].gram.count:
                raise BlockwrightError(f"dgq: {name} was given no tokens", do=f"Use more calibration text, or add {name!r} to ignore")
        if smooth:
            for pair in smoothing_pairs(block, x, wiring, linears.keys() - held_twice, held_twice, rng):
                inputs = seen[reads[pair.readers[0]]]
                t = smoothing_factors(inputs.top)
                fold(block, pair, t)
                inputs.divide(t)
        for name, linear in linears.items():
            inputs = seen[reads[name]]
            weight = quantize(layers.matrix(linear), inputs.gram.sum, bits=bits, group_size=group_size, name=name)
            block.swap(name, DualGrainedLinear.of(linear, weight, inputs.amax(), bits=bits, group_size=group_size))

    run.blocks(treat, inputs="treated", write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight.

    The search counts as passes, by its products: 80 candidates of K a weight, half of which are never made. Raises BlockwrightError for
    options out of range.
    """
    _check(bits=options["bits"], group_size=options["group_size"], act_range=options["act_range"])
    group, bits = options["group_size"], options["bits"]
    search = COARSE_STEPS / 2 * (block_parameters / 12) ** 0.5 / max(tokens, 1)  # a block holds about 12 K**2 weights
    return {"copies": 6, "passes": 2 + search, "bits": bits if group == -1 else bits + (8 + bits) / group}


class Pair(NamedTuple):
    """Where a scale of channels can be moved: `source`, a norm or a linear, and all linears that read what it makes. Full names."""

    source: str
    readers: list[str]


@dataclass
class Wiring:
    """What one sample showed of a block, in the order of execution.

    norms : norm -> the linears that read its output as it is. linears : in order. reads : linear -> a number for the tensor it read.
    """

    norms: dict[str, list[str]]
    linears: list[str]
    reads: dict[str, int]


@torch.no_grad()
def trace(block: Block, x: Float[Tensor, "n T d"]) -> Wiring:
    """Run one sample through the block and see which linears read which tensors."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []  # the tensors stay alive, so that no address is used twice
    names = {m: f"{block.name}.{n}" for n, m in block.module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}

    def see(module: nn.Module, args: Any, out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            seen.append((names[module], module, args[0], out))

    handles = [m.register_forward_hook(see) for m in names]
    block(x[:1], slice(0, 1))
    for handle in handles:
        handle.remove()
    made = {_place(out): name for name, m, _, out in seen if m.weight.dim() == 1}  # type: ignore[union-attr,operator]
    wiring = Wiring({name: [] for name in made.values()}, [], {})
    for name, module, given, _ in seen:
        if layers.is_linear(module):
            wiring.linears.append(name)
            wiring.reads[name] = hash(_place(given))
            if _place(given) in made:
                wiring.norms[made[_place(given)]].append(name)
    return wiring


@torch.no_grad()
def smoothing_pairs(
    block: Block, x: Float[Tensor, "n T d"], wiring: Wiring, own: Iterable[str], shared: Iterable[str], rng: torch.Generator
) -> list[Pair]:
    """The places of a block where a scale of channels can be moved without changing what the block computes.

    Candidates are a norm with all linears that read it, and a linear with the linear, or linears, that have as many inputs as it has
    outputs: up and down of an MLP, values and output of attention where each head has its own. Each is tried on a sample with scales of 1,
    2 and 4, drawn by rng, which move through products without a rounding error: where the output changes, it is no pair (a norm that a
    residual or a router reads too, a GELU between two linears). Scales that are all alike would not do: another norm could hide them.

    own : linears that may change. shared : modules that may not.
    """
    own, shared = set(own), set(shared)
    fed = {reader for readers in wiring.norms.values() for reader in readers}
    free = [n for n in wiring.linears if n in own and n not in fed]
    candidates = [Pair(norm, readers) for norm, readers in wiring.norms.items() if readers]
    for target in free:
        readers = [n for n in wiring.linears if wiring.reads[n] == wiring.reads[target]]
        before = wiring.linears[: wiring.linears.index(target)]
        fits = [n for n in before if n in own and layers.size(_module(block, n))[0] == layers.size(_module(block, target))[1]]
        candidates += [Pair(source, readers) for source in reversed(fits) if readers[0] == target]
    found: dict[str, Pair] = {}  # by the first reader: its inputs are scaled once
    expected = block(x[:1], slice(0, 1))
    for pair in candidates:
        if pair.readers[0] in found or not own.issuperset(pair.readers) or pair.source in shared:
            continue
        powers = 2.0 ** torch.randint(0, 3, (layers.size(_module(block, pair.readers[0]))[1],), generator=rng, device=x.device)
        fold(block, pair, powers)
        change = (block(x[:1], slice(0, 1)) - expected).abs().max()
        fold(block, pair, 1 / powers)
        if change <= 2e-6 * expected.abs().max():
            found[pair.readers[0]] = pair
    return list(found.values())


def smoothing_factors(top_K: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """What the channels of an activation are divided by, >= 1: those above the 99.5th percentile come down to it.

    top : the maximum of |x| in each channel. The percentile is the k-th largest, k = int(0.005 K + 1.5); where it is below 1e-4, all are 1.
    """
    kth = top_K.sort(descending=True).values[min(int(0.005 * len(top_K) + 1.5), len(top_K)) - 1]
    return torch.ones_like(top_K) if kth < 1e-4 else (top_K / kth).clamp(min=1)


@torch.no_grad()
def fold(block: Block, pair: Pair, t_K: Float[Tensor, " K"]) -> None:
    """Divide the channels that `source` makes by t, and multiply by t the columns of its readers."""
    source = _module(block, pair.source)
    rows = layers.matrix(source) if layers.is_linear(source) else source.weight
    rows.div_(t_K[:, None] if rows.dim() == 2 else t_K)  # type: ignore[operator,union-attr]
    if isinstance(getattr(source, "bias", None), Tensor):
        source.bias.div_(t_K)  # type: ignore[union-attr,operator]
    for name in pair.readers:
        layers.matrix(_module(block, name)).mul_(t_K)


@torch.no_grad()
def quantize(
    w_NK: Float[Tensor, "N K"], gram_KK: Float[Tensor, "K K"], *, bits: int = 4, group_size: int = 64, name: str = "weight"
) -> DualGrained:
    """Both phases for one matrix: group scales and zero points, then channel scales that turn group scales into integers.

    w : weights, computed in the dtype of gram. Not modified. gram : x^T x over all calibration tokens; a factor does not matter.
    An all-zero group has zero point, codes and group scale 0, 0 and 1; an all-zero channel has channel scale 1.
    Raises BlockwrightError, with `name`, for weights that are not finite.
    """
    layers.check_finite(w_NK, name)
    w_NK = w_NK.to(gram_KK.dtype)
    few = max(1, CANDIDATES_AT_ONCE // max(1, w_NK.shape[1]))
    parts = [fine_scales(rows, gram_KK, bits=bits, group_size=group_size) for rows in w_NK.split(few)]
    fine_NG, zero_NG = (torch.cat(part) for part in zip(*parts, strict=True))
    scale_N = coarse_scale(w_NK, gram_KK, fine_NG, zero_NG, bits=bits, group_size=group_size).float().to(w_NK.dtype)  # as it is stored
    group_scale_NG = _integer_scales(fine_NG, scale_N)
    steps = _steps(tiles.grouped(w_NK, group_size), group_scale_NG, scale_N, zero_NG, bits)
    half = 2 ** (bits - 1)
    codes = (steps + zero_NG[:, :, None] - half).flatten(1)[:, : w_NK.shape[1]]
    assert float(group_scale_NG.max()) <= LARGEST
    return DualGrained(codes.to(torch.int8), (zero_NG - half).to(torch.int8), group_scale_NG.to(torch.int8), scale_N.float())


@torch.no_grad()
def fine_scales(
    w_NK: Float[Tensor, "N K"], gram_KK: Float[Tensor, "K K"], *, bits: int = 4, group_size: int = 64
) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G"]]:
    """Phase 1: for each output and group on its own, the scale and zero point, of 20 ranges, with the least squared output error.

    The range of a group holds 0 and shrinks from 1.009 to 0.80 of it. The error is d^T (x^T x) d with d = w - rounded w and the part of
    the Gram matrix that belongs to the group. Returns scales (0 for an all-zero group) and zero points, whole numbers in [0, 2**bits - 1].
    """
    w_GNg = tiles.grouped(w_NK, group_size).transpose(0, 1).contiguous()
    gram_Ggg = _diagonal_blocks(gram_KK, w_GNg.shape[0], w_GNg.shape[2])
    levels = 2**bits - 1
    low, high = w_GNg.amin(-1, keepdim=True).clamp(max=0), w_GNg.amax(-1, keepdim=True).clamp(min=0)
    used = high - low > TINY
    least = torch.full_like(low, torch.inf)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for i in range(1, FINE_STEPS + 1):
        r = 1.02 - FINE_RANGE * i / FINE_STEPS
        s = torch.where(used, (high - low) * (r / levels), 1)
        z = torch.round(-low * r / s)
        q = torch.maximum(torch.minimum(w_GNg, high * r), low * r).div_(s).round_().add_(z).clamp_(0, levels)
        d = w_GNg - q.sub_(z).mul_(s)
        error = ((d @ gram_Ggg) * d).sum(-1, keepdim=True)
        better = error < least
        least, scale, zero = torch.where(better, error, least), torch.where(better, s, scale), torch.where(better, z, zero)
    return torch.where(used, scale, 0)[..., 0].T.contiguous(), torch.where(used, zero, 0)[..., 0].T.contiguous()


@torch.no_grad()
def coarse_scale(
    w_NK: Float[Tensor, "N K"],
    gram_KK: Float[Tensor, "K K"],
    fine_NG: Float[Tensor, "N G"],
    zero_NG: Float[Tensor, "N G"],
    *,
    bits: int = 4,
    group_size: int = 64,
) -> Float[Tensor, " N"]:
    """Phase 2: for each output the channel scale, of 80 ratios to max|w| / 127, with the least squared output error over all inputs.

    With a channel scale given, group scales are the integers nearest to fine / scale, and codes are clipped so that no int8 weight exceeds
    127. The error d^T (x^T x) d takes K products a weight. A bound from below takes an eighth: candidates whose bound exceeds the error of
    the one with the least bound are never computed; what is chosen is the least of all 80.
    """
    n, k = w_NK.shape
    ratios = 1.02 - COARSE_RANGE * torch.arange(1, COARSE_STEPS + 1, dtype=torch.float64, device=w_NK.device) / COARSE_STEPS
    top_N = w_NK.abs().amax(1)
    scale_NC = torch.where(top_N[:, None] > TINY, top_N[:, None] / LARGEST * ratios.to(w_NK.dtype), 1.0)
    below_Km = _factor_below(gram_KK, k // 8)
    w_NGg, best = tiles.grouped(w_NK, group_size), []
    for rows in torch.arange(n, device=w_NK.device).split(max(1, CANDIDATES_AT_ONCE // max(1, k * COARSE_STEPS))):
        scale_C, group_scale = scale_NC[rows], _integer_scales(fine_NG[rows, None], scale_NC[rows])
        steps = _steps(w_NGg[rows, None], group_scale, scale_C, zero_NG[rows, None], bits)
        rounded = steps.mul_((group_scale * scale_C[..., None])[..., None])
        d = (w_NGg[rows, None] - rounded).flatten(2)[..., :k]
        bound = (d @ below_Km).square_().sum(-1)
        error = torch.full_like(bound, torch.inf)
        promising = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.argmin(1, keepdim=True), True)
        for _ in range(2):  # first the least bound of each row, then all that could do better
            some = d[promising]
            error[promising] = ((some @ gram_KK) * some).sum(-1)
            promising = (0.999 * bound < error.amin(1, keepdim=True)) & (error == torch.inf)
        best.append(scale_C.gather(1, error.argmin(1, keepdim=True))[:, 0])
    return torch.cat(best)


def weight_only(model: Blueprint) -> Blueprint:
    """The model with each dual-grained linear as a packed one of the same weights, asymmetric, with fp32 scales, and 16-bit activations.

    This is what compressed-tensors and GGUF have a place for. Codes and zero points are the same tensors; scales are kept in memory.
    """
    forms, removed, memory = dict(model.forms), [], {}
    built = model.skeleton()
    for name, form in model.forms.items():
        if form["form"] == "dual_grained":
            forms[name] = {key: value for key, value in form.items() if key != "form"} | {"form": "packed", "symmetric": False}
            old = [f"{name}.{key}" for key in ("group_scale", "channel_weight_scale", "amax")]
            group_scale, channel_scale, _ = model.tensors.read(old).values()
            removed += old
            memory[f"{name}.weight_scale"] = group_scale.float() * channel_scale.float()[:, None]
            memory[f"{name}.weight_shape"] = torch.tensor(layers.size(built.get_submodule(name)))
    places = {name: Place(None, f"weight-only:{name}") for name in memory}
    tensors = model.tensors.replaced(removed, places, {places[name].name: t for name, t in memory.items()})
    return model.edited(forms=forms, tensors=tensors)


def accelerate(model: nn.Module) -> nn.Module:
    """Replace each dual-grained linear of `model` by its fastest form on its device, in place. Returns the model, for use only.

    CPU: int8 weights, expanded once (a byte a weight). GPU: the kernels that expand on the way, for 4 bits and groups of a power of two
    from 32; else int8 weights. What was one tensor stays one.
    """
    forms: dict[tuple[int, int], nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DualGrainedLinear):
            key = (module.weight_packed.data_ptr(), id(module.bias))
            if key not in forms:
                forms[key] = _fast_form(module).train(module.training)
            layers.swap(model, name, forms[key])
    return model


def _inputs(length: int, act_range: str) -> type[Stat]:
    """The Gram matrix of a linear's inputs and their range, over samples of `length` tokens that come whole, one after another."""

    class Inputs:
        """top [K]: the maximum of |x|. range [K]: what `act_range` takes of each channel."""

        def __init__(self, features: int) -> None:
            self.gram, self.top = Gram(features), torch.zeros(features)
            self.range: Tensor | None = None

        def add(self, x: Float[Tensor, "t K"]) -> None:
            if not len(x):
                return
            self.gram.add(x)
            sizes = x.abs()
            samples = sizes.unflatten(0, (-1, length)) if len(x) % length == 0 else sizes[None]  # experts get tokens of any sample
            tops = samples.amax(1)
            self.top = torch.maximum(self.top.to(x.device), tops.amax(0))
            if act_range == "percentile":
                tops = samples.kthvalue(math.ceil(PERCENTILE * samples.shape[1]), dim=1).values
            least = act_range == "min_of_max"
            found = tops.amin(0) if least else tops.amax(0)
            if self.range is None:
                self.range = found
            else:
                self.range = torch.minimum(self.range, found) if least else torch.maximum(self.range, found)

        def summary(self) -> Tensor:
            return self.gram.summary()

        def divide(self, t_K: Float[Tensor, " K"]) -> None:
            """What inputs with channel k divided by t[k] would have given."""
            assert self.range is not None
            self.gram.sum = self.gram.sum / t_K / t_K[:, None]
            self.top, self.range = self.top / t_K, self.range / t_K

        def amax(self) -> float:
            """The largest input that is not clipped; 1 where all inputs were 0."""
            assert self.range is not None
            return float(self.range.max()) or float(self.top.max()) or 1.0

    return Inputs


def _diagonal_blocks(gram_KK: Tensor, groups: int, size: int) -> Float[Tensor, "G g g"]:
    """The parts of the Gram matrix of the groups, the last one padded with zeros."""
    missing = groups * size - len(gram_KK)
    whole = nn.functional.pad(gram_KK, (0, missing, 0, missing)).view(groups, size, groups, size)
    return whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _integer_scales(fine_G: Tensor, scale: Tensor) -> Tensor:
    """Group scales [..., G] for fine scales [..., G] and channel scales [...]: the nearest integers, at least 1."""
    return torch.round(fine_G / scale[..., None]).clamp_(min=1)


def _steps(w_Gg: Tensor, group_scale_G: Tensor, scale: Tensor, zero_G: Tensor, bits: int) -> Tensor:
    """The integers nearest to w / (scale * group_scale), as far as code and int8 weight allow: codes are these plus the zero point."""
    most = torch.floor(LARGEST / group_scale_G)
    low, high = torch.maximum(-zero_G, -most), torch.minimum(2**bits - 1 - zero_G, most)
    steps = torch.round(w_Gg / (group_scale_G * scale[..., None])[..., None])
    return steps.clamp_(low[..., None], high[..., None])


def _factor_below(gram_KK: Float[Tensor, "K K"], rank: int) -> Float[Tensor, "K m"]:
    """F with d^T F F^T d <= d^T gram d for all d, close to it: Nystroem's approximation from a random space of that rank, in fp64."""
    nothing = gram_KK.new_zeros(len(gram_KK), 1)
    gram = gram_KK.double()
    total = float(gram.diagonal().sum())
    if rank < 8 or total <= 0:
        return nothing
    start = torch.randn(len(gram), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(gram.device)
    space = torch.linalg.qr(gram @ start).Q
    image = gram @ space
    inner = space.T @ image
    inner.diagonal().add_(2e-7 * total)  # more than the rounding errors of a Gram matrix summed in fp32
    root, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
    if failed:
        return nothing
    return torch.linalg.solve_triangular(root, image.T, upper=False).T.to(gram_KK.dtype).contiguous()


def _module(block: Block, name: str) -> nn.Module:
    return block.module.get_submodule(name.removeprefix(block.name + "."))


def _place(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()


def _fast_form(stored: DualGrainedLinear) -> nn.Module:
    if stored.weight_packed.is_cuda and importlib.util.find_spec("triton") is not None:
        from blockwright.compress.dgq_triton import KernelLinear

        if KernelLinear.fits(stored):
            return KernelLinear(stored)
    return Int8Linear(stored)


def _check(*, bits: int, group_size: int, act_range: str) -> None:
    """Raise BlockwrightError for the first option that is out of range."""
    if bits not in (4, 8):
        raise BlockwrightError(f"dgq: bits={bits}", allowed="4, 8", do="For other widths use flexround or finequant")
    if group_size == 0 or group_size < -1:
        raise BlockwrightError(f"dgq: group_size={group_size}", allowed="a positive number, or -1 for the row", do="Try group_size=64")
    if act_range not in ACT_RANGES:
        raise BlockwrightError(f"dgq: act_range={act_range!r}", allowed=", ".join(ACT_RANGES))


def _check_linears(run: Run, group_size: int, pad: bool, targets: Targets, ignore: Targets) -> None:
    """Raise BlockwrightError where `targets` names no linear of the chain or, without pad, groups do not divide the inputs of one."""
    linears = layers.block_linears(run.model.skeleton())
    chosen = layers.targeted(linears, targets, ignore)
    if not chosen:
        some = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise BlockwrightError(f"dgq: targets={targets} with ignore={ignore} name no linear", allowed=f"linears of the blocks: {some}")
    for name, m in chosen.items():
        k = layers.size(m)[1]
        if not pad and group_size != -1 and k % group_size:
            fitting = max(g for g in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k % g == 0)
            raise BlockwrightError(
                f"dgq: {name}: group_size {group_size} does not divide in_features {k}", do=f"Use {fitting}, or pad=True"
            )
