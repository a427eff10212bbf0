"""Rounding that is learned: the weights of a block's linears move along their grids until the block gives what it gave when dense.

`reconstruct` learns any `Rounding` of all linears of a block together; `FlexRound` is the one with a divisor a weight, arXiv 2306.00317.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.run import Facts
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import cosine

CHECK_EVERY = 50  # iterations between two looks at the loss over all samples


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
            warnings.warn(f"no calibration token reached {name}; its weights are rounded to nearest", stacklevel=2)
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
