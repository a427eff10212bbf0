"""Makes a model as good as it can be within a number of bytes: every linear gets the bits, the groups or the rank, and every subblock the
width, that one exact program picks from what each choice was measured to add to the loss.

Use it when a file, a memory or a download has a size, and there is text like that of the later use: it beats any one setting for the whole
model, most of all below 5 bits a weight. Not where all linears must have one scheme (an engine that knows int4 alone), and not for a model
that must not be resident once while it is scored: then leave `samples` at 0 and `allow` at quantise.

Fisher information as in arXiv 1810.04859 and HAWQ, arXiv 1911.03852; scores and the program as in Puzzle, arXiv 2411.19146.
Re-measure its claim: `blockwright reproduce fit`.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blockwright.blocks import layers, treatments
from blockwright.blocks.embedding import GROUP, pack_embedding
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer, divergence
from blockwright.blocks.rounding import FlexRound, reconstruct
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
from blockwright.blocks.subblocks import put
from blockwright.errors import BlockwrightError
from blockwright.options import Bits, Count, Positive, Rate, Share, Targets
from blockwright.search.fit_program import Choice, Problem
from blockwright.search.fit_scores import Wanted, first_windows, fitting, keep_table, measure, read_table, trial_of, unmeasured

CARD = {
    "slug": "fit",
    "room": "search",
    "kind": "stage",
    "arxiv": None,
    "title": "The best model within a number of bytes, solved block by block",
    "summary": "gives each linear its bits, groups or rank and each subblock its width by one exact program over measured losses",
    "saves": "bytes, to a stated size",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "packed",
    "writes": "compressed-tensors pack-quantized where only linears of the blocks are packed, else our own layout",
    "claim": {
        "figure": "at most half of the loss that the best single setting adds at the same bytes",
        "against": "every uniform method and setting of this library that is no larger",
        "where": "SmolLM2-135M, 3 sizes",
    },
}


@stage
def fit(
    run: Run,
    *,
    size: str | None = None,
    bits_per_weight: Rate | None = None,
    allow: list[Literal["quantise", "low-rank", "prune", "drop"]] = ["quantise"],
    keep: Targets = [],
    bits: list[Bits] = [2, 3, 4, 5, 6, 7, 8],
    group_sizes: list[Positive] = [32, 64, 128],
    embedding: list[Literal[4, 5, 6, 8]] = [4, 5, 6, 8],
    ranks: list[Share] = [0.5, 0.25],
    widths: list[Share] = [0.75, 0.5, 0.25],
    samples: Count = 4,
    score_windows: Positive = 4,
    refine: Count = 1,
    cure_steps: Count = 0,
    lr: Rate = 1e-2,
    batch_size: Positive = 2,
    gap: Share = 0.001,
    front: Count = 0,
    table: str | None = None,
) -> None:
    """Choose what each part of the model becomes so that the sum of what the choices add to the loss is least within the size; do it.

    What rounding or truncating a linear adds to KL(dense || treated) is estimated as half the sum of its Fisher information times the
    squared error, from one pass backwards with one block resident, and corrected by kind of linear with a sample that is truly measured.
    Narrower and missing subblocks, and the embedding, are all measured.

    size : of the weights' files, such as 120MB or 0.1GB; 4.5 bits a weight where neither is given.
    bits_per_weight : the size as bits for each weight of the dense model, embeddings included, instead.
    allow : what may happen to the blocks: quantise, low-rank, prune (fewer channels and key heads), drop (a subblock as one linear, or
        gone).
    keep : linears that stay dense, and "embedding": a dotted name or its end, or "re:<regex>".
    bits : that a quantised linear may have.
    group_sizes : inputs that may share a scale; those that do not divide a linear's inputs are not offered there.
    embedding : bits that the embedding, and the head tied to it, may have.
    ranks : of low-rank linears, as shares of the full rank, in multiples of 64; their factors dense or at 8 bits.
    widths : feed-forward channels to offer, as shares of all.
    samples : linears of each kind that are measured to correct the estimates; 0: none, and estimates count as they are.
    score_windows : calibration windows, the first ones, that measured scores use.
    refine : rounds of measuring each block as it was chosen, correcting its scores and choosing again; the best model found is kept.
    cure_steps : steps a block of learning how to round, as in flexround, towards the dense model's outputs; 0: none.
    lr : of that learning.
    batch_size : windows in such a step.
    gap : share of what the treatments add to the loss at most that the proof may leave open; 0 proves the choice best, which can take long.
    front : further sizes to solve for, evenly from the smallest to the dense model's, for the report; a second or so each.
    table : a JSON file to keep the measurements in: where it exists, nothing is measured again.

    Raises BlockwrightError before anything is computed for options out of range and models treated before; before anything is chosen for
    a size below the smallest or above the dense model's, with both, and for a table of another model, text or options.
    """
    wanted = Wanted.checked(allow, keep, bits, group_sizes, embedding, ranks, widths)
    target = _bytes_of(run, size, bits_per_weight)
    Problem(run, wanted.flat(), unmeasured(run, wanted.flat())).refuse(target, least=not wanted.structural)
    known = read_table(table, run, wanted)
    measured = known or measure(run, wanted, samples, score_windows)
    if known is None and table is not None:
        keep_table(Path(table), run, wanted, measured)

    run.branch(hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:8])
    problem = Problem(run, wanted, measured)
    dense = run.model
    found: list[tuple[float, Blueprint, Choice]] = []
    rounds: list[dict[str, float]] = []
    for round_ in range(refine + 1):
        choice = problem.solve(target, gap)
        if found and choice.picks == found[-1][2].picks:
            break
        run.model = dense
        apply(run, problem, choice)
        true = divergence(dense, run.model, *first_windows(run, score_windows), device=run.device)
        found.append((true, run.model, choice))
        rounds.append({"predicted": choice.predicted, "measured": true, "bytes": choice.bytes, "gap": choice.gap})
        if round_ < refine:
            run.model = dense
            problem.correct(choice, _by_block(run, problem, choice, score_windows))
    true, run.model, choice = min(found, key=lambda f: f[0])
    _tell(run, problem, rounds, choice, target, gap, front)
    if cure_steps:
        _cure(run, dense, problem, choice, steps=cure_steps, lr=lr, batch_size=batch_size)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    resident : fp32 copies of the whole chain in memory.
    """
    structural = {"prune": len(options["widths"]) + 1, "drop": 4}
    measured = sum(structural.get(word, 0) for word in options["allow"])
    scored = options["score_windows"] * 256 / max(tokens, 1) * (measured * 15 + 3.5 * options["samples"] + 30 * options["refine"])
    learned = options["cure_steps"] * 3 * options["batch_size"] * 256 / max(tokens, 1)
    return {
        "copies": 12 if options["cure_steps"] else 8,
        "passes": 8 + scored + learned,
        "bits": options["bits_per_weight"] or 4.5,
        "resident": 1 if measured or options["samples"] or options["refine"] else 0,
    }


# doing it


def apply(run: Run, problem: Problem, choice: Choice) -> None:
    """Give the run's model what was chosen."""

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        options, named = choice.blocks[block.index]
        put(block, problem.modules(block, options))
        for name, t in named.items():
            linear = block.module.get_submodule(name.removeprefix(block.name + "."))
            treatments.treat(block, name, t, fitting(problem.squares(block.index, name), layers.matrix(linear)))

    run.blocks(visit, write=True)
    if choice.embedding:
        run.model = pack_embedding(run.model, choice.embedding)


def _by_block(run: Run, problem: Problem, choice: Choice, windows: int) -> list[float]:
    """What the choice of each block adds to the loss while all others are dense, measured."""
    scorers: list[Scorer] = []

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None
        if not scorers:
            scorers.append(Scorer(run, windows))
        options, named = choice.blocks[block.index]
        squares = {name: problem.squares(block.index, name) for name in named}
        trial = trial_of(block, problem.modules(block, options), named, squares)
        return {"score": scorers[0].of_variants(block.index, x, [trial])[0]}

    return [facts["score"] for facts in run.blocks(visit, inputs="dense")]


def _cure(run: Run, dense: Blueprint, problem: Problem, choice: Choice, *, steps: int, lr: float, batch_size: int) -> None:
    """The same choice from the dense model, with rounding that is learned block by block."""
    learn = partial(reconstruct, iters=steps, lr=lr, batch_size=batch_size, mask=run.mask)

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None and y is not None
        options, named = choice.blocks[block.index]
        put(block, problem.modules(block, options))
        roundings = {}
        for name, t in named.items():
            w = layers.matrix(block.module.get_submodule(name.removeprefix(block.name + "."))).float().contiguous()
            squares = fitting(problem.squares(block.index, name), w)
            if t.kind == "quantise":
                roundings[name] = FlexRound(w, treatments.grid(w, t, squares)[1], None, bits=t.bits, group_size=t.group_size, rng=rng)
            else:
                treatments.treat(block, name, t, squares)
        return learn(block, roundings, x, y, rng) if roundings else {"losses": []}

    run.model = dense
    found = run.blocks(visit, inputs="treated", target=True, write=True)
    run.curves |= {f"{problem.path}.{i}": facts["losses"] for i, facts in enumerate(found) if facts["losses"]}
    if choice.embedding:
        run.model = pack_embedding(run.model, choice.embedding)


def _tell(run: Run, problem: Problem, rounds: Sequence[dict[str, float]], choice: Choice, target: int, gap: float, front: int) -> None:
    """For the report: what was chosen and of what, how well it was predicted, what one more megabyte would buy, the front."""
    blocks: list[dict[str, Any]] = [{"options": options, "linears": {}} for options, _ in choice.blocks]
    for (index, ways), (a, _) in zip(problem.slots, choice.picks, strict=False):
        for name, size in ways[a].linears.items():
            chosen = str(choice.blocks[index][1][name])
            blocks[index]["linears"][name] = {"chosen": chosen, "offers": problem.offers(index, name, size)}
    sizes = problem.embedding_bytes.items()
    scores = problem.measured["embedding"]
    offers = [(f"int{b} g{GROUP}" if b else "dense", scores.get(str(b), 0.0), size) for b, size in sizes]
    step = (problem.whole - problem.smallest) / (front + 1)
    more = target + 10**6
    run.details |= {
        "rounds": rounds,
        "blocks": blocks,
        "embedding": {"chosen": f"int{choice.embedding} g{GROUP}" if choice.embedding else "dense", "offers": offers},
        "megabyte": problem.value(choice) - problem.solve(more, gap).predicted if more <= problem.whole else 0.0,
        "front": [(c.predicted, c.bytes) for c in (problem.solve(int(problem.smallest + step * (i + 1)), gap) for i in range(front))],
        "uniform": problem.uniform(),
    }


# the size


def _bytes_of(run: Run, size: str | None, bits_per_weight: float | None) -> int:
    """The size asked for, in bytes."""
    if size is not None and bits_per_weight is not None:
        raise BlockwrightError("fit: size and bits_per_weight", allowed="one of them")
    if size is None:
        places = {place: name for name, place in run.model.tensors.items()}.values()
        weights = sum(math.prod(run.model.tensors.facts(n).shape) for n in places if run.model.tensors.facts(n).dtype.is_floating_point)
        return int((bits_per_weight or 4.5) * weights / 8)
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(i?)B\s*", size, re.IGNORECASE)
    if matched is None:
        raise BlockwrightError(f"fit: size={size!r}", allowed='a number with KB, MB, GB, KiB, MiB or GiB, e.g. "120MB"')
    number, unit, binary = matched.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMG".index(unit.upper())))
