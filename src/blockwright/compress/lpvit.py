"""Prunes tiles of the linear layers, how many in each being decided by distortion curves under one budget of multiplications, and can
repair the result by a little training against the dense model.

Use it when a vision transformer must do less work on hardware or kernels that skip whole tiles: small tiles on accelerators, 64 x 64 on
GPUs and CPUs. Not where only dense products run (zeros are then multiplied like any number), and not far below half of the multiplications
without fine-tuning. Equal shares for all layers ruin a model at once. One list of all layers' tiles, ranked by distortion (`allocation:
global, ranking: distortion`), is as good at half of the multiplications, where curves move the outputs a tenth less, and better at a
third: on a small vision transformer by 1.6 points. Language models work too.

LPViT, arXiv 2407.02068. Re-measure its claim: `blockwright reproduce lpvit`.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers
from blockwright.blocks.block_sparse import BlockSparseLinear, GatheredLinear, joined, tile_sums
from blockwright.blocks.curves import convex, derivative, smoothed
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Run, stage
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import cosine, kl_of_tokens, mean_of_real, next_token_loss
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Positive, Rate, Share, Targets

CARD = {
    "slug": "lpvit",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2407.02068",
    "title": "LPViT: Low-Power Semi-structured Pruning for Vision Transformers",
    "summary": "prunes tiles of linears under a budget of multiplications, the share of each layer found from distortion curves",
    "saves": "multiplications and power where whole tiles are skipped; bytes of the pruned tiles",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "block sparse",
    "writes": "the kept tiles in our own layout, or `export: dense` with zeros",
    "layouts": ["dense"],
    "claim": {"figure": "up to 3.93x on dedicated hardware, 1.79x on GPUs", "against": "dense DeiT-B", "where": "abstract"},
}

GRID = 100  # a curve has a point for each hundredth of the tiles
LEAST = 0.05  # a layer keeps at least this share of its tiles, or half of the budget's where that is less
CURVATURE = 1e-7  # c in the Hessian g g^T + c I
POWER_WIDTH = 16  # inputs that a unit of the power term reads at once
CHOICES = {
    "ranking": ("taylor", "distortion", "l1"),
    "allocation": ("curves", "uniform", "global"),
    "fisher": ("samples", "mean"),
    "power_sign": ("paper", "official"),
}
WEIGHT_DECAY, SMOOTHING, WARM_UP = 0.05, 0.1, 0.1  # of DeiT's recipe: AdamW's; of labels; share of the steps in which the rate rises


@dataclass
class Layer:
    """A linear, or a convolution outside the chain, whose weight is pruned as a matrix [N, K].

    tile : clipped to the matrix. keep : which tiles stay. positions : products with the matrix for one sample (tokens, or places of an
    image).
    """

    name: str
    module: nn.Module
    tile: tuple[int, int]
    keep: Bool[Tensor, "R C"]
    positions: int = 0

    @classmethod
    def of(cls, name: str, module: nn.Module, tile: tuple[int, int]) -> "Layer":
        """With all its tiles, clipped to the matrix."""
        n, k = layers.matrix(module).flatten(1).shape
        r, c = min(tile[0], n), min(tile[1], k)
        return cls(name, module, (r, c), torch.ones(-(-n // r), -(-k // c), dtype=torch.bool))

    def matrix(self, like_weight: Tensor) -> Float[Tensor, "N K"]:
        """A view of what has the shape of the module's weight, as outputs x inputs; of a convolution [out, in * kh * kw]."""
        return like_weight.T if isinstance(self.module, Conv1D) else like_weight.flatten(1)

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """A view of the weight, without gradients."""
        return layers.matrix(self.module).flatten(1)

    def mask(self) -> Bool[Tensor, "N K"]:
        """True for the weights in kept tiles."""
        n, k = self.weight.shape
        return joined(self.keep[:, :, None, None].expand(-1, -1, *self.tile), n, k).to(self.weight.device)

    def prune(self, gone: Int[Tensor, " g"]) -> None:
        """Make these tiles zeros, counted in rows of tiles."""
        self.keep.view(-1)[gone] = False
        self.weight.mul_(self.mask())


class TileSums(NamedTuple):
    """Of one layer, fp64, for each of its tiles, in rows of tiles; means are over the gradients g_s of each sample, or over one alone.

    taylor : mean sum |w g_s|. l1 : sum |w|. square : mean sum (w g_s)^2. norm : sum w^2. weights : how many weights it holds.
    slopes : sum w g_s, for each s.
    """

    taylor: Float[Tensor, " n"]
    l1: Float[Tensor, " n"]
    square: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    slopes: Float[Tensor, "s n"]


@stage
def lpvit(
    run: Run,
    *,
    amount: Share = 0.5,
    block_size: list[int] = [32, 32],
    ranking: Literal["taylor", "distortion", "l1"] = "taylor",
    allocation: Literal["curves", "uniform", "global"] = "curves",
    fisher: Literal["samples", "mean"] = "samples",
    smooth: Share = 0.1,
    lambda_power: float = 0.0,
    power_sign: Literal["paper", "official"] = "paper",
    targets: Targets = ["Linear", "Conv2d"],
    ignore: Targets = [],
    epochs: Count = 0,
    lr: Rate = 5e-4,
    alpha: float = 0.5,
    labels: list[int] = [],
    batch_size: Positive = 64,
) -> None:
    """Keep those tiles of each linear that the output needs most, within (1 - amount) of the multiplications.

    Calibration is images [n, C, H, W] (in memory) or token ids; no labels are needed. The linears of the chain are pruned and, outside it,
    convolutions (a vision model's patch embedding, which keeps its form, with zeros); heads and token embeddings are not. The whole model
    is resident in fp32, twice while it is fine-tuned.

    amount : share of the multiplications of these layers to prune; the budget is met to within one tile, never exceeded.
    block_size : rows and columns of a tile, clipped to smaller matrices; tiles at the border may be smaller.
    ranking : which tiles of a layer go first: those of the least mean |weight * gradient| (taylor), of the least distortion where each
        alone is removed, or of the least mean |weight| (l1).
    allocation : how many go in each layer: by distortion curves; the same share everywhere; or the least scores of all layers together.
    fisher : the gradients behind curves and ranking: of each sample's outputs with random signs, which tell how far they move (samples);
        or one, the mean over the data of that of the mean square output (mean; the official code, faster).
    smooth : weight of the past in the moving average over a curve; the paper's code has 0.9 for its largest model and 0.1 for small ones.
    lambda_power : weight of the power term, relative to the distortion at its steepest; 1 in the official code. 0 ignores power.
    power_sign : the power of the tiles that stay (paper), or of those that go (official), is what the term makes dear.
    targets : layers to prune: a class name, a dotted name or its end, or "re:<regex>".
    ignore : layers to leave dense, in the same form.
    epochs : passes over the calibration data to fine-tune all weights that stay; 0: none.
    lr : AdamW's highest learning rate; it rises linearly over the first tenth of the steps and falls to 0 as a cosine.
    alpha : weight of KL(dense || this model); the rest is on labels, or on the next token of a text. Without labels it is 1.
    labels : the class of each calibration image, in their order.
    batch_size : samples in a batch, of gradients with fisher=mean and of fine-tuning.

    Raises BlockwrightError before anything is computed for options out of range, a model that is not dense, targets that name no layer and
    tiles larger than a matrix; then for gradients that are not finite (the layer named), and a budget that the least share of each layer
    exceeds. Warns where a layer has no gradient: |weight| ranks its tiles then.
    """
    _check_options(
        amount=amount, block_size=block_size, ranking=ranking, allocation=allocation, fisher=fisher, smooth=smooth,
        lambda_power=lambda_power, power_sign=power_sign, epochs=epochs, lr=lr, alpha=alpha, batch_size=batch_size,
    )  # fmt: skip
    _check_data(run, labels)
    model = run.model.build(device=run.device, dtype=torch.float32)
    found = prunable(model, (block_size[0], block_size[1]), targets, ignore)
    count_positions(model, found, cast(Tensor, run.calibration)[:1].to(run.device))
    found = [layer for layer in found if layer.positions]

    sums = statistics(run, model, found, fisher=fisher, batch_size=batch_size)
    scores = [tile_scores(layer.name, s, ranking) for layer, s in zip(found, sums, strict=True)]
    orders = [score.argsort(stable=True) for score in scores]
    costs = [(s.weights[o].long() * layer.positions).tolist() for layer, s, o in zip(found, sums, orders, strict=True)]
    floors = [math.ceil(len(o) * min(LEAST, (1 - amount) / 2) - 1e-9) for o in orders]
    if allocation == "curves":
        curves = [distortion_curve(s, o) for s, o in zip(sums, orders, strict=True)]
        units = [layer.keep.numel() * layer.weight.shape[1] / POWER_WIDTH * layer.positions for layer in found]
        power = lambda_power if power_sign == "paper" else -lambda_power
        prices = curve_prices(curves, [sum(c) for c in costs], units, smooth=smooth, power=power)
    elif allocation == "global":
        prices = [score[o].numpy() for score, o in zip(scores, orders, strict=True)]
    else:
        prices = [(np.arange(len(o)) + 0.5) / len(o) for o in orders]
    gone = allocate(prices, costs, floors, (1 - amount) * sum(map(sum, costs)))
    for layer, order, count in zip(found, orders, gone, strict=True):
        layer.prune(order[:count])

    if epochs:
        finetune(run, model, found, epochs=epochs, lr=lr, alpha=alpha, labels=labels, batch_size=batch_size)
    run.model = _with_outside(run, model)
    run.blocks(partial(_take, model=model, pruned={layer.name: layer for layer in found}, entering=run.model), write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight.

    resident : fp32 copies of the whole chain in memory: weights, gradients and two sums of them, or the teacher and AdamW's state.
    Raises BlockwrightError for options out of range.
    """
    _check_options(**options)
    tuned = options["epochs"] > 0
    return {"copies": 2, "passes": 3 + 4 * options["epochs"], "bits": 16 * (1 - options["amount"]), "resident": 5 if tuned else 4}


def prunable(model: nn.Module, tile: tuple[int, int], targets: Targets, ignore: Targets) -> list[Layer]:
    """The linears of the chain and the convolutions outside it that `targets` names, without those that share the weight of one before.

    Raises BlockwrightError where there is none, and where the tile is larger than a matrix in both directions.
    """
    chain = layers.chain_path(model) + "."
    outside = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and not n.startswith(chain)}
    found: dict[int, Layer] = {}
    for name, module in layers.targeted(outside | layers.block_linears(model), targets, ignore).items():
        layer = found.setdefault(id(module.weight), Layer.of(name, module, tile))
        n, k = layer.weight.shape
        if tile[0] > n and tile[1] > k:
            raise BlockwrightError(
                f"lpvit: block_size={list(tile)}: {name} is {n} x {k}",
                allowed="a tile that is no larger than every matrix in one direction or both",
                do=f"Use smaller tiles, or add {name.rpartition('.')[2]!r} to ignore",
            )
    if not found:
        raise BlockwrightError(
            f"lpvit: targets={targets} with ignore={ignore} name no layer",
            allowed="a class name, a dotted name or its end, or re:<regex>",
            do="See `blockwright inspect` for the names",
        )
    return list(found.values())


@torch.no_grad()
def count_positions(model: nn.Module, found: list[Layer], sample: Tensor) -> None:
    """Set `positions` of each layer, from one forward pass of one sample [1, ...]; 0 for a layer that does not run."""

    def heard(layer: Layer, module: nn.Module, args: Any, out: Tensor) -> None:
        layer.positions += out.numel() // layer.weight.shape[0]

    handles = [layer.module.register_forward_hook(partial(heard, layer)) for layer in found]
    model(sample)
    for handle in handles:
        handle.remove()


# gradients and scores of tiles


def statistics(run: Run, model: nn.Module, found: list[Layer], *, fisher: Literal["samples", "mean"], batch_size: int) -> list[TileSums]:
    """The sums of each layer over the calibration data, in eval mode: from the gradient of `signed_output` of each sample, or from the
    mean gradient of `output_energy` over batches.

    Raises BlockwrightError naming the layer whose gradient is not finite.
    """
    samples, rng = cast(Tensor, run.calibration), run.generator("signs")
    weights = [cast(nn.Parameter, layer.module.weight).requires_grad_() for layer in found]
    sums = [Gradients(layer.weight, layer.tile) for layer in found]
    mean = [torch.zeros_like(layer.weight) for layer in found]
    for rows in batches(len(samples), 1 if fisher == "samples" else batch_size):
        run.progress(f"{run.stage} gradients", rows.start, len(samples))
        real = None if run.mask is None else run.mask[rows].to(run.device)
        out = _logits(model, samples[rows].to(run.device), real)
        scalar = signed_output(out, real, rng) if fisher == "samples" else output_energy(out, real)
        gradients = torch.autograd.grad(scalar, weights, allow_unused=True, materialize_grads=True)
        for i, (layer, gradient) in enumerate(zip(found, gradients, strict=True)):
            layers.check_finite(gradient, f"lpvit: gradient of {layer.name}")
            if fisher == "samples":
                sums[i].add(layer.matrix(gradient))
            else:
                mean[i] += layer.matrix(gradient) * (len(out) / len(samples))
    for i, weight in enumerate(weights):
        weight.requires_grad_(False)
        if fisher == "mean":
            sums[i].add(mean[i])
        layers.check_finite(sums[i].square, f"lpvit: squared gradient of {found[i].name}")
    return [s.sums() for s in sums]


def output_energy(out: Tensor, real: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """mean(out^2), over real tokens."""
    square = out.square()
    return square.mean() if square.dim() < 3 else mean_of_real(square.mean(-1), real)


def signed_output(out: Tensor, real: Int[Tensor, "b T"] | None, rng: torch.Generator) -> Float[Tensor, ""]:
    """The outputs of a sample with random signs, added up, over the root of their number (of real tokens).

    The mean over signs of (gradient . D)^2 is the mean square by which D changes the outputs, to first order: their curvature, where the
    gradient of mean(out^2) sees changes along the outputs themselves alone.
    """
    signs = (torch.randint(0, 2, out.shape, generator=rng, device=out.device) * 2 - 1).to(out.dtype)
    if real is not None and out.dim() == 3:
        signs = signs * real[..., None]
    return (signs * out).sum() / signs.abs().sum().sqrt()


class Gradients:
    """What TileSums need of the gradients of a layer, added one by one."""

    def __init__(self, w_NK: Float[Tensor, "N K"], tile: tuple[int, int]) -> None:
        self.w, self.tile = w_NK, tile
        self.absolute, self.square = torch.zeros_like(w_NK), torch.zeros_like(w_NK)
        self.slopes: list[Tensor] = []

    def add(self, g_NK: Float[Tensor, "N K"]) -> None:
        """One more."""
        product = self.w * g_NK
        self.absolute += product.abs()
        self.square += product.square()
        self.slopes.append(tile_sums(product, self.tile).cpu())

    def sums(self) -> TileSums:
        """The sums over all."""
        n, w = len(self.slopes), self.w.double()
        taylor, l1, square, norm, weights = (
            tile_sums(value, self.tile).cpu() for value in (self.absolute / n, w.abs(), self.square / n, w**2, torch.ones_like(w))
        )
        return TileSums(taylor, l1, square, norm, weights, torch.stack(self.slopes))


def tile_scores(name: str, sums: TileSums, ranking: Literal["taylor", "distortion", "l1"]) -> Float[Tensor, " n"]:
    """What each tile is ranked by: the distortion where it alone is removed, sum |weight * gradient| or sum |weight|, per weight.

    Warns where no weight has a gradient, and takes |weight|.
    """
    if ranking != "l1" and not bool(sums.taylor.any()):
        warnings.warn(f"lpvit: {name} has no gradient; |weight| ranks its tiles", stacklevel=2)
        ranking = "l1"
    alone = distortion(sums.square, sums.slopes, sums.norm, sums.weights.sum())
    return {"distortion": alone, "taylor": sums.taylor, "l1": sums.l1}[ranking] / sums.weights


# curves


def distortion(
    square: Float[Tensor, " n"], slopes: Float[Tensor, "s n"], norm: Float[Tensor, " n"], weights: Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    """mean_s (mean((D g_s)^2) + (g_s . D)^2 / 2) + c |D|^2 / 2 of a layer of so many weights, where D = -w on what is removed.

    square, slopes, norm : the sums of what is removed. Source: arXiv 2407.02068, its second-order term in closed form.
    """
    return square / weights + (slopes.square().mean(0) + CURVATURE * norm) / 2


def distortion_curve(sums: TileSums, order_n: Int[Tensor, " n"]) -> Float[np.ndarray, " points"]:
    """The distortion at each hundredth of the tiles removed in this order, 101 points."""
    square, slopes, norm = (pad(values[..., order_n].cumsum(-1), (1, 0)) for values in (sums.square, sums.slopes, sums.norm))
    n = len(order_n)
    removed = [n - int(n * (GRID - d) / GRID + 1e-9) for d in range(GRID + 1)]
    return cast(np.ndarray, distortion(square, slopes, norm, sums.weights.sum())[removed].numpy())


# allocation


def curve_prices(
    curves: Sequence[np.ndarray], work: Sequence[int], power_units: Sequence[float], *, smooth: float, power: float
) -> list[np.ndarray]:
    """What each removed tile of each layer costs the objective per multiplication that it saves, at every point of the grid.

    The objective is sum of dist + beta P over layers, where P(a) = (1 - a) power_units, and beta = power * mean max dist' / mean max |P'|.
    Equal prices are equal slopes: d objective / d multiplications is the same in every layer. work : multiplications of the dense layers.
    """
    slopes = [np.maximum.accumulate(derivative(convex(smoothed(curve, smooth)))) for curve in curves]
    beta = power * float(np.mean([s.max() for s in slopes])) / float(np.mean(power_units))
    return [(s - beta * unit) / w for s, unit, w in zip(slopes, power_units, work, strict=True)]


def allocate(prices: Sequence[np.ndarray], costs: Sequence[Sequence[int]], floors: Sequence[int], budget: float) -> list[int]:
    """How many tiles to remove in each layer: the cheapest of all layers, until what stays is within the budget.

    prices : nondecreasing, one for each tile in the order of removal, or on the grid of shares, between whose points it is interpolated.
    costs : multiplications of each tile in that order. floors : how many tiles of each layer stay at least. Of equal prices the smaller
    share of its layer goes first. A smaller budget removes the same tiles and more.
    Raises BlockwrightError where the floors exceed the budget.
    """
    price, share, owner, cost = [], [], [], []
    for i, (p, c, floor) in enumerate(zip(prices, costs, floors, strict=True)):
        n = len(c)
        place = (np.arange(n) + 0.5) / n
        price.append((p if len(p) == n else np.interp(place, np.linspace(0, 1, len(p)), p))[: n - floor])
        share.append(place[: n - floor])
        owner.append(np.full(n - floor, i))
        cost.append(np.asarray(c[: n - floor], dtype=np.int64))
    order = np.lexsort((np.concatenate(share), np.concatenate(price)))
    whole = sum(map(sum, costs))
    left = whole - np.concatenate([[0], np.concatenate(cost)[order].cumsum()])
    if left[-1] > budget:
        raise BlockwrightError(
            f"lpvit: amount={1 - budget / whole:.4g}: the tiles that every layer keeps need {left[-1] / whole:.4g} of the multiplications",
            allowed=f"an amount of at most {math.floor((1 - left[-1] / whole) * 1e4) / 1e4}",
            do="Prune less, or use smaller tiles",
        )
    removed = np.concatenate(owner)[order][: int(np.argmax(left <= budget))]
    return np.bincount(removed, minlength=len(costs)).tolist()


# fine-tuning


def finetune(
    run: Run, model: nn.Module, found: list[Layer], *, epochs: int, lr: float, alpha: float, labels: list[int], batch_size: int
) -> None:
    """Train every floating-point weight of the pruned model that is not in a pruned tile, in eval mode, against the dense model.

    DeiT's recipe (arXiv 2012.12877) without its augmentations: AdamW, warm-up, cosine, soft distillation, label smoothing.
    """
    teacher = run.model.build(device=run.device, dtype=torch.float32)
    samples, classes = cast(Tensor, run.calibration), torch.tensor(labels, dtype=torch.long)
    parameters = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    handles = [hold_masked(layer) for layer in found]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    per_epoch = -(-len(samples) // batch_size)
    steps = epochs * per_epoch
    warm = math.ceil(WARM_UP * steps)

    def schedule(i: int) -> None:
        rate = (i + 1) / warm if i < warm else cosine(i - warm, max(1, steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate

    def loss(i: int, rng: torch.Generator) -> Tensor:
        epoch, at = divmod(i, per_epoch)
        shuffled = torch.randperm(len(samples), generator=run.generator("epoch", epoch), device=run.device).cpu()
        rows = shuffled[at * batch_size : (at + 1) * batch_size]
        x, real = samples[rows].to(run.device), None if run.mask is None else run.mask[rows].to(run.device)
        with torch.no_grad():
            wanted = _logits(teacher, x, real)
        logits = _logits(model, x, real)
        soft = distillation(logits, wanted, real)
        if x.dim() == 2:
            return alpha * soft + (1 - alpha) * next_token_loss(logits, x, real)
        if not labels:
            return soft
        return alpha * soft + (1 - alpha) * cross_entropy(logits, classes[rows].to(run.device), label_smoothing=SMOOTHING)

    run.curves["fine-tuning: loss"] = run.train(loss, optimizer, steps=steps, before=schedule)
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)


def hold_masked(layer: Layer) -> Any:
    """Keep pruned weights, which are 0 now, at 0: their gradient becomes 0, so no new optimiser moves them. Returns the hook's handle."""
    mask = layer.mask()

    def masked(gradient: Tensor) -> Tensor:
        out = gradient.clone(memory_format=torch.contiguous_format)
        layer.matrix(out).mul_(mask)
        return out

    return cast(Tensor, layer.module.weight).register_hook(masked)


def distillation(logits: Tensor, wanted: Tensor, real: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """KL(wanted || logits), in nats, averaged over samples and real tokens."""
    kl = kl_of_tokens(wanted, logits)
    return kl.mean() if kl.dim() < 2 else mean_of_real(kl, real)


def _logits(model: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
    """Classes [b, classes] for images, the mean of both heads where a model has two; tokens [b, T, V] for token ids."""
    out = model(x, attention_mask=real, use_cache=False) if x.dim() == 2 else model(x)
    return cast(Tensor, out.logits)


# keeping the result, and running it


def _with_outside(run: Run, model: nn.Module) -> Blueprint:
    """The run's model with new values of the tensors outside the chain (patch embedding; with fine-tuning norms, heads)."""
    inside, tensors = layers.chain_path(model) + ".", run.model.tensors
    new = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(inside) and p.is_floating_point()}
    first: dict[Place, str] = {}
    for name in new:
        first.setdefault(tensors[name], name)  # what was one tensor stays one
    added = {name: Place(None, f"{run.stage}:{first[tensors[name]]}") for name in new}
    memory = {f"{run.stage}:{name}": new[name].detach().to("cpu", tensors.facts(name).dtype) for name in first.values()}
    for name, value in memory.items():
        layers.check_finite(value, name)
    return run.model.edited(tensors=tensors.replaced(new, added, memory))


def _take(
    block: Block,
    x: Tensor | None,
    y: Tensor | None,
    rng: torch.Generator,
    *,
    model: nn.Module,
    pruned: dict[str, Layer],
    entering: Blueprint,
) -> None:
    """Give a block what the resident model has there, and its pruned linears their kept tiles alone."""
    for name, parameter in block.module.named_parameters():
        parameter.data.copy_(model.get_parameter(f"{block.name}.{name}"))
    for name, linear in block.linears().items():
        if name in pruned:
            layer, dtype = pruned[name], entering.tensors.facts(f"{name}.weight").dtype
            block.swap(name, BlockSparseLinear.of(linear, layer.keep.to(layer.weight.device), layer.tile, dtype))


def accelerate(model: nn.Module) -> nn.Module:
    """Replace each block-sparse linear of `model` by its fastest form on its device, in place. Returns the model, for use only.

    GPU: the Triton kernel, for 16-bit weights in tiles of 16 to 128. CPU: one product for each row of tiles, where tiles are tall and few
    are kept. Everything else is made dense once. What was one tensor stays one.
    """
    forms: dict[tuple[int, int], nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BlockSparseLinear):
            key = (id(module.values), id(module.bias))
            if key not in forms:
                forms[key] = _fast_form(module).train(module.training)
            layers.swap(model, name, forms[key])
    return model


def _fast_form(stored: BlockSparseLinear) -> nn.Module:
    """The module to run in place of a stored one."""
    if not stored.values.is_cuda and GatheredLinear.pays(stored):
        return GatheredLinear(stored)
    fits = stored.values.is_cuda and stored.values.dtype.itemsize == 2 and min(stored.tile) >= 16 and max(stored.tile) <= 128
    if fits and importlib.util.find_spec("triton") is not None:
        from blockwright.compress import lpvit_triton

        stored.product = lpvit_triton.product
        return stored
    dense = nn.Linear(stored.in_features, stored.out_features, bias=False, device="meta")
    dense.weight, dense.bias = nn.Parameter(stored.dense(), requires_grad=False), stored.bias
    return dense


def _check_options(**options: Any) -> None:
    """Raise BlockwrightError for the first option that is out of range."""
    ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
        "amount": (lambda v: 0 <= v < 1, "0 <= amount < 1"),
        "block_size": (lambda v: len(v) == 2 and min(v) >= 1, "two positive numbers: rows and columns of a tile"),
        "smooth": (lambda v: 0 <= v < 1, "0 <= smooth < 1"),
        "lambda_power": (lambda v: 0 <= v < math.inf, "0 or more; 0 ignores power"),
        "epochs": (lambda v: v >= 0, "0 or more"),
        "lr": (lambda v: 0 < v < math.inf, "a positive number"),
        "alpha": (lambda v: 0 <= v <= 1, "0 <= alpha <= 1"),
        "batch_size": (lambda v: v >= 1, "1 or more"),
        **{name: (lambda v, words=words: v in words, ", ".join(words)) for name, words in CHOICES.items()},  # type: ignore[misc]
    }
    for name, (good, allowed) in ranges.items():
        if not good(options[name]):
            raise BlockwrightError(f"lpvit: {name}={options[name]!r}", allowed=allowed)


def _check_data(run: Run, labels: list[int]) -> None:
    """Raise BlockwrightError for a model that is not dense, and for data that is missing or does not fit."""
    if run.calibration is None:
        raise BlockwrightError(
            f"{run.stage}: needs calibration text or images",
            do="Give `calibration:` in the recipe, or calibration=images [n, C, H, W] or token_ids [n, T]",
        )
    other = next((f"{name} is {form['form']}" for name, form in run.model.forms.items() if form["form"] != "linear"), None)
    if other:
        raise BlockwrightError(f"lpvit: {other}", allowed="a dense model", do="Prune first, then treat what stays")
    if labels and (run.calibration.dim() != 4 or len(labels) != len(run.calibration)):
        raise BlockwrightError(
            f"lpvit: {len(labels)} labels for calibration data {list(run.calibration.shape)}",
            allowed="one class for each calibration image",
        )
