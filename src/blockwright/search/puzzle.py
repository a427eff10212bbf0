"""Turns a trained language model into a cheaper one for one stated deployment: each block gets the attention (fewer key and value heads, a
linear, none) and the feed-forward layer (fewer channels, a linear, none) that an exact program picks from what each replacement costs and
what it was measured to spoil.

Use it when memory or speed at a known batch and length is the limit and there is text to distil on. Not without such text, and not where
only bytes count: at the same size quantised weights lose far less. Try removing whole blocks too (foldgpt): on the claim's small model,
with their neighbours distilled to do their work, that loses less than the program's child, which beats the same variant everywhere.

Puzzle, arXiv 2411.19146. Re-measure its claim: `blockwright reproduce puzzle`.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockwright.blocks import budget, layers
from blockwright.blocks.deployment import Costs, Deployment, Times, check_length, measure_times
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
from blockwright.blocks.subblocks import Library, Option, Subblocks, find_subblocks, mean_abs, put, swapped, variant
from blockwright.blocks.tuning import Feed, chain, cosine, kept_for_backward, kl_of_tokens, mean_of_real
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Positive, Rate, Share

CARD = {
    "slug": "puzzle",
    "room": "search",
    "kind": "stage",
    "arxiv": "2411.19146",
    "title": "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs",
    "summary": "picks an attention and a feed-forward layer for each block by an exact program under a budget of bytes or measured time",
    "saves": "bytes, memory of keys and values, and time, to a stated budget at a stated batch and length",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "our own layout; `export: dense` opens in plain transformers unless a subblock became one linear",
    "layouts": ["dense"],
    "claim": {
        "figure": "2.17 times the throughput at 98.4 % of the accuracy",
        "against": "Llama-3.1-70B, its parent",
        "where": "abstract, Llama-3.1-Nemotron-51B on one H100",
    },
}

SIZE = 0.8  # the budget where none is given
WHOLE = 3  # times as many steps for a chosen block, attention and feed-forward layer together, as for a variant alone
ALIKE = 0.8  # further candidates differ in a fifth of the subblocks
BETAS = (0.9, 0.95)
UNITS = {"size": "bytes of parameters", "memory": "bytes of parameters, keys and values", "latency": "nanoseconds"}


@stage
def puzzle(
    run: Run,
    *,
    size: Share | None = None,
    memory: Share | None = None,
    latency: Share | None = None,
    batch: Positive = 1,
    prefill: Positive = 128,
    generation: Positive = 128,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    times: str | None = None,
    heads: list[int] | None = None,
    widths: list[Share] = [0.75, 0.5, 0.25, 0.1],
    granularity: Positive | None = None,
    linear: bool = True,
    no_op: bool = True,
    blocks: list[int] | None = None,
    score: Literal["kl", "loss"] = "kl",
    score_windows: Positive = 16,
    bld_steps: Count = 0,
    bld_lr: Rate = 1e-3,
    candidates: Positive = 1,
    gkd_steps: Count = 0,
    gkd_lr: Rate = 1e-4,
    batch_size: Positive = 4,
    max_seq_length: Positive = 128,
) -> None:
    """Choose a variant of each attention and each feed-forward layer under a budget, and distil them.

    Every variant is made from the parent's weights without training, then learns to give the block's output on the parent's own inputs
    (BLD, each block by itself). It is scored by what it alone does to the model; the sum of the scores is least under the
    budgets. The model is resident in fp32 while variants are scored. An option whose score is not finite is left out, with a warning.

    size : share of the parent's parameter bytes, embeddings included; 0.8 where no budget is given.
    memory : share of the parent's bytes of parameters, keys and values at this batch and length.
    latency : share of the parent's time for a batch, prefill and generation; 0.5 is twice the throughput at the same batch.
    batch : requests at a time, for memory and latency.
    prefill : tokens that a request brings.
    generation : tokens that are generated for it.
    dtype : of weights, keys and values when the model is used, for the budgets.
    times : a JSON file that Times.save wrote, of times measured at the same batch, lengths and dtype, where the model is to run; null:
        measured here.
    heads : numbers of key and value heads to offer, each a divisor of the parent's; null: its half, the half of that and so
        on, and 1. Needs an attention of separate linears.
    widths : feed-forward channels to offer, as shares of the parent's.
    granularity : every such width is a multiple of it; null: 128, or the largest power of two that fits eight times into the layer.
    linear : offer one linear in the place of an attention or a feed-forward layer. Such a model has no dense export.
    no_op : offer leaving a subblock out.
    blocks : those that may change, by number; null: all.
    score : mean KL divergence from the parent over tokens, or rise of the next-token loss.
    score_windows : calibration windows that scores are measured on, the first ones.
    bld_steps : training steps of each variant, and three times as many of each chosen block as a whole; 0: none. More is better.
    bld_lr : AdamW's learning rate for them; it falls to 0 along a cosine.
    candidates : solutions that differ in a fifth of the subblocks, of which the one that truly scores best is kept.
    gkd_steps : training steps of all blocks together against the parent's hidden states and predictions in the end; 0: none.
    gkd_lr : AdamW's learning rate for that; it falls to 0 along a cosine.
    batch_size : windows in a training step.
    max_seq_length : tokens of a window used in a step of the training in the end.

    Raises BlockwrightError before anything is computed for options out of range, blocks of another form or treated before, heads that do
    not divide, and times of another deployment; before anything is chosen for a budget below the cheapest child, with what that costs.
    Source: arXiv 2411.19146, sections 2 to 4.
    """
    _check_options(
        positive={"bld_lr": bld_lr, "gkd_lr": gkd_lr}, shares={"size": size, "memory": memory, "latency": latency}, score=score, dtype=dtype
    )
    deployment = Deployment(batch, prefill, generation, dtype)
    parts = find_all(run.model)
    offered: dict[str, Any] = {"heads": heads, "widths": widths, "granularity": granularity, "linear": linear, "no_op": no_op}
    library = Library(parts, by="puzzle", blocks=blocks, **offered)
    feed = Feed(run, batch_size, max_seq_length)
    known = None if times is None else Times.load(Path(times), deployment, library.every)
    if known is None and latency is not None:
        check_length(run.model.config, deployment)

    learn = partial(distil, mask=run.mask, steps=bld_steps, lr=bld_lr, batch_size=batch_size)
    measured = deployment if latency is not None and known is None else None
    facts = weigh(run, parts, library, learn=learn, metric=score, windows=score_windows, measured=measured)
    scores = [f["scores"] for f in facts]
    _tell(run, library, facts)
    measured_times = Times.of(facts[0]["times"]) if measured is not None else known
    costs = Costs(run.model, parts, library.slots, deployment, measured_times)
    shares = {"size": size, "memory": memory, "latency": latency}
    limits = {name: share for name, share in shares.items() if share is not None} or {"size": SIZE}

    found: list[tuple[float, Blueprint]] = []
    earlier: list[tuple[int, ...]] = []
    for number in range(candidates):
        try:
            picks = choose(library, scores, costs, limits, unlike=earlier)
        except BlockwrightError:
            if not number:
                raise
            break  # no other one is that different
        earlier.append(picks)
        run.model = run.entered
        realise(run, parts, library.named(picks), facts, learn=partial(learn, steps=WHOLE * bld_steps))
        value = Scorer(run, score_windows, score).of_model(run.model) if candidates > 1 else 0.0
        found.append((value, run.model))
    run.model = min(found, key=lambda pair: pair[0])[1]
    if gkd_steps:
        student = heal(run, feed, steps=gkd_steps, lr=gkd_lr)
        run.blocks(partial(_take, student=student), write=True)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    layers : share of the blocks that is stored in the end. resident : fp32 copies of the whole chain in memory, activations included.
    """
    variants = (
        2 * (options["linear"] + options["no_op"]) + len(options["widths"]) + (2 if options["heads"] is None else len(options["heads"]))
    )
    window = options["max_seq_length"]
    training = 3 * options["batch_size"] * window * (options["bld_steps"] * (variants + 3) + 4 / 3 * options["gkd_steps"])
    scoring = options["score_windows"] * window * variants  # half the blocks for each of as many variants in every block
    saved = kept_for_backward(block_parameters, options["batch_size"] * window, checkpointing=False)
    return {
        "copies": 4 + 2 * variants + (saved if options["bld_steps"] else 0),
        "passes": 2 + (training + scoring) / max(tokens, 1),
        "bits": None,
        "layers": options["size"] or SIZE,
        "resident": 2 + saved if options["gkd_steps"] else 1,
    }


# the library


def find_all(model: Blueprint) -> list[Subblocks]:
    """The subblocks of each block. Raises BlockwrightError naming what was treated before, or is shared, or of another form."""
    skeleton = model.skeleton()
    path = layers.chain_path(skeleton)
    treated = next((name for name in model.forms if name.startswith(path + ".")), None)
    if treated:
        what = model.forms[treated]["form"].replace("_", " ")
        raise BlockwrightError(
            f"puzzle: {treated} is {what} already", allowed="blocks as the architecture builds them", do="Use puzzle first"
        )
    owner: dict[Any, str] = {}
    for name, place in model.tensors.items():
        if name.startswith(path + ".") and owner.setdefault(place, name) != name:
            raise BlockwrightError(f"puzzle: {name} is shared with {owner[place]}", allowed="blocks of their own", do="Use puzzle first")
    return [find_subblocks(block, f"{path}.{i}", by="puzzle") for i, block in enumerate(chain(skeleton))]


# blockwise local distillation and scores


def normalised_mse(
    ours: Float[Tensor, "b T d"], parent: Float[Tensor, "b T d"], mask: Int[Tensor, "b T"] | None = None
) -> Float[Tensor, ""]:
    """||ours - parent||^2 / ||parent||^2 over real tokens, in fp32: 1 for zeros, whatever the layer."""
    error, whole = ((t.float().square().sum(-1)) for t in (ours - parent, parent))
    if mask is not None:
        error, whole = error * mask, whole * mask
    return error.sum() / whole.sum().clamp(min=torch.finfo(torch.float32).tiny)


def distil(
    block: Block,
    modules: Mapping[str, nn.Module],
    x: Float[Tensor, "n T d"],
    y: Float[Tensor, "n T d"],
    *,
    rng: torch.Generator,
    mask: Int[Tensor, "n T"] | None,
    steps: int,
    lr: float,
    batch_size: int,
) -> list[float]:
    """Train these modules in the place of the block's own so that from x, the parent's inputs, the block gives y, the parent's outputs.

    Nothing else learns. Returns the losses. Raises BlockwrightError where one is not finite.
    """
    weights = [p for m in modules.values() for p in m.parameters()]
    losses: list[float] = []
    if not weights or not steps:
        return losses
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in weights], lr=lr, weight_decay=0.0, betas=BETAS)
    with swapped(block.module, modules):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * cosine(step, steps)
            rows = torch.randint(len(x), (batch_size,), generator=rng, device=rng.device).tolist()
            with torch.enable_grad():
                loss = normalised_mse(block(x[rows], rows), y[rows], None if mask is None else mask[rows].to(x.device))
                layers.check_finite(loss.detach(), f"puzzle: distillation loss of {block.name} at step {step}")
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for p in weights:
        p.requires_grad_(False).grad = None
    return losses


def weigh(
    run: Run,
    parts: Sequence[Subblocks],
    library: Library,
    *,
    learn: Any,
    metric: str = "kl",
    windows: int = 16,
    measured: Deployment | None = None,
) -> list[Facts]:
    """Distil and score every option of every block. Facts of a block: mean_abs [I] of its channels; scores and losses by option; times.

    learn : `distil` with its options. measured : the deployment whose times the first block's facts are to hold.
    """
    scorers: list[Scorer] = []

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None and y is not None
        if not scorers:  # not before a block asks for it: a resumed run may have nothing left to score
            scorers.append(Scorer(run, windows, metric))
        where = parts[block.index]
        mean, made, losses = mean_abs(block, where, x, run.mask), {}, {}
        for option in [o for options in library.slots[2 * block.index : 2 * block.index + 2] for o in options[1:]]:
            made[str(option)] = variant(block.module, where, option, mean)
            losses[str(option)] = learn(block, made[str(option)], x, y, rng=run.generator("bld", block.index, str(option)))
        values = scorers[0].of_variants(block.index, x, list(made.values()))
        scores = {name: value if math.isfinite(value) else None for name, value in zip(made, values, strict=True)}
        facts: Facts = {"mean_abs": mean, "scores": scores, "losses": losses}
        if measured is not None and block.index == 0:
            facts["times"] = measure_times(run.entered, parts, library.every, measured, device=run.device).json()
        return facts

    return run.blocks(visit, inputs="dense", target=True)


def _tell(run: Run, library: Library, facts: Sequence[Facts]) -> None:
    """Scores by block and losses by step of each option as curves of the report; what was dropped or is not offered, as warnings."""
    if library.left:
        warnings.warn(f"puzzle: {len(library.left)} blocks get no {library.left[0]}", stacklevel=2)
    dropped = [f"block {i} {name}" for i, f in enumerate(facts) for name, value in f["scores"].items() if value is None]
    if dropped:
        warnings.warn(f"puzzle: {len(dropped)} options are left out, their scores not being finite: {', '.join(dropped)}", stacklevel=2)
    for option in library.every:
        values = [f["scores"].get(str(option)) for f in facts]
        if any(value is not None for value in values):
            run.curves[f"score by block, {option}"] = [value for value in values if value is not None]
        losses = [f["losses"][str(option)] for f in facts if f["losses"].get(str(option))]
        if losses:
            run.curves[f"distillation by step, {option}"] = [math.fsum(at) / len(at) for at in zip(*losses, strict=True)]


# the choice


def choose(
    library: Library,
    scores: Sequence[Mapping[str, float | None]],
    costs: Costs,
    limits: Mapping[str, float],
    *,
    unlike: Sequence[Sequence[int]] = (),
) -> tuple[int, ...]:
    """The index of the option of each slot, so that the sum of the scores is least within the limits. The parent's options score 0.

    scores : for each block the score of each option but the parents', None or missing for one that is not to be taken.
    limits : shares of the parent's cost by size, memory or latency. unlike : earlier picks, which a fifth of the new ones differ from.
    Raises BlockwrightError where nothing is within a limit, with what the cheapest child costs.
    """
    slots = [
        [0.0 if option.kind == "parent" else scores[i // 2].get(str(option)) for option in options]
        for i, options in enumerate(library.slots)
    ]
    usable = [[k for k, value in enumerate(slot) if value is not None and math.isfinite(value)] for slot in slots]
    rows = []
    for name, share in limits.items():
        amount = {"size": lambda c: c.parameters, "memory": lambda c: c.parameters + c.kv, "latency": lambda c: c.time}[name]
        sizes = [[amount(costs.slots[i][k]) for k in ks] for i, ks in enumerate(usable)]
        whole, around = amount(costs.parent), amount(costs.around)
        least = around + sum(map(min, sizes))
        if math.floor(share * whole) < least:
            raise BlockwrightError(
                f"puzzle: {name}={share}: the cheapest child has {least} {UNITS[name]}, the parent {whole}",
                allowed=f"at least {math.ceil(least / whole * 1000) / 1000}",
                do="Raise the budget, or offer cheaper options",
            )
        rows.append((sizes, math.floor(share * whole) - around))
    values = [[slots[i][k] for k in ks] for i, ks in enumerate(usable)]
    before = [[ks.index(k) for ks, k in zip(usable, picks, strict=True)] for picks in unlike]
    picks = budget.choose_within(values, rows, unlike=before, alike=ALIKE)  # type: ignore[arg-type]
    return tuple(ks[k] for ks, k in zip(usable, picks, strict=True))


# the child


def realise(
    run: Run,
    parts: Sequence[Subblocks],
    chosen: Sequence[tuple[Option, Option]],
    facts: Sequence[Facts],
    *,
    learn: Any,
) -> None:
    """Put the chosen options into the run's model, the two of a block trained together, a parent's own beside another one too.

    facts : what `weigh` found. learn : `distil` with its options.
    """

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        assert x is not None and y is not None
        options = chosen[block.index]
        if all(option.kind == "parent" for option in options):
            return
        mean = facts[block.index]["mean_abs"]
        modules = {name: m for option in options for name, m in variant(block.module, parts[block.index], option, mean).items()}
        learn(block, modules, x, y, rng=run.generator("bld", block.index, "whole"))
        put(block, modules)

    run.blocks(visit, inputs="dense", target=True, write=True)


def heal(run: Run, feed: Feed, *, steps: int, lr: float) -> nn.Module:
    """The child as it stands, resident, its blocks trained end to end against the parent (GKD)."""
    student, parent = (model.build(device=run.device, dtype=torch.float32) for model in (run.model, run.entered))
    weights = [p.requires_grad_() for p in chain(student).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, betas=BETAS)

    def loss(i: int, rng: torch.Generator) -> Tensor:
        ids, mask = feed.draw(rng)
        with torch.no_grad():
            theirs = parent(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        ours = student(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return gkd_loss(ours, theirs, mask)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = lr * cosine(i, steps)

    run.curves["distillation of the whole: loss"] = run.train(loss, optimizer, steps=steps, before=before)
    return student


def gkd_loss(ours: Any, theirs: Any, mask: Int[Tensor, "b T"] | None = None) -> Float[Tensor, ""]:
    """The sum over layers of 1 - cos(ours, theirs) and KL(theirs || ours), each the mean over real tokens; no loss on the text itself.

    ours, theirs : outputs of transformers models with logits and hidden_states, the embedding's first.
    """
    total = mean_of_real(kl_of_tokens(theirs.logits, ours.logits), mask)
    for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        total = total + mean_of_real(1 - nn.functional.cosine_similarity(a, b, dim=-1), mask)
    return total


def _take(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator, *, student: nn.Module) -> None:
    block.module.load_state_dict(student.get_submodule(block.name).state_dict())


# options


def _check_options(*, positive: Mapping[str, float], shares: Mapping[str, float | None], score: str, dtype: str) -> None:
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise BlockwrightError(f"puzzle: {name}={value}", allowed="a positive number", do="Leave it out for the default")
    for name, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise BlockwrightError(f"puzzle: {name}={share}", allowed="a share of the parent above 0 and below 1", do="Try 0.6")
    for name, word, known in (("score", score, ("kl", "loss")), ("dtype", dtype, ("bf16", "fp16", "fp32"))):
        if word not in known:
            raise BlockwrightError(f"puzzle: {name}={word!r}", allowed=", ".join(known))
