"""Low-bit weights whose rounding is learned block by block: each weight has a divisor of its own, so a large one may move several steps.

Use it for 3 to 5 bits, with a few dozen unlabelled samples and minutes of time; what it writes is as cheap to run as with rounding to
nearest. Not at 8 bits, where rounding to nearest loses next to nothing, and not where no text like that of the later use is at hand.
FlexRound, arXiv 2306.00317; `rank` gives LRQ, arXiv 2407.11534. Re-measure its claim: `blockwright reproduce flexround`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import cosine
from blockwright.errors import BlockwrightError
from blockwright.options import Bits, Count, GroupSize, Positive, Rate, Targets

CARD = {
    "slug": "flexround",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2306.00317",
    "title": "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization",
    "summary": "2- to 8-bit weights, rounded so that each block's output stays; learned from a few samples, block by block",
    "saves": "weight bytes: 3.6x (4 bits, groups of 32) to 5.3x (3 bits, a scale a row)",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "packed",
    "writes": "compressed-tensors pack-quantized",
    "claim": {
        "figure": "LLaMA quantised block by block with negligible loss; per-tensor grids suffice",
        "against": "the 16-bit model; AdaRound and rounding to nearest on the same grid",
        "where": "abstract, section 4",
    },
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECK_EVERY = 50  # iterations between two looks at the loss over all samples
OF_A_LINEAR = ("bits", "strategy", "group_size", "symmetric", "clipping", "scale_dtype", "rank", "learn_s1", "learn_s3")


@stage
def flexround(
    run: Run,
    *,
    bits: Bits = 4,
    strategy: Literal["group", "channel", "tensor"] = "group",
    group_size: GroupSize = 32,
    symmetric: bool = True,
    iters: Count = 200,
    lr: Rate = 1e-2,
    batch_size: Positive = 4,
    rank: Positive | None = None,
    learn_s1: bool = True,
    learn_s3: bool = True,
    clipping: bool = False,
    normalize: bool = True,
    keep_best: bool = True,
    amp: bool = True,
    scale_dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    targets: Targets = ["Linear"],
    ignore: Targets = [],
    overrides: dict[str, dict[str, Any]] = {},
) -> None:
    """Packed codes in every targeted linear, rounded so that each block gives what the dense block gave.

    A block learns on the inputs that it will have, from the blocks quantised before it, towards its output in the dense model. Embeddings,
    head, norms and biases are not touched.

    bits : of a stored weight.
    strategy : what shares a step s1: group (inputs of a row), channel (a row), tensor (the whole matrix).
    group_size : inputs that share a step where strategy is group; -1: the whole row. It must divide the inputs of each linear.
    symmetric : a grid around 0 without zero points. Asymmetric grids open in plain transformers only where all linears have one scheme.
    iters : optimiser steps a block; 0 rounds to nearest.
    lr : Adam's learning rate of the logarithms of the divisors; it falls to 0 along a cosine.
    batch_size : samples in a step.
    rank : None for a divisor a weight (FlexRound); r for their logarithms as a product of rank r plus one number a column (LRQ).
    learn_s1 : learn the step too. False: it stays as rounding to nearest has it.
    learn_s3 : learn a divisor a row too.
    clipping : start from the steps (and zero points) that are best for the weights, by a search that costs 100 roundings (100 * 2**bits
        where asymmetric with at most 4 bits), instead of from min and max.
    normalize : measure each token's error against the size of its target. Else the few tokens whose hidden states are hundreds of times as
        large as the others' rule the loss, as they do in the paper.
    keep_best : look at the loss over all samples before, every 50 steps and at the end, and keep the best codes: no block ends worse than
        rounding to nearest. False: take the last, and save the time.
    amp : multiply matrices in bf16 while learning, where the device has instructions for it. Divisors, losses, Adam and what keep_best
        compares are fp32.
    scale_dtype : of stored steps.
    targets : linears to quantise: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.
    overrides : pattern -> options of single linears that differ there, such as {"down_proj": {"bits": 8}}; later patterns win.

    Raises BlockwrightError before anything is computed for options out of range, patterns that name no linear, and inputs that group_size
    does not divide; later for values that are not finite, by name. Warns of linears that no token reached (experts): they are rounded to
    nearest.
    Source: arXiv 2306.00317, section 3; github.com/onliwad101/FlexRound_LRQ.
    """
    defaults = {
        "bits": bits,
        "strategy": strategy,
        "group_size": group_size,
        "symmetric": symmetric,
        "clipping": clipping,
        "scale_dtype": scale_dtype,
        "rank": rank,
        "learn_s1": learn_s1,
        "learn_s3": learn_s3,
    }
    _check_loop(iters, lr, batch_size)
    chosen = _choose(run, defaults, overrides, targets, ignore)
    loop = partial(reconstruct, iters=iters, lr=lr, batch_size=batch_size, normalize=normalize, keep_best=keep_best, amp=amp)

    def learn(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None and y is not None
        linears = block.linears(targets, ignore)
        if not linears:
            return {"losses": [], "loss": None, "loss_start": None}
        roundings = {name: _start(linear, rng, **chosen[name]) for name, linear in linears.items()}
        return loop(block, roundings, x, y, rng, mask=run.mask)

    found = run.blocks(learn, inputs="treated", target=True, write=True)
    path = layers.chain_path(run.model.skeleton())
    run.curves = {f"{path}.{i}": facts["losses"] for i, facts in enumerate(found) if facts["losses"]}


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    Passes assume samples of 256 tokens. Raises BlockwrightError for options out of range.
    """
    iters, rank = options["iters"], options["rank"]
    _check_loop(iters, options["lr"], options["batch_size"])
    _check_linear("flexround", options)
    looks = 2 + iters // CHECK_EVERY if options["keep_best"] else 0
    learned = iters * 3 * options["batch_size"] * 256 / max(tokens, 1)
    shared = options["group_size"] if options["strategy"] == "group" else -1
    width = 8 * DTYPES[options["scale_dtype"]].itemsize + (0 if options["symmetric"] else options["bits"])
    return {
        "copies": 12 if rank is None else 9,  # weights (here and dense), divisors, gradient, 2 of Adam, 3 of a step, 1 of the result
        "passes": 2 + looks + learned,
        "bits": options["bits"] + (0 if shared == -1 else width / shared),
    }


class Codes(NamedTuple):
    """A quantised matrix as it is stored: (code - zero) * scale."""

    codes: Int8[Tensor, "N K"]
    scale: Float[Tensor, "#N G"]
    zero: Int8[Tensor, "#N G"] | None
    bits: int
    group_size: int

    def weight(self) -> Float[Tensor, "N K"]:
        """In fp32."""
        return tiles.from_codes(self.codes, self.scale, self.zero, group_size=self.group_size)


@runtime_checkable
class Rounding(Protocol):
    """What `reconstruct` learns of a linear: called, it gives the quantised weights [N, K], differentiable; `fold`, what to store."""

    def __call__(self) -> Tensor: ...

    def fold(self) -> Codes: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class FlexRound(nn.Module):
    """Quantised weights s1 * clamp(round(W / (s1 * S2 * s3))), learned through -log S2, log s3 and log(s1 / its start).

    w_NK : fp32 weights, outputs x inputs; referred to, not changed. scale, zero : the grid to start from, as stored: [N, G], or [1, 1] for
    the whole matrix. The start is rounding to nearest, bit for bit. s1 is rounded to the dtype of `scale` in every step, so what is
    learned is what is stored.
    rank : None, or r for S2 of rank r in the logarithm (LRQ): a product that starts at 0, and a number a column.
    rng : for the random factor of that product.
    """

    def __init__(
        self,
        w_NK: Float[Tensor, "N K"],
        scale: Float[Tensor, "#N G"],
        zero: Int8[Tensor, "#N G"] | None,
        *,
        bits: int,
        group_size: int = -1,
        rank: int | None = None,
        learn_s1: bool = True,
        learn_s3: bool = True,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        (n, k), on = w_NK.shape, w_NK.device
        self.w_NK, self.scale, self.zero = w_NK.detach(), scale, zero
        self.bits, self.group_size = bits, group_size

        def zeros(*shape: int, learned: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=on, dtype=w_NK.dtype), requires_grad=learned)

        self.log_s1 = zeros(*scale.shape, learned=learn_s1)  # of s1 over its start
        self.log_s3 = zeros(n, 1, learned=learn_s3)
        if rank is None:
            self.inverse = zeros(n, k)  # -log S2
        else:
            self.left, self.column = zeros(n, rank), zeros(1, k)
            self.right = nn.Parameter(torch.randn(rank, k, generator=rng, device=on, dtype=w_NK.dtype) / math.sqrt(rank))

    def inverse_NK(self) -> Tensor:
        """-log S2."""
        return self.inverse if hasattr(self, "inverse") else self.left @ self.right + self.column

    def s1(self) -> Float[Tensor, "#N G"]:
        """The step as stored, in the dtype of the weights; its gradient is that of the step before it was rounded to what is stored."""
        exact = self.scale.to(self.w_NK.dtype) * self.log_s1.exp()
        return exact + (exact.to(self.scale.dtype).to(exact.dtype) - exact).detach()

    def divisor(self) -> Float[Tensor, "N G"]:
        """s1 * s3, with s1 before it is rounded to what is stored."""
        return self.scale.to(self.w_NK.dtype) * (self.log_s1 + self.log_s3).exp()

    def forward(self) -> Float[Tensor, "N K"]:
        """The quantised weights, differentiable. Only s1 multiplies: they lie on its grid, whatever S2 and s3 are."""
        return cast(Tensor, _Round.apply(self.inverse_NK(), self.w_NK, self.divisor(), self.s1(), self.zero, self.bits))

    @torch.no_grad()
    def fold(self) -> Codes:
        """The codes and steps that give, bit for bit, the weights that `forward` gives."""
        _, code = _divided(self.inverse_NK(), self.w_NK, self.divisor(), self.zero)
        codes = code.clamp_(*_range(self.bits)).to(torch.int8).view_as(self.w_NK)
        return Codes(codes, self.s1().to(self.scale.dtype), self.zero, self.bits, self.group_size)


class _Round(torch.autograd.Function):
    """s1 * (clamp(round(exp(inverse) * w / divisor) + zero) - zero), in few passes over memory.

    inverse, w [N, K]; divisor [N, G]; s1, zero [N or 1, G]. Backward: round passes the gradient on, clamp where it cut nothing off.
    """

    @staticmethod
    def forward(ctx: Any, inverse: Tensor, w: Tensor, divisor: Tensor, s1: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        low, high = _range(bits)
        ratio, code = _divided(inverse, w, divisor, zero)
        inside = torch.ops.aten.hardtanh_backward(ratio, code, low - 0.5, high + 0.5)  # the ratio, 0 where clamp cuts
        q = code.clamp_(low, high) if zero is None else code.clamp_(low, high).sub_(zero.unsqueeze(-1))
        w_hat = q.mul_(s1.unsqueeze(-1))
        ctx.save_for_backward(inside, w_hat, divisor, s1)
        return w_hat.view_as(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, w_hat, divisor, s1 = ctx.saved_tensors
        grad = grads[0].reshape(inside.shape)
        grad_s1 = (grad * w_hat).sum(-1).sum_to_size(s1.shape) / s1 if ctx.needs_input_grad[3] else None
        moved = (grad * inside).mul_(s1.unsqueeze(-1))
        grad_divisor = moved.sum(-1).div_(divisor).neg_() if ctx.needs_input_grad[2] else None
        return moved.flatten(1), None, grad_divisor, grad_s1, None, None


def _divided(inverse: Tensor, w: Tensor, divisor: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """w / (S2 * s1 * s3), and its nearest code (ties to even), not clamped: both [N, G, g]."""
    ratio = torch.exp(inverse).mul_(w).view(*divisor.shape, -1).div_(divisor.unsqueeze(-1))
    code = torch.round(ratio)
    return ratio, code if zero is None else code.add_(zero.unsqueeze(-1))


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class _Learning(nn.Module):
    """A linear while it learns: its weights are what its rounding makes of them, or those in `fixed`."""

    def __init__(self, linear: nn.Module, rounding: Rounding) -> None:
        super().__init__()
        self.linear, self.rounding = linear, rounding
        self.fixed: Tensor | None = None
        self.seen = False  # whether a token came through

    @property
    def weight(self) -> Tensor:
        """The dense weight, for blocks that ask a linear for its dtype."""
        return cast(Tensor, self.linear.weight)

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        self.seen = self.seen or x.numel() > 0
        weight = self.rounding() if self.fixed is None else self.fixed
        return nn.functional.linear(x, weight, cast(Tensor | None, self.linear.bias))


def reconstruct(
    block: Block,
    roundings: Mapping[str, Rounding],
    x: Float[Tensor, "n T d"],
    y: Float[Tensor, "n T d"],
    rng: torch.Generator,
    *,
    iters: int,
    lr: float,
    batch_size: int,
    normalize: bool = True,
    keep_best: bool = True,
    amp: bool = True,
    mask: Int[Tensor, "n T"] | None = None,
    penalty: Callable[[int], Tensor] | None = None,
) -> Facts:
    """Learn the roundings of a block's linears together, so that the block gives y on x; then put packed linears in their places.

    roundings : full name of a linear -> its rounding. x : the block's inputs. y : what the dense block gave. Other options: of `flexround`.
    mask : 1 for tokens that count, 0 for padding. penalty : step number -> what to add to the loss (AdaRound has such a term).
    The loss is the squared error, summed over the tokens of a sample, mean over samples and features. normalize divides each token's by the
    mean square of its target.
    Returns losses (of each step, on its own samples), loss and loss_start (over all samples; None without keep_best).
    Raises BlockwrightError where a loss is not finite. Warns of linears that no token reached.
    """
    inner = {name: name.removeprefix(block.name + ".") for name in roundings}
    learning = {name: _Learning(block.module.get_submodule(inner[name]), rounding) for name, rounding in roundings.items()}
    for name, module in learning.items():
        layers.swap(block.module, inner[name], module)
    parameters = [p for rounding in roundings.values() for p in rounding.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True) if parameters else None
    best = {name: rounding.fold() for name, rounding in roundings.items()}
    weigh = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.to(x.device, torch.float32)
    if normalize:
        size = y.square().mean(-1).sqrt()
        layers.check_finite(size, f"size of the outputs of block {block.name}")
        weigh = weigh / size.clamp(min=1e-8)
    start = lowest = _loss(block, learning, best, x, y, weigh) if keep_best else None
    losses: list[Tensor] = []
    order: list[int] = []
    for i in range(iters if optimizer else 0):
        assert optimizer is not None
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=rng, device=rng.device).tolist()
        rows, order = order[:batch_size], order[batch_size:]
        optimizer.param_groups[0]["lr"] = lr * cosine(i, iters)
        optimizer.zero_grad()
        with _fast_products(x.device, amp):
            out = block(x[rows], rows)
        loss = ((out.float() - y[rows]) * weigh[rows].unsqueeze(-1)).square().sum(1).mean()
        losses.append(loss.detach())
        objective = loss if penalty is None else loss + penalty(i)
        if objective.requires_grad:  # not where none of these samples' tokens came to a linear that learns
            objective.backward()
        optimizer.step()
        if i + 1 == iters or (keep_best and (i + 1) % CHECK_EVERY == 0):
            layers.check_finite(torch.stack(losses), f"losses of block {block.name}")
            now = {name: rounding.fold() for name, rounding in roundings.items()}
            value = _loss(block, learning, now, x, y, weigh) if keep_best else None
            if value is None or lowest is None or value < lowest:
                best, lowest = now, value
    for name, module in learning.items():
        if iters and not module.seen:
            warnings.warn(f"flexround: no calibration token reached {name}; its weights are rounded to nearest", stacklevel=2)
        codes = best[name]
        block.swap(name, PackedLinear.of(module.linear, *codes[:3], bits=codes.bits, group_size=codes.group_size))
    return {"losses": [v.item() for v in losses], "loss": lowest, "loss_start": start}


@torch.no_grad()
def _loss(block: Block, learning: dict[str, _Learning], codes: dict[str, Codes], x: Tensor, y: Tensor, weigh: Tensor) -> float:
    """The loss over all samples, in fp32, of the block with these codes."""
    for name, module in learning.items():
        module.fixed = codes[name].weight()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in batches(len(x), block.batch):
        total += ((block(x[rows], rows) - y[rows]) * weigh[rows].unsqueeze(-1)).square().sum(dtype=torch.float64)
    for module in learning.values():
        module.fixed = None
    layers.check_finite(total, f"loss of block {block.name}")
    return total.item() / (len(y) * y.shape[-1])


def _fast_products(device: torch.device, amp: bool) -> AbstractContextManager[Any]:
    """bf16 in matrix products, where the device has instructions for it."""
    able = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if amp and able else nullcontext()


def initial_grid(
    w_NK: Float[Tensor, "N K"],
    *,
    bits: int,
    strategy: str = "group",
    group_size: int = -1,
    symmetric: bool = True,
    clipping: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "#N G"], Int8[Tensor, "#N G"] | None]:
    """Steps, in `dtype`, and zero points (None: symmetric) to start from. Raises BlockwrightError where a weight is not finite.

    Without clipping: from min and max. With it: of the candidates, the one with the least sum of |w - rounded w|**2.4 in each group. The
    candidates narrow the range to i/100, i = 1..100; asymmetric ones with at most 4 bits try each with every zero point.
    """
    rows = w_NK.reshape(1, -1) if strategy == "tensor" else w_NK
    shared = group_size if strategy == "group" else -1

    def min_max(kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if symmetric:
            return tiles.symmetric_scale(rows, bits=bits, group_size=shared, dtype=kind), None
        return tiles.asymmetric_grid(rows, bits=bits, group_size=shared, dtype=kind)

    scale, zero = min_max(dtype)
    if not clipping:
        return scale, zero
    whole, _ = min_max(torch.float32)
    groups = tiles.grouped(rows, shared).float()
    least = _distance(groups, scale, zero, bits)
    for percent in range(1, 101):
        narrowed = (whole * (percent / 100)).to(dtype)
        for candidate in _zeros(zero, groups, narrowed, bits):
            distance = _distance(groups, narrowed, candidate, bits)
            better = distance < least  # false where the step vanished in `dtype`
            least = torch.where(better, distance, least)
            scale = torch.where(better, narrowed, scale)
            zero = None if zero is None or candidate is None else torch.where(better, candidate, zero)
    return scale, zero


def _zeros(zero: Tensor | None, groups: Tensor, scale: Tensor, bits: int) -> Iterator[Tensor | None]:
    """The zero points to try with a step."""
    low, high = _range(bits)
    if zero is None:
        yield None
    elif bits <= 4:
        for value in range(low, high + 1):
            yield torch.full_like(zero, value)
    else:  # where the narrowed range, of the same shape, has it
        below = groups.amin(-1).clamp(max=0)
        span = groups.amax(-1).clamp(min=0) - below
        share = (-below / span.clamp(min=tiles.TINY) * (high - low)).round().clamp(0, high - low)
        yield (share + low).to(torch.int8)


def _distance(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Sum of |w - rounded w|**2.4 of each group."""
    step = scale.float().unsqueeze(-1)
    shift = 0 if zero is None else zero.float().unsqueeze(-1)
    q = (groups / step).round_().add_(shift).clamp_(*_range(bits)).sub_(shift).mul_(step)
    return q.sub_(groups).abs_().pow_(2.4).sum(-1)


def _start(linear: nn.Module, rng: torch.Generator, **options: Any) -> FlexRound:
    """The rounding of a linear, at rounding to nearest."""
    w_NK = layers.matrix(linear).contiguous()
    grid = {key: options[key] for key in ("bits", "strategy", "group_size", "symmetric", "clipping")}
    scale, zero = initial_grid(w_NK, dtype=DTYPES[options["scale_dtype"]], **grid)
    shared = options["group_size"] if options["strategy"] == "group" else -1
    learned = {key: options[key] for key in ("rank", "learn_s1", "learn_s3")}
    return FlexRound(w_NK, scale, zero, bits=options["bits"], group_size=shared, rng=rng, **learned)


def _choose(
    run: Run, defaults: dict[str, Any], overrides: dict[str, dict[str, Any]], targets: Targets, ignore: Targets
) -> dict[str, dict[str, Any]]:
    """Full name of each linear to quantise -> its options, checked."""
    _check_linear("flexround", defaults)
    linears = layers.targeted(layers.block_linears(run.model.skeleton()), targets, ignore)
    if not linears:
        raise BlockwrightError(
            f"flexround: targets={targets} and ignore={ignore} leave no linear",
            allowed='names of linears in the blocks, "Linear", or "re:<regex>"',
            do="See `blockwright inspect` for the names",
        )
    chosen = {name: dict(defaults) for name in linears}
    for pattern, values in overrides.items():
        for option in values:
            if option not in OF_A_LINEAR:
                raise BlockwrightError(f"flexround: overrides[{pattern!r}]: {option}", allowed=", ".join(OF_A_LINEAR))
        _check_linear(f"flexround: overrides[{pattern!r}]", defaults | values)
        named = [name for name, linear in linears.items() if layers.selected(name, linear, [pattern], [])]
        if not named:
            raise BlockwrightError(f"flexround: overrides[{pattern!r}] names no linear", allowed="names as in targets")
        for name in named:
            chosen[name] |= values
    for name, options in chosen.items():
        k, group = layers.size(linears[name])[1], options["group_size"]
        if options["strategy"] == "group" and group != -1 and k % group:
            fits = next(g for g in range(min(group, k), 0, -1) if k % g == 0)
            raise BlockwrightError(
                f"flexround: {name}: in_features {k} not divisible by group_size {group}",
                allowed=f"a divisor of {k}, or -1 for the whole row",
                do=f"Use group_size={fits}, or give this linear one of its own in overrides",
            )
    return chosen


def _check_linear(where: str, options: Mapping[str, Any]) -> None:
    if not 2 <= options["bits"] <= 8:
        raise BlockwrightError(f"{where}: bits={options['bits']}", allowed="2 to 8", do="Try bits=4")
    if options["strategy"] not in ("group", "channel", "tensor"):
        raise BlockwrightError(f"{where}: strategy={options['strategy']!r}", allowed="group, channel, tensor")
    if options["scale_dtype"] not in DTYPES:
        raise BlockwrightError(f"{where}: scale_dtype={options['scale_dtype']!r}", allowed=", ".join(DTYPES))
    if options["group_size"] == 0 or options["group_size"] < -1:
        raise BlockwrightError(
            f"{where}: group_size={options['group_size']}",
            allowed="a positive number of inputs, or -1 for the whole row",
            do="Try group_size=32",
        )
    if options["rank"] is not None and options["rank"] < 1:
        raise BlockwrightError(f"{where}: rank={options['rank']}", allowed="1 or more, or None", do="Try rank=32")


def _check_loop(iters: int, lr: float, batch_size: int) -> None:
    if iters < 0:
        raise BlockwrightError(f"flexround: iters={iters}", allowed="0 or more", do="Try iters=200")
    if not 0 < lr < math.inf:
        raise BlockwrightError(f"flexround: lr={lr}", allowed="a positive number", do="Try lr=0.01")
    if batch_size < 1:
        raise BlockwrightError(f"flexround: batch_size={batch_size}", allowed="1 or more", do="Try batch_size=4")
