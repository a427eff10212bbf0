"""Cuts channels out of feed-forward layers: what a block does says how much it keeps, what a channel carries which; one forward pass.

Use it for speed on any hardware, for what is left is smaller dense matrices: a fifth to a third of the channels, or more with recovery by
LoRA. Not where only bytes count: at the same size, quantised weights lose far less. CFSP, arXiv 2409.13199; the score to compare with is
Wanda's, arXiv 2306.11695. Re-measure its claim: `blockwright reproduce cfsp`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockwright.blocks import budget, feed_forward, layers
from blockwright.blocks.feed_forward import Ffn, halves, narrower
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import Feed, add_lora, chain, cosine, kept_for_backward, merge
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Positive, Rate, Share

CARD = {
    "slug": "cfsp",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2409.13199",
    "title": "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
    "summary": "cuts feed-forward channels by importance of blocks, then of channels, from one forward pass; recovery by LoRA",
    "saves": "time and memory: nearly 2x in the feed-forward layers at half the channels",
    "needs": ["calibration"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "our own layout with smaller matrices; `export: dense` pads them to one width, which plain transformers opens",
    "layouts": ["dense"],
    "claim": {
        "figure": "better than earlier structured pruning at 20 to 50 %",
        "against": "magnitude, Wanda-SP, FLAP and the like",
        "where": "abstract",
    },
}

GRANULARITY = 128  # a tile of matrix units
STEPS = 8  # at least so many multiples of the granularity in the narrowest feed-forward layer, where it is left to us
SLOPE = 128 * 1024 / 1e4  # of the sigmoid, per mean importance of a token: the official code has 1e-4 per sum over 128 samples of 1024
SAFE = 1.05  # by how much too large deviations are shrunk further, so that no block keeps all
LORA_SCALE = 2  # lora_alpha / r


@stage
def cfsp(
    run: Run,
    *,
    sparsity: Share = 0.2,
    granularity: Positive | None = None,
    block_importance: Literal["angular", "cosine", "mse", "mae", "constant"] = "angular",
    channel_importance: Literal["wanda", "row", "three_w_one_wa"] = "wanda",
    a: float = 1.0,
    b: float = 1.0,
    c: float = 1.0,
    recovery_steps: Count = 0,
    recovery_lr: Rate = 1e-4,
    r: Positive = 8,
    ranks: Literal["importance", "uniform"] = "importance",
    batch_size: Positive = 2,
    max_seq_length: Positive = 128,
    gradient_checkpointing: bool = False,
) -> None:
    """Cut `sparsity` of all feed-forward channels; blocks that change their input more keep more. Attention is not touched.

    Gated, plain and fused gate-and-up feed-forward layers. One that blocks share is cut once, by what its first block hears. Without
    recovery no gradients are needed and one block is resident; with it the whole model is, in fp32.

    sparsity : share of the channels to cut, over all blocks. Attention and embeddings stay: a fifth of the channels is an eighth of the
        parameters of SmolLM2-135M.
    granularity : every width is a multiple of it; None: 128, or the largest power of two that fits eight times into a narrower layer.
        Widths that are no multiple of 64 can be slower on a GPU than the uncut layer.
    block_importance : what a block does to a token: the angle between its input and output (angular), 1 - cosine, mean squared or absolute
        difference, or constant: all blocks keep the same share.
    channel_importance : activation norm times mean |weight| of the way out (wanda; our default, as it measured best); row, a sum over all
        matrices of weights normalised by row; the paper's three_w_one_wa, normalised by column, which ranks by the activation norm alone.
    a : how strongly block importance counts; 0 as constant.
    b : power of the activation norm in the way out's term of row and three_w_one_wa.
    c : power of the activation norm by which those two are multiplied.
    recovery_steps : training steps of LoRA factors on every linear of the blocks, merged in the end; 0: none.
    recovery_lr : AdamW's learning rate for them; it falls to 0 along a cosine.
    r : their rank, on average over the blocks; lora_alpha is twice the rank.
    ranks : in proportion to block importance, or the same in every block.
    batch_size : windows in a training step.
    max_seq_length : tokens of a window used in a training step.
    gradient_checkpointing : keep only block inputs for the backward pass and compute the rest again; the same result in less memory.

    Raises BlockwrightError before anything is computed for options out of range, feed-forward layers of another form (experts, norms
    inside, adapters), and a block that would keep no channel; later for values that are not finite, by name.
    Source: arXiv 2409.13199, section 3; github.com/wyxscir/CFSP.
    """
    _check_options(
        sparsity=sparsity,
        granularity=granularity,
        block_importance=block_importance,
        channel_importance=channel_importance,
        powers={"a": a, "b": b, "c": c},
        positive={"recovery_lr": recovery_lr, "r": r, "batch_size": batch_size},
        recovery_steps=recovery_steps,
        ranks=ranks,
    )
    ffns = find_ffns(run.model)
    own = [i for i, ffn in enumerate(ffns) if not ffn.shared]
    sizes = [ffns[i].size for i in own]
    step = granularity or _fitting_granularity(min(sizes))
    _check_widths(allocate([1.0] * len(own), sizes, sparsity=sparsity, granularity=step), own, sparsity, step)
    feed = Feed(run, batch_size, max_seq_length) if recovery_steps else None

    facts = measure(run, ffns, block_importance)
    u = coarse_weights([f["importance"] for f in facts], a)
    kept = allocate([u[i] for i in own], sizes, sparsity=sparsity, granularity=step)
    _check_widths(kept, own, sparsity, step)
    score = partial(channel_scores, method=channel_importance, b=b, c=c)
    run.blocks(partial(_cut, ffns=ffns, kept=dict(zip(own, kept, strict=True)), facts=facts, score=score), write=True)
    if feed is None:
        return

    shares = u if ranks == "importance" else [1.0] * len(u)
    rank = budget.allocate(shares, r * len(u), lower=1, upper=r * len(u))
    tuned = recover(run, feed, rank, steps=recovery_steps, lr=recovery_lr, checkpointing=gradient_checkpointing)
    run.blocks(partial(_take_merged, tuned=tuned), write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    layers : share of the blocks that is stored in the end, where two thirds of a block are its feed-forward layer. resident : fp32 copies
    of the whole chain in memory, activations included.
    """
    again = 1 if options["gradient_checkpointing"] else 0
    step = options["batch_size"] * options["max_seq_length"] if options["recovery_steps"] else 0
    saved = kept_for_backward(block_parameters, step, checkpointing=options["gradient_checkpointing"])
    return {
        "copies": 5,
        "passes": 1 + (3 + again) * options["recovery_steps"] * step / max(tokens, 1),
        "bits": None,
        "layers": 1 - options["sparsity"] * 2 / 3,
        "resident": 1 + saved if options["recovery_steps"] else 0,
    }


# where the channels are


def find_ffns(model: Blueprint) -> list[Ffn]:
    """The feed-forward layer of each block. Raises BlockwrightError naming the block and what is in the way of cutting it."""
    skeleton = model.skeleton()
    path = layers.chain_path(skeleton)
    found, seen = [], set()
    for i, block in enumerate(chain(skeleton)):
        ffn = find_ffn(block, f"{path}.{i}")
        places = {name: model.tensors[f"{path}.{i}.{name}.weight"] for name in (*ffn.into, ffn.out)}
        held = [name for name, place in places.items() if place in seen]
        if held and len(held) < len(places):
            what = f"block {path}.{i} shares {held[0]} with an earlier block, and not the rest of its feed-forward layer"
            raise feed_forward.refusal("cfsp", what)
        seen |= set(places.values())
        found.append(ffn._replace(shared=bool(held)))
    return found


find_ffn = partial(feed_forward.find_ffn, by="cfsp")


# coarse: blocks


def measure(run: Run, ffns: list[Ffn], metric: str = "angular") -> list[Facts]:
    """For each block of the dense model, from one forward pass: its importance, and norm [I] of its channels where it does not share them.

    importance : the mean over real tokens. norm : the root of a channel's sum of squares over real tokens, fp64.
    """
    heard: dict[int, Tensor] = {}
    mask = None if run.mask is None else run.mask.flatten().to(run.device)

    def listen(block: Block) -> None:
        ffn, tokens = ffns[block.index], 0
        if ffn.shared:
            return
        squares = heard[block.index] = torch.zeros(ffn.size, dtype=torch.float64, device=run.device)

        def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal tokens
            x = args[0].detach().reshape(-1, ffn.size).square()
            if mask is not None:
                x = x * mask[tokens : tokens + len(x), None]
            tokens += len(x)
            squares.add_(x.sum(0, dtype=torch.float64))

        block.module.get_submodule(ffn.out).register_forward_pre_hook(hear)

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None and y is not None
        norm = {"norm": heard.pop(block.index).sqrt()} if block.index in heard else {}
        return {"importance": importance(x, y, run.mask, metric), **norm}

    return run.blocks(visit, inputs="dense", target=True, watch=listen)


def importance(
    x: Float[Tensor, "n T d"], y: Float[Tensor, "n T d"], mask: Int[Tensor, "n T"] | None = None, metric: str = "angular"
) -> float:
    """How much a block that made y of x does to a token: the mean over real tokens.

    angular : the angle between the two, in half turns: 0 to 1; a quarter turn, 0.5, where one is all zeros. cosine : 1 - cosine.
    mse, mae : mean over channels of the squared or absolute difference. constant : 1.
    """
    if metric == "constant":
        return 1.0
    of = {"angular": _angle, "cosine": _one_minus_cosine, "mse": _mse, "mae": _mae}[metric]
    total = count = 0.0
    for rows in batches(len(x), 8):
        value = of(x[rows].float(), y[rows].float()).double()
        real = torch.ones_like(value) if mask is None else mask[rows].to(value)
        total, count = total + float((value * real).sum()), count + float(real.sum())
    return total / count


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Half turns between x and y, exact for equal and opposite ones, where the arc cosine of a rounded cosine is not (Kahan's formula)."""
    u, v = (t / t.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny) for t in (x, y))
    angle = 2 / math.pi * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
    return torch.where((u != 0).any(-1) & (v != 0).any(-1), angle, 0.5)


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(x, y, dim=-1)


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(-1)


def _mae(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(-1)


def coarse_weights(importance: Sequence[float], a: float = 1.0) -> list[float]:
    """u_i = sigmoid(a (B_i - mean B)), B in units of the paper: what the share that a block keeps is proportional to."""
    mean = math.fsum(importance) / len(importance)
    return torch.sigmoid(a * SLOPE * (torch.tensor(importance, dtype=torch.float64) - mean)).tolist()


def keep_shares(u: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The share of its channels that each block keeps: proportional to u, below 1, and 1 - sparsity of all channels together.

    Where the largest would not be below 1, all deviations from the mean are shrunk until it is.
    """
    mean = math.fsum(w * size for w, size in zip(u, sizes, strict=True)) / sum(sizes)
    keep = 1 - sparsity
    if max(u) > mean and max(u) / mean * keep >= 1:
        shrink = mean * (1 / keep - 1) / (max(u) - mean) / SAFE
        u = [mean + (w - mean) * shrink for w in u]
    return [w / mean * keep for w in u]


def allocate(u: Sequence[float], sizes: Sequence[int], *, sparsity: float, granularity: int) -> list[int]:
    """The channels that each block keeps: multiples of `granularity` whose sum is the multiple nearest to (1 - sparsity) of all.

    With sparsity 0 every block keeps all, multiple or not.
    """
    if not sparsity:
        return list(sizes)
    wanted = [share * size for share, size in zip(keep_shares(u, sizes, sparsity), sizes, strict=True)]
    most = [size // granularity * granularity for size in sizes]
    total = math.floor((1 - sparsity) * sum(sizes) / granularity + 0.5) * granularity
    return budget.allocate(wanted, min(total, sum(most)), upper=most, granularity=granularity)


# fine: channels


def channel_scores(
    out_DI: Float[Tensor, "D I"],
    into_ID: Sequence[Float[Tensor, "I D"]],
    norm_I: Float[Tensor, " I"],
    *,
    method: str = "wanda",
    b: float = 1.0,
    c: float = 1.0,
) -> Float[Tensor, " I"]:
    """The importance of each channel, fp64; the scale of norm_I makes no difference to their order.

    three_w_one_wa : with A = |out| norm^b, the mean over rows of (A / its column sums + the same of each |into^T|) norm^c. A column's
    fractions sum to 1, so this is (number of matrices) / D norm^c, whatever the weights; a column of zeros counts 0.
    row : with row sums in place of column sums. wanda : mean over rows of |out| norm.
    Memory: about three fp64 copies of a matrix.
    """
    norm = norm_I.double()
    if method == "wanda":
        return out_DI.double().abs().mean(0) * norm
    along = 0 if method == "three_w_one_wa" else 1
    score = torch.zeros_like(norm)
    for matrix in (out_DI.double().abs() * norm**b, *(w.T.double().abs() for w in into_ID)):
        sums = matrix.sum(along, keepdim=True)
        score += (matrix / sums.clamp(min=torch.finfo(torch.float64).tiny)).mean(0)
    return score * norm**c


def highest(score: Float[Tensor, " I"], count: int) -> Int[Tensor, " count"]:
    """The channels of the `count` highest scores, ascending; of equal ones the first."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def _cut(
    block: Block,
    x: Tensor | None,
    y: Tensor | None,
    rng: torch.Generator,
    *,
    ffns: list[Ffn],
    kept: dict[int, int],
    facts: list[Facts],
    score: Any,
) -> None:
    ffn = ffns[block.index]
    count = kept.get(block.index, ffn.size)
    if count == ffn.size:
        return
    linears = {name: block.module.get_submodule(name) for name in (*ffn.into, ffn.out)}
    into = [half for name in ffn.into for half in layers.matrix(linears[name]).chunk(halves(name))]
    out = layers.matrix(linears[ffn.out])
    keep = highest(score(out, into, facts[block.index]["norm"].to(out.device)), count)
    for name in ffn.into:
        rows = torch.cat([keep + half * ffn.size for half in range(halves(name))])
        block.swap(f"{block.name}.{name}", narrower(linears[name], rows=rows))
    block.swap(f"{block.name}.{ffn.out}", narrower(linears[ffn.out], columns=keep))


# recovery


def recover(run: Run, feed: Feed, ranks: Sequence[int], *, steps: int, lr: float, checkpointing: bool = False) -> nn.Module:
    """The model as it stands, resident, with LoRA of these ranks on every linear of its blocks, trained on the next token."""
    model = run.model.build(device=run.device, dtype=torch.float32)
    factors = add_lora(run, model, r=ranks, lora_alpha=[LORA_SCALE * r for r in ranks], shared=True)
    chain(model, checkpointing=checkpointing)

    optimizer = torch.optim.AdamW(factors, lr=lr, weight_decay=0.0)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = lr * cosine(i, steps)

    run.curves["recovery: loss"] = run.train(feed.loss(model), optimizer, steps=steps, before=before)
    return model


def _take_merged(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator, *, tuned: nn.Module) -> None:
    merge(block, tuned)


# options


def _fitting_granularity(size: int) -> int:
    """GRANULARITY, or the largest power of two that fits STEPS times into `size`."""
    return min(GRANULARITY, 2 ** max(0, (size // STEPS).bit_length() - 1))


def _check_widths(kept: Sequence[int], own: list[int], sparsity: float, granularity: int) -> None:
    for i, channels in zip(own, kept, strict=True):
        if not channels:
            raise BlockwrightError(
                f"cfsp: sparsity={sparsity}: block {i} would keep 0 channels",
                allowed=f"at least granularity={granularity} channels in every block",
                do="Cut less, or use a smaller granularity",
            )


def _check_options(
    *,
    sparsity: float,
    granularity: int | None,
    block_importance: str,
    channel_importance: str,
    powers: dict[str, float],
    positive: dict[str, float],
    recovery_steps: int,
    ranks: str,
) -> None:
    if not 0 <= sparsity < 1:
        raise BlockwrightError(f"cfsp: sparsity={sparsity}", allowed="0 <= sparsity < 1", do="Try sparsity=0.2")
    if granularity is not None and granularity < 1:
        raise BlockwrightError(f"cfsp: granularity={granularity}", allowed="1 or more, or None", do="Try 128")
    for name, value in powers.items():
        if not (math.isfinite(value) and value >= 0):
            raise BlockwrightError(f"cfsp: {name}={value}", allowed="0 or more", do="Try 1")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise BlockwrightError(f"cfsp: {name}={value}", allowed="a positive number", do="Leave it out for the default")
    if recovery_steps < 0:
        raise BlockwrightError(f"cfsp: recovery_steps={recovery_steps}", allowed="0 or more")
    for name, word, known in (
        ("block_importance", block_importance, ("angular", "cosine", "mse", "mae", "constant")),
        ("channel_importance", channel_importance, ("wanda", "row", "three_w_one_wa")),
        ("ranks", ranks, ("importance", "uniform")),
    ):
        if word not in known:
            raise BlockwrightError(f"cfsp: {name}={word!r}", allowed=", ".join(known))
