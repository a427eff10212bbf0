"""Factors weight matrices that are nearly of low rank into two thin ones, each to a rank of its own, without data; then trains only those
factors, if text is given.

Use it to save multiplications as well as bytes where matrices are large and their spectra fall fast, or to fine-tune a small part of a
model that gets a little smaller on the way. Not where only bytes count: 8-bit weights halve them at almost no loss, while low rank takes
no more than a few percent off a small model before it needs fine-tuning. Quantising the factors afterwards adds both savings.

WeLore, arXiv 2407.11239. Re-measure its claim: `blockwright reproduce welore`.
"""

import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from blockwright.blocks import budget, layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.low_rank import LowRankLinear, factors
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
from blockwright.blocks.tuning import Feed, block_vectors, chain, cosine, kept_for_backward
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Positive, Rate, Share, Targets

CARD = {
    "slug": "welore",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2407.11239",
    "title": "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    "summary": "low-rank factors, each of a rank that follows from the singular values of all; fine-tuning of the factors alone",
    "saves": "parameters and multiplications of the matrices that are factored, alike; memory of fine-tuning",
    "needs": [],
    "text_for": ["finetune"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "our own layout with two thin matrices for one; `export: dense` multiplies them out",
    "layouts": ["unrolled", "dense"],
    "claim": {
        "figure": "a 50 % compressed model tuned by its factors alone beats full fine-tuning, with 3x throughput and 0.6x memory",
        "against": "full fine-tuning of the dense model",
        "where": "abstract, LLaMA-2 7B",
    },
}

FLAT = 1e-5  # singular values that differ by no more than this share of the largest are the same one, computed
CHOICES = 64  # ranks that allocator="energy" weighs for a matrix
GAP = 1e-4  # how near to the best its choice is, as a share of the energy at stake
WARM_UP, FLOOR = 0.1, 0.1  # of fine-tuning: share of the steps, and of the learning rate
FUSED = r"qkv|query_key_value|c_attn|gate_up_proj"  # linears that hold several matrices


@stage
def welore(
    run: Run,
    *,
    keep_parameters: Share = 0.98,
    err: Share | None = None,
    min_ratio: Share | Literal["breakeven"] = 0.4999,
    allocator: Literal["energy", "threshold", "uniform"] = "energy",
    rank_multiple: Positive = 8,
    finetune: Count = 0,
    lr: Rate = 1e-4,
    norms: bool = True,
    batch_size: Positive = 2,
    max_seq_length: Positive = 256,
    gradient_checkpointing: bool = False,
    targets: Targets = ["Linear"],
    ignore: Targets = [],
) -> None:
    """Replace those targeted linears of the blocks whose rank can fall enough by two thin linears, `<name>.V` and `<name>.U`.

    Singular values s of a matrix are normalised to n = (s - min s) / (max s - min s). By the paper's rule, allocator="threshold", its rank
    falls by the number of n below a threshold, one for the whole model. Where that is enough (min_ratio), W = U S V^T is truncated and kept
    as (U sqrt S)(sqrt S V^T); all other matrices stay as they are, so that the rank reduction done is below the one attempted. Progress
    tells both, and the share of weights left. Embeddings and head are not touched. A matrix that several blocks share is treated once; a
    fused one (q, k and v, say) as one matrix.

    keep_parameters : share of the weights of the targeted matrices that may be left.
    err : the effective rank reduction to attempt instead, the paper's measure: the share of all ranks of the targeted matrices that goes.
        It is no share of parameters: a square matrix saves only when it loses over half of its rank. null: keep_parameters decides.
    min_ratio : a matrix is factored when its rank falls by more than this share, else it stays dense; "breakeven": when that saves
        parameters. Far below break-even a model can grow.
    allocator : energy: the ranks that lose the least ||W - U V||^2 / ||W||^2 in sum, where matrices that stay dense count in full (our
        default, as it measured far better at equal size); threshold, the paper's; or uniform: the same share of rank everywhere.
    rank_multiple : ranks are rounded up to a multiple of it; GPUs are slow at others than multiples of 8, and may want 64.
    finetune : training steps of the factors, on calibration text; 0: none, and no text is needed. The model is then resident in fp32.
    lr : AdamW's learning rate for them; it rises over the first tenth of the steps and falls to a tenth of itself along a cosine.
    norms : train the norms of the blocks too.
    batch_size : windows in a training step.
    max_seq_length : tokens of a window used in a training step.
    gradient_checkpointing : keep only block inputs for the backward pass and compute the rest again; the same result in less memory.
    targets : linears to treat: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.

    Raises BlockwrightError before anything is computed for options out of range, targets that name no linear and a model that is not dense;
    later for weights that are not finite, a size that no threshold reaches, and where no matrix passes min_ratio.
    Source: arXiv 2407.11239, sections 3 and 4; github.com/VITA-Group/WeLore.
    """
    _check_options(
        keep_parameters=keep_parameters,
        err=err,
        min_ratio=min_ratio,
        allocator=allocator,
        positive={"rank_multiple": rank_multiple, "lr": lr, "batch_size": batch_size},
        finetune=finetune,
    )
    sizes = _sizes(run.model, targets, ignore)
    feed = Feed(run, batch_size, max_seq_length) if finetune else None

    def measure(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        return {name: torch.linalg.svdvals(layers.matrix(linear).float()) for name, linear in block.linears(targets, ignore).items()}

    spectra = {name: s for facts in run.blocks(measure) for name, s in facts.items()}
    chosen = choose_ranks(
        spectra,
        {name: sizes[name] for name in spectra},
        keep_parameters=keep_parameters,
        err=err,
        min_ratio=min_ratio,
        allocator=allocator,
        rank_multiple=rank_multiple,
    )
    _tell(run, chosen, len(spectra))

    def factor(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        for name, linear in block.linears().items():
            if name in chosen.ranks:
                dtype = run.model.tensors.facts(f"{name}.weight").dtype  # a tensor of a new name is stored as it is
                v, u = factors(layers.matrix(linear).float(), chosen.ranks[name])
                block.swap(name, LowRankLinear.of(linear, v.to(dtype), u.to(dtype)))

    run.blocks(factor, write=True)
    if feed is None:
        return

    tuned = tune(run, feed, steps=finetune, lr=lr, norms=norms, checkpointing=gradient_checkpointing)

    def take(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        for name, p in block.module.named_parameters(prefix=block.name):
            if name in tuned:
                p.copy_(tuned[name].detach())

    run.blocks(take, write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    resident : fp32 copies of the whole chain in memory, activations included. Raises BlockwrightError for options out of range.
    """
    positive = {name: options[name] for name in ("rank_multiple", "lr", "batch_size")}
    _check_options(**{name: options[name] for name in ("keep_parameters", "err", "min_ratio", "allocator", "finetune")}, positive=positive)
    again = 1 if options["gradient_checkpointing"] else 0
    step = options["batch_size"] * options["max_seq_length"]
    saved = kept_for_backward(block_parameters, step, checkpointing=options["gradient_checkpointing"])
    return {
        "copies": 4,
        "passes": (3 + again) * options["finetune"] * step / max(tokens, 1),
        "bits": None,
        "resident": 3 + saved if options["finetune"] else 0,
    }


# ranks


class Reduction(NamedTuple):
    """Which matrices are factored, and what that comes to.

    ranks : of those that are; the others stay dense. tau : the threshold, with allocator="energy" None.
    attempted, actual : effective rank reduction of all matrices, before and after those that do not pass min_ratio are left dense.
    parameters : share of the weights of all matrices that is left; above 1 the model grew.
    """

    ranks: dict[str, int]
    tau: float | None
    attempted: float
    actual: float
    parameters: float


def choose_ranks(
    spectra: Mapping[str, Float[Tensor, " R"]],
    sizes: Mapping[str, tuple[int, int]],
    *,
    keep_parameters: float = 0.98,
    err: float | None = None,
    min_ratio: float | Literal["breakeven"] = 0.4999,
    allocator: Literal["energy", "threshold", "uniform"] = "energy",
    rank_multiple: int = 1,
) -> Reduction:
    """The rank of each matrix by its singular values, descending, R = min(N, K); sizes are (N, K). Options as in `welore`.

    Raises BlockwrightError where keep_parameters cannot be reached, or no matrix is factored.
    """
    rule = _Rule(min_ratio, rank_multiple)
    if allocator == "energy":
        tau, dropped = None, _least_energy(spectra, sizes, keep_parameters, err, rule)
    else:
        ramp = partial(torch.linspace, 1, 0, dtype=torch.float64)  # what stands in for n where every matrix loses the same share
        scores = {name: normalise(s) if allocator == "threshold" else ramp(len(s)) for name, s in spectra.items()}
        tau = _threshold(scores, sizes, keep_parameters, err, rule)
        dropped = {name: int((n < tau).sum()) for name, n in scores.items()}
    ranks = {name: int(rule.rank(d, sizes[name])) for name, d in dropped.items() if rule.factors(d, sizes[name])}
    if not ranks and err != 0:
        least = "" if min_ratio == "breakeven" else f" of {min_ratio}"
        best = max(dropped, key=lambda name: dropped[name] / min(sizes[name]))
        share = dropped[best] / min(sizes[best])
        asked = f"keep_parameters={keep_parameters}" if err is None else f"err={err}"
        raise BlockwrightError(
            f"welore: nothing to factor or to train: with {asked} no rank falls by the min_ratio"
            f"{least} that it needs (the most: {best}, {share:.3f})",
            do="Lower keep_parameters" if err is None else "Lower min_ratio or raise err",
        )
    total, whole = sum(min(size) for size in sizes.values()), sum(n * k for n, k in sizes.values())
    gone = sum(min(sizes[name]) - rank for name, rank in ranks.items())
    saved = sum(sizes[name][0] * sizes[name][1] - rank * sum(sizes[name]) for name, rank in ranks.items())
    return Reduction(ranks, tau, sum(dropped.values()) / total, gone / total, 1 - saved / whole)


def normalise(s_R: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """(s - min) / (max - min) in fp64, or 1 for all where they do not differ; s descending."""
    s = s_R.double()
    spread = s[0] - s[-1]
    return (s - s[-1]) / spread if spread > FLAT * s[0] else torch.ones_like(s)


class _Rule(NamedTuple):
    """Which matrices are factored, and at what rank. Each method takes a number of ranks that shall go, or an array of them."""

    min_ratio: float | Literal["breakeven"]
    multiple: int

    def rank(self, dropped: Any, size: tuple[int, int]) -> Any:
        """What stays of the rank, rounded up."""
        return -((dropped - min(size)) // self.multiple) * self.multiple

    def factors(self, dropped: Any, size: tuple[int, int]) -> Any:
        """Whether the matrix is factored."""
        (n, k), r, rank = size, min(size), self.rank(dropped, size)
        return rank * (n + k) < n * k if self.min_ratio == "breakeven" else r - rank > self.min_ratio * r

    def parameters(self, dropped: Any, size: tuple[int, int]) -> Any:
        """Weights that are left of the matrix."""
        n, k = size
        return np.where(self.factors(dropped, size), self.rank(dropped, size) * (n + k), n * k)


def _threshold(
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int]],
    keep_parameters: float,
    err: float | None,
    rule: _Rule,
) -> float:
    """The score below which everything goes: the least that leaves keep_parameters of the weights, or nearest to err of all ranks.

    Only scores themselves are candidates: between two of them nothing changes.
    """
    candidates, count = np.unique(torch.cat(list(scores.values())).numpy(), return_counts=True)
    below = count.cumsum() - count  # ranks that go with each
    if err is not None:
        return float(candidates[np.abs(below - err * count.sum()).argmin()])
    rising = torch.cat([n.flip(0) for n in scores.values()]).numpy()
    change = np.concatenate([np.diff(rule.parameters(np.arange(len(n) + 1), sizes[name])) for name, n in scores.items()])
    whole = sum(n * k for n, k in sizes.values())
    left = whole + np.concatenate([[0], change[rising.argsort(kind="stable")].cumsum()])[below]
    fits = np.flatnonzero(left <= keep_parameters * whole)
    if not len(fits):
        raise _too_small(keep_parameters, err, float(left.min()) / whole)
    return float(candidates[fits[0]])


def _least_energy(
    spectra: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int]],
    keep_parameters: float,
    err: float | None,
    rule: _Rule,
) -> dict[str, int]:
    """How far each rank falls so that the relative energies lost are least in sum, within so many parameters or ranks.

    Of each matrix up to CHOICES ranks are weighed, evenly spaced.
    """
    costs, weights, falls = [], [], []
    for name, s in spectra.items():
        size, r = sizes[name], len(s)
        lost = np.concatenate([[0.0], s.double().square().flip(0).cumsum(0).numpy()])  # by the number of ranks that go
        step = -(-r // CHOICES // rule.multiple) * rule.multiple
        fall = r - np.arange(step, r, step)
        fall = np.concatenate([[0], fall[rule.factors(fall, size)]])
        falls.append(fall)
        costs.append((lost[fall] / max(lost[-1], np.finfo(np.float64).tiny)).tolist())
        weights.append((r - fall if err is not None else rule.parameters(fall, size)).tolist())
    whole = sum(w[0] for w in weights)
    share = keep_parameters if err is None else 1 - err
    least = sum(min(w) for w in weights)
    if least > share * whole:
        raise _too_small(keep_parameters, err, least / whole)
    picks = budget.choose(costs, weights, math.floor(share * whole), gap=GAP).picks
    return {name: int(fall[i]) for name, fall, i in zip(spectra, falls, picks, strict=True)}


def _too_small(keep_parameters: float, err: float | None, least: float) -> BlockwrightError:
    if err is not None:
        allowed = f"up to {math.floor(1000 * (1 - least)) / 1000:g} with these options"
        return BlockwrightError(f"welore: err={err:g}", allowed=allowed, do="Lower err or min_ratio")
    allowed = f"at least {math.ceil(1000 * least) / 1000:g} with these options"
    return BlockwrightError(f"welore: keep_parameters={keep_parameters:g}", allowed=allowed, do="Raise keep_parameters")


# factors


def tune(run: Run, feed: Feed, *, steps: int, lr: float, norms: bool = True, checkpointing: bool = False) -> dict[str, nn.Parameter]:
    """Train the factors of the model as it stands, and the norms of its blocks if asked, to predict the next token; the rest is frozen.

    Returns what was trained, by full name, fp32.
    """
    model = run.model.build(device=run.device, dtype=torch.float32)
    chain(model, checkpointing=checkpointing)
    names = trainable(model, norms=norms)
    tuned = {name: p.requires_grad_() for name, p in model.named_parameters(remove_duplicate=False) if name in names}

    optimizer = torch.optim.AdamW(list({id(p): p for p in tuned.values()}.values()), lr=lr, weight_decay=0.0)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = lr * schedule(i, steps)

    run.curves["factors: loss"] = run.train(feed.loss(model), optimizer, steps=steps, before=before)
    return tuned


def trainable(model: nn.Module, *, norms: bool = True) -> set[str]:
    """Full names of the factors of a model and, if asked, of the vectors of its blocks that belong to no linear."""
    pairs = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    return {f"{name}.{end}" for name in pairs for end in ("V.weight", "U.weight")} | (set(block_vectors(model)) if norms else set())


def schedule(i: int, steps: int) -> float:
    """What the learning rate is multiplied by in step i."""
    warm_up = math.ceil(WARM_UP * steps)
    if i < warm_up:
        return (i + 1) / warm_up
    return FLOOR + (1 - FLOOR) * cosine(i - warm_up, max(1, steps - warm_up))


# the model, the options


def _tell(run: Run, chosen: Reduction, matrices: int) -> None:
    run.progress(
        f"{run.stage}: {len(chosen.ranks)} of {matrices} matrices factored, {chosen.actual:.1%} of all ranks gone "
        f"(attempted: {chosen.attempted:.1%}), {chosen.parameters:.1%} of their weights left",
        1,
        1,
    )
    if chosen.parameters > 1:
        warnings.warn(f"welore: the factors have {chosen.parameters:.0%} of the weights that they replace; raise min_ratio", stacklevel=4)
    fused = sorted({name.rpartition(".")[2] for name in chosen.ranks if re.search(FUSED, name.rpartition(".")[2])})
    if fused:
        warnings.warn(f"welore: {', '.join(fused)} hold several matrices, whose spectra are mixed: their ranks may suit none", stacklevel=4)


def _sizes(model: Blueprint, targets: Targets, ignore: Targets) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the targeted linears of the chain. Raises BlockwrightError for none, and a model that is not dense."""
    form = next(((name, f["form"]) for name, f in model.forms.items() if f["form"] != "linear"), None)
    if form:
        raise BlockwrightError(
            f"welore: {form[0]} is {form[1].replace('_', ' ')}", allowed="a dense model", do="Put welore before the stage that made it so"
        )
    linears = layers.block_linears(model.skeleton())
    sizes = {name: layers.size(m) for name, m in layers.targeted(linears, targets, ignore).items()}
    if not sizes:
        raise BlockwrightError(
            f"welore: targets={targets} with ignore={ignore} name no linear",
            allowed="a class name, a dotted name or its end, or re:<regex>",
            do=f"The last linear is {list(linears)[-1]}" if linears else "This model has no dense linear in its blocks",
        )
    biases: dict[Place, tuple[str, Place | None]] = {}
    for name in sizes:  # a factor that is shared holds the bias
        mine = model.tensors.get(f"{name}.bias")
        other, theirs = biases.setdefault(model.tensors[f"{name}.weight"], (name, mine))
        if mine != theirs:
            raise BlockwrightError(f"welore: {name} shares its weight with {other}, and not its bias", allowed="both shared, or neither")
    return sizes


def _check_options(
    *,
    keep_parameters: float,
    err: float | None,
    min_ratio: float | str,
    allocator: str,
    positive: dict[str, float | int],
    finetune: int,
) -> None:
    ratio = min_ratio == "breakeven" if isinstance(min_ratio, str) else 0 <= min_ratio < 1
    for good, what, allowed, do in (
        (0 < keep_parameters < 1, f"keep_parameters={keep_parameters}", "above 0, below 1", "Try 0.98"),
        (err is None or 0 <= err < 1, f"err={err}", "0 <= err < 1, or null", "Try 0.3"),
        (ratio, f"min_ratio={min_ratio!r}", '0 <= min_ratio < 1, or "breakeven"', "Try 0.4999"),
        (allocator in ("energy", "threshold", "uniform"), f"allocator={allocator!r}", "energy, threshold, uniform", None),
        *((math.isfinite(v) and v > 0, f"{name}={v}", "a positive number", "Leave it out") for name, v in positive.items()),
        (finetune >= 0, f"finetune={finetune}", "0 or more steps", None),
        (not finetune or err != 0, f"finetune={finetune} with err=0: nothing to train", "err above 0", "Raise err"),
    ):
        if not good:
            raise BlockwrightError(f"welore: {what}", allowed=allowed, do=do)
