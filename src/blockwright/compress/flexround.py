"""Low-bit weights whose rounding is learned block by block: each weight has a divisor of its own, so a large one may move several steps.

Use it for 3 to 5 bits, with a few dozen unlabelled samples and minutes of time; what it writes is as cheap to run as with rounding to
nearest. Not at 8 bits, where rounding to nearest loses next to nothing, and not where no text like that of the later use is at hand.
FlexRound, arXiv 2306.00317; `rank` gives LRQ, arXiv 2407.11534. Re-measure its claim: `blockwright reproduce flexround`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blockwright.blocks import layers
from blockwright.blocks.rounding import CHECK_EVERY, FlexRound, initial_grid, reconstruct
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
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

    row_bits : of the step and zero point of a whole row, beside them. Passes assume samples of 256 tokens.
    Raises BlockwrightError for options out of range.
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
        "row_bits": width if shared == -1 else 0,
    }


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
