"""Prunes weights, then repairs each output row by prune-and-grow swaps, without gradients and without changing a weight that survives.

Use it for 50 to 70 % unstructured or N:M sparsity where fine-tuning is out of reach. Not to save bytes (zeros are stored), and not where
the hardware does not skip zeros: the model is then as large and as slow as before. Beyond 60 % calibrate on text like that of the task:
what the swaps win there they can lose on other text. DSnoT (Dynamic Sparse No Training), arXiv 2310.08915,
with the scores of Wanda, arXiv 2306.11695, and SparseGPT, arXiv 2301.00774. Re-measure its claim: `blockwright reproduce dsnot`.
"""

import math
import re
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.run import Run, stage
from blockwright.blocks.stream import Block, Gram, Moments
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Share, Targets

CARD = {
    "slug": "dsnot",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2310.08915",
    "title": "DSnoT: Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    "summary": "prunes weights and swaps pruned for kept ones until the expected output error of each row is small; no training",
    "saves": "multiplications, where the hardware skips zeros: 2x at 2:4 on NVIDIA GPUs",
    "needs": ["calibration"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors with zeros",
    "claim": {"figure": "26.79 lower perplexity at 70 % sparsity", "against": "Wanda", "where": "abstract, LLaMA-7B"},
}

SAMPLE = 2048  # tokens in a sample of the official code: what errors are summed over
WEIGHTS_AT_ONCE = 2**22  # whose rows are refined together: enough to be fast, little memory


@stage
def dsnot(
    run: Run,
    *,
    sparsity: Share = 0.5,
    mask_structure: str = "unstructured",
    initial_method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda",
    max_cycles: Count = 50,
    update_threshold: float = 0.1,
    pow_of_var_regrowing: float = 1.0,
    var: Literal["pooled", "within"] = "pooled",
    accept: Literal["lower", "same_sign", "any"] = "lower",
    skip: list[str] = [],
    targets: Targets = ["Linear"],
    ignore: Targets = [],
) -> None:
    """Zeros in every targeted linear, chosen by a score and then improved by swaps; inputs come from the blocks pruned before.

    Embeddings, head, biases and the weights that stay are not touched. A tensor that several linears share is pruned once.

    sparsity : share of the weights of each output that become zero, rounded down to whole weights; with N:M it must be 1 - N/M.
    mask_structure : "unstructured", or "N:M" for at most N weights other than zero among every M consecutive inputs of an output,
        such as "2:4" (in YAML with its quotes).
    initial_method : the score that weights are first pruned by.
    max_cycles : swaps in a row at most; 0 leaves the initial mask.
    update_threshold : a row is done when its expected output error, summed over 2048 tokens, is at most this. Samples of another length
        are scaled to 2048, so that the same weights are chosen whatever the length.
    pow_of_var_regrowing : p in (expected contribution) / (variance of the input)**p, by which weights grow back.
    var : the variance over all tokens (pooled), or inside samples, averaged over them (within; the official code).
    accept : swaps that a row may make, which ends at one that it may not: those that lower its expected squared error (lower; ours), those
        that keep the sign of its expected error (same_sign; the paper), or any (the official code). N:M never turns the sign.
    skip : linears with one of these words in their dotted name keep the initial mask; the official default is ["mlp"].
    targets : linears to prune: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.

    Raises BlockwrightError before anything is computed for options out of range, targets or skip that name no linear, and N:M where M
    does not divide the inputs of a linear; later for weights that are pruned already and values that are not finite.
    """
    pattern = _checked(
        sparsity=sparsity,
        mask_structure=mask_structure,
        initial_method=initial_method,
        max_cycles=max_cycles,
        update_threshold=update_threshold,
        pow_of_var_regrowing=pow_of_var_regrowing,
        var=var,
        accept=accept,
    )
    _check_linears(run, pattern, skip, targets, ignore)

    def prune(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        assert x is not None
        linears = _without_twins(block.linears(targets, ignore))
        if not linears:
            return
        moments = block.observe(x, Moments if var == "pooled" else _within(x.shape[1]), linears)
        grams = block.observe(x, Gram, linears) if initial_method == "sparsegpt" else {}
        for name, linear in linears.items():
            weight = layers.matrix(linear)
            inputs, gram = moments.pop(name), grams.pop(name, None)  # let go of each Gram matrix once it is used
            wanda = wanda_score(weight, inputs.norm)
            if gram is not None:
                score = sparsegpt_score(weight, gram.sum)
            else:
                score = wanda if initial_method == "wanda" else magnitude_score(weight)
            keep = tiles.row_mask(score, sparsity) if pattern is None else tiles.n_m_mask(score, *pattern)
            if not _named(name, skip):
                keep, _ = refine(
                    weight,
                    keep,
                    wanda if pattern is None else score,
                    inputs.mean,
                    inputs.var,
                    group=None if pattern is None else pattern[1],
                    max_cycles=max_cycles,
                    update_threshold=update_threshold,
                    pow_of_var_regrowing=pow_of_var_regrowing,
                    accept=accept,
                    name=name,
                )
            weight.masked_fill_(~keep, 0)

    run.blocks(prune, inputs="treated", write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    Raises BlockwrightError for options out of range.
    """
    _checked(**options)
    hessian = options["initial_method"] == "sparsegpt"
    return {"copies": 10 if hessian else 4, "passes": 4 if hessian else 2, "bits": None}


def magnitude_score(w_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """|w| in fp32."""
    return w_NK.float().abs()


def wanda_score(w_NK: Float[Tensor, "N K"], norm_K: Float[Tensor, " K"]) -> Float[Tensor, "N K"]:
    """|w| times the Euclidean norm of its input over all tokens, in fp32. Source: arXiv 2306.11695."""
    return w_NK.float().abs() * norm_K.to(w_NK.device, torch.float32)


def sparsegpt_score(w_NK: Float[Tensor, "N K"], gram_KK: Float[Tensor, "K K"]) -> Float[Tensor, "N K"]:
    """(w / u_kk)**2 in fp32, where u is the upper Cholesky factor of the inverse of x^T x, damped by 1 % of its mean diagonal.

    gram_KK : x^T x over all tokens; not modified. Weights of inputs that were always 0 score 0.
    Only the score of SparseGPT, arXiv 2301.00774, not its update of the weights. Memory: five fp32 copies of gram.
    """
    h = gram_KK.flip(0, 1).double()
    diagonal = h.diagonal()  # a view
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1.0)
    diagonal += 0.01 * diagonal.mean()
    # Read backwards, h = l l^T is r r^T with r upper triangular; so the inverse is u^T u with u = r^-1, and 1 / u_kk = r_kk
    pivot = torch.linalg.cholesky(h).diagonal()
    scale_K = torch.where(dead, 0.0, pivot**2).flip(0)
    return w_NK.float() ** 2 * scale_K.to(w_NK.device, torch.float32)


def refine(
    w_NK: Float[Tensor, "N K"],
    keep_NK: Bool[Tensor, "N K"],
    score_NK: Float[Tensor, "N K"],
    mean_K: Float[Tensor, " K"],
    var_K: Float[Tensor, " K"],
    *,
    group: int | None = None,
    dense_NK: Float[Tensor, "N K"] | None = None,
    max_cycles: int = 50,
    update_threshold: float = 0.1,
    pow_of_var_regrowing: float = 1.0,
    accept: Literal["lower", "same_sign", "any"] = "lower",
    name: str = "weight",
) -> tuple[Bool[Tensor, "N K"], Float[Tensor, " N"]]:
    """Swap pruned for kept weights, row by row, until the expected error of a row is small.

    With d = 2048 * w * mean, what a weight is expected to add to an output over 2048 tokens, the error e of a row is the sum of d over its
    pruned weights. While |e| > update_threshold: of the weights pruned at first, the one with the largest |d| / var**p among those with the
    sign of e comes back; of those kept at first with the other sign, the one with the least score goes. No weight is swapped twice; a row
    without a candidate, or whose next swap `accept` forbids, is done. Ties: the first column.

    Without `accept` rows go on to swap, long after e is as small as one weight can make it, until they have swapped max_cycles good weights
    away: the threshold is no measure of that, for the size of d differs between models. The expected squared error of a token is
    (e / 2048)**2 + the sum of w**2 * var over pruned weights, where inputs are taken as independent.

    w_NK, keep_NK : weights and the mask to start from, True where kept. Not modified. Computed in fp32, errors in fp64.
    score_NK : >= 0; Wanda's score, or with `group` the one that the mask was made by.
    mean_K, var_K : of each input over tokens. Inputs that are always 0 are never grown; variances are at least 1e-12.
    group : M of an N:M mask: the weight that goes is of the same M inputs as the one that comes, of either sign, and a swap that would turn
        the sign of e ends the row too. A candidate whose group has nothing left to give is passed over, which costs one of the cycles.
    dense_NK : the original weights, where w is pruned already or was updated by the pruner: they stand at the pruned places.
    max_cycles, update_threshold, pow_of_var_regrowing, accept : see `dsnot`.
    Returns the new mask, with as many kept in each row (or group), and the error [N] fp64 that is left.
    Raises BlockwrightError, with `name`, for statistics that are not finite and for weights that are pruned already without dense_NK.
    Memory: about ten fp32 copies of a few million weights. Source: arXiv 2310.08915, algorithm 1; github.com/zyxxmu/DSnoT.
    """
    layers.check_finite(torch.stack([mean_K, var_K]), f"calibration inputs of {name}: mean or variance")
    if dense_NK is not None:
        w_NK = torch.where(keep_NK, w_NK, dense_NK)
    elif _pruned_already(w_NK, keep_NK):
        raise BlockwrightError(
            f"dsnot: {name}: DSnoT needs the dense weights; got an already pruned tensor and no original",
            do="Start from the dense model, or call blockwright.compress.dsnot.refine with dense_NK",
        )
    swap = partial(
        _refine_rows,
        mean_K=mean_K,
        var_K=var_K.clamp(min=1e-12),
        group=group,
        count=min(max_cycles, w_NK.shape[1]),
        threshold=update_threshold,
        power=pow_of_var_regrowing,
        accept=accept,
    )
    few = max(1, WEIGHTS_AT_ONCE // max(1, w_NK.shape[1]))
    parts = [swap(w_NK[i : i + few], keep_NK[i : i + few], score_NK[i : i + few]) for i in range(0, max(1, len(w_NK)), few)]
    masks, errors = zip(*parts, strict=True)
    return torch.cat(masks), torch.cat(errors)


def _refine_rows(
    w_NK: Tensor,
    keep_NK: Tensor,
    score_NK: Tensor,
    *,
    mean_K: Tensor,
    var_K: Tensor,
    group: int | None,
    count: int,
    threshold: float,
    power: float,
    accept: str,
) -> tuple[Tensor, Tensor]:
    """`refine` for some rows."""
    d_NK = w_NK.float() * (SAMPLE * mean_K).to(w_NK.device, torch.float32)
    error_N = (d_NK * ~keep_NK).double().sum(1)
    if not count or not bool((error_N.abs() > threshold).any()):
        return keep_NK.clone(), error_N
    gain_NK = (d_NK / (var_K**power).to(w_NK.device, torch.float32)).abs()
    spread_NK = w_NK.float() * (SAMPLE * var_K.sqrt()).to(w_NK.device, torch.float32)
    given = (d_NK, spread_NK, keep_NK.clone(), score_NK, gain_NK, error_N)
    if group is None:
        return _swap_in_rows(*given, count=count, threshold=threshold, accept=accept)
    return _swap_in_groups(*given, count=count, threshold=threshold, accept=accept, group=group)


def _swap_in_rows(
    d_NK: Tensor,
    spread_NK: Tensor,
    keep_NK: Tensor,
    score_NK: Tensor,
    gain_NK: Tensor,
    error_N: Tensor,
    *,
    count: int,
    threshold: float,
    accept: str,
) -> tuple[Tensor, Tensor]:
    queues = _queues(d_NK, keep_NK, score_NK, gain_NK, count)
    grow, prune = queues[:2], queues[2:]  # side 0 serves e > 0 and side 1 e < 0; a swap takes the next of both queues of a side
    possible = (grow >= 0) & (prune >= 0)
    rows = torch.arange(len(d_NK), device=d_NK.device)  # that still swap
    at = rows[:, None]
    change = d_NK[at, prune].double() - d_NK[at, grow].double()  # of e, and below of the variance, by each swap
    variance = spread_NK[at, prune].double() ** 2 - spread_NK[at, grow].double() ** 2
    used = torch.zeros(2, len(d_NK), dtype=torch.long, device=d_NK.device)
    first = error_N.sign()
    for _ in range(count):
        error = error_N[rows]
        side = (error < 0).long()
        place = used[side, rows]
        after = error + change[side, rows, place]
        swaps = possible[side, rows, place] & (error.abs() > threshold)
        if accept == "lower":
            swaps &= after**2 + variance[side, rows, place] < error**2
        elif accept == "same_sign":
            swaps &= after.sign() == first[rows]
        rows, side, after = rows[swaps], side[swaps], after[swaps]
        if not len(rows):
            break
        error_N[rows] = after
        used[side, rows] += 1
    taken = torch.arange(count, device=d_NK.device) < used[:, :, None]
    _, row, _ = taken.nonzero(as_tuple=True)
    keep_NK[row, grow[taken]] = True
    keep_NK[row, prune[taken]] = False
    return keep_NK, error_N


def _swap_in_groups(
    d_NK: Tensor,
    spread_NK: Tensor,
    keep_NK: Tensor,
    score_NK: Tensor,
    gain_NK: Tensor,
    error_N: Tensor,
    *,
    count: int,
    threshold: float,
    accept: str,
    group: int,
) -> tuple[Tensor, Tensor]:
    first = error_N.sign()  # the sign of e as long as a row is active
    cost_NK = score_NK.masked_fill(~keep_NK, torch.inf)  # of pruning a weight; infinite where it was pruned or swapped before
    rows = torch.arange(len(d_NK), device=d_NK.device)  # that are active
    grow = _queues(d_NK, keep_NK, score_NK, gain_NK, count)[(first < 0).long(), rows]
    inside = torch.arange(group, device=d_NK.device)
    for i in range(count):
        comes = grow[rows, i]
        members = (comes.clamp(min=0) // group * group)[:, None] + inside
        least, place = cost_NK[rows[:, None], members].min(1)
        goes = members.gather(1, place[:, None])[:, 0]
        error = error_N[rows]
        after = error + d_NK[rows, goes].double() - d_NK[rows, comes].double()
        accepted = after.sign() == first[rows]
        if accept == "lower":
            variance = spread_NK[rows, goes].double() ** 2 - spread_NK[rows, comes].double() ** 2
            accepted &= after**2 + variance < error**2
        possible = least < torch.inf
        active = (error.abs() > threshold) & (comes >= 0) & (accepted | ~possible)
        swaps = active & possible
        row, comes, goes = rows[swaps], comes[swaps], goes[swaps]
        error_N[row] = after[swaps]
        keep_NK[row, comes] = True
        keep_NK[row, goes] = False
        cost_NK[row, goes] = torch.inf
        rows = rows[active]
        if not len(rows):
            break
    return keep_NK, error_N


def _queues(d_NK: Tensor, keep_NK: Tensor, score_NK: Tensor, gain_NK: Tensor, count: int) -> Int[Tensor, "4 N c"]:
    """The first `count` columns of four queues of each row, -1 where there are no more; ties: the first column.

    0 and 1: what may come back for e > 0 and for e < 0, the largest gain first; 2 and 3: what may go for e > 0 and for e < 0, the least
    score first. Weights with d = 0 stand in none.
    """
    k = d_NK.shape[1]
    # One sort for all: the key is queue, order and column. The bits of a float >= 0 sort like the float; no two keys are equal.
    queue = 2 * keep_NK.byte() + (keep_NK ^ (d_NK < 0)).byte() + 4 * (d_NK == 0).byte()
    order = torch.where(keep_NK, score_NK.float().view(torch.int32), 2**31 - 1 - gain_NK.view(torch.int32))
    key = (queue.long() << 60).bitwise_or_(order.long() << 29).bitwise_or_(torch.arange(k, device=d_NK.device))
    if key.device.type == "cpu":
        key.numpy().sort(axis=1)  # in place; much faster than torch's
    else:
        key = key.sort(dim=1).values
    sizes = torch.stack([(queue == q).sum(1) for q in range(4)])
    place = torch.arange(count, device=d_NK.device)
    at = (sizes.cumsum(0) - sizes)[:, :, None] + place
    columns = key.expand(4, -1, -1).gather(2, at.clamp(max=k - 1)) & (2**29 - 1)
    return torch.where(place < sizes[:, :, None], columns, -1)


def _pruned_already(w_NK: Float[Tensor, "N K"], keep_NK: Bool[Tensor, "N K"]) -> bool:
    """Whether a mask prunes nothing but zeros, and so many that they cannot be a dense model's own."""
    many = int(keep_NK.sum()) < 0.9 * keep_NK.numel()
    return many and bool(w_NK.any()) and not bool((~keep_NK & (w_NK != 0)).any())


def _within(length: int) -> type[Moments]:
    """Moments whose variance is the one inside samples of `length` tokens, averaged over samples by their tokens."""

    class Within(Moments):
        """Running moments of whole samples, one after another, or of a shorter one alone."""

        def __init__(self, features: int) -> None:
            super().__init__(features)
            self._inside = torch.zeros(features, dtype=torch.float64)

        def add(self, x: Float[Tensor, "t K"]) -> None:
            super().add(x)
            samples = x.double().cpu().unflatten(0, (-1, length if len(x) % length == 0 else len(x)))
            self._inside += samples.var(1, correction=0).sum(0) * samples.shape[1]

        @property
        def var(self) -> Tensor:
            return self._inside / self.count

    return Within


def _named(name: str, words: list[str]) -> bool:
    return not set(words).isdisjoint(name.split("."))


def _without_twins(linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without the linears whose weight is the very tensor of one before."""
    first: dict[int, str] = {}
    return {name: m for name, m in linears.items() if first.setdefault(id(m.weight), name) == name}


def _checked(
    *,
    sparsity: float,
    mask_structure: str,
    initial_method: str,
    max_cycles: int,
    update_threshold: float,
    pow_of_var_regrowing: float,
    var: str,
    accept: str,
    **others: Any,
) -> tuple[int, int] | None:
    """N and M of the mask, or None for an unstructured one. Raises BlockwrightError for an option out of range."""
    for good, what, allowed in (
        (0 <= sparsity < 1, f"sparsity={sparsity}", "0 <= sparsity < 1"),
        (initial_method in ("wanda", "magnitude", "sparsegpt"), f"initial_method={initial_method!r}", "wanda, magnitude, sparsegpt"),
        (max_cycles >= 0, f"max_cycles={max_cycles}", "0 or more; 0 leaves the initial mask"),
        (update_threshold >= 0, f"update_threshold={update_threshold}", "0 or more"),
        (0 <= pow_of_var_regrowing < math.inf, f"pow_of_var_regrowing={pow_of_var_regrowing}", "0 or more; 0 leaves the variance out"),
        (var in ("pooled", "within"), f"var={var!r}", "pooled, within"),
        (accept in ("lower", "same_sign", "any"), f"accept={accept!r}", "lower, same_sign, any"),
    ):
        if not good:
            raise BlockwrightError(f"dsnot: {what}", allowed=allowed)
    if mask_structure == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", mask_structure)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n <= m:
        raise BlockwrightError(
            f"dsnot: mask_structure={mask_structure!r}",
            allowed='"unstructured", or "N:M" with 1 <= N <= M: at most N of M are other than zero',
            do='Try "2:4"',
        )
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise BlockwrightError(
            f"dsnot: mask_structure={mask_structure!r} with sparsity={sparsity}", allowed=f"sparsity={1 - n / m:.6g} with this structure"
        )
    return n, m


def _check_linears(run: Run, pattern: tuple[int, int] | None, skip: list[str], targets: Targets, ignore: Targets) -> None:
    """Raise BlockwrightError where `targets` or a word of `skip` names no linear of the chain, or M does not divide a linear's inputs."""
    linears = layers.block_linears(run.model.skeleton())
    chosen = layers.targeted(linears, targets, ignore)
    if not chosen:
        raise BlockwrightError(
            f"dsnot: targets={targets} with ignore={ignore} name no linear",
            allowed="a class name, a dotted name or its end, or re:<regex>",
            do=f"The last linear is {list(linears)[-1]}" if linears else "This model has no dense linear in its blocks",
        )
    for word in skip:
        if not any(_named(name, [word]) for name in linears):
            raise BlockwrightError(
                f"dsnot: skip={skip}: no linear's name holds {word!r}",
                allowed="words of dotted names such as " + list(linears)[-1],
                do="Use skip=[] to refine all",
            )
    for name, m in chosen.items():
        k = layers.size(m)[1]
        if pattern is not None and k % pattern[1]:
            raise BlockwrightError(
                f"dsnot: {name}: in_features {k} not divisible by M={pattern[1]}",
                allowed="N:M where M divides the inputs of every targeted linear",
                do=f"Use another mask_structure, or add {name.rpartition('.')[2]!r} to ignore",
            )
