"""The claim of dsnot, arXiv 2310.08915: swaps repair the masks of magnitude pruning and of Wanda, the more the more is pruned.

On a GPU the swap loop alone is timed.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from blockwright import meter, zoo
from blockwright.blocks import tiles
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.compress import dsnot as method
from blockwright.compress.dsnot import refine

PAPER = "the perplexity of LLaMA-7B at 70 % sparsity falls by 26.79 against Wanda"
UNIT = "perplexity with swaps / without"
DEPTH = 12  # the blocks that are pruned, from the first; the rest stay dense. By magnitude: all
MATRICES, SIZE = 7, 4096  # those of a block, on a GPU


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """SmolLM2-135M, its first blocks pruned with and without swaps on the same text; on cuda, seconds of the swaps of large matrices."""
    return _time_of_swaps(seed) if device == "cuda" else _perplexities(seed)


def _perplexities(seed: int) -> Claim:
    model, tokenizer = zoo.smollm2(), zoo.tokenizer()
    calibration = zoo.windows("pydoc", "calibration", num=16, length=256, tokenizer=tokenizer)
    evaluation = zoo.windows("pydoc", "evaluation", num=8, length=256, tokenizer=tokenizer)
    other = zoo.windows("python-source", "evaluation", num=4, length=256, tokenizer=tokenizer)
    times: list[tuple[float, float]] = []  # of the swaps, and of all

    def pruned(swaps: Callable[..., Any] = refine, *, depth: int = DEPTH, **options: Any) -> Any:
        """The model pruned by these options, where `swaps` stands for `refine`."""
        first, rest = zoo.first_blocks(model, depth)
        made: list[Any] = []
        inside: list[float] = []
        prune: Any = method.dsnot

        def timed(*arguments: Any, **named: Any) -> Any:
            found: list[Any] = []
            inside.append(meter.time(lambda: found.append(swaps(*arguments, **named)), repeats=1, warmup=0).median)
            return found[0]

        def work() -> None:
            made.append(prune(first, calibration=calibration, seed=seed, **options))

        with mock.patch.object(method, "refine", timed):
            whole = meter.time(work, repeats=1, warmup=0).median
        times.append((sum(inside), whole))
        made[0].model.layers.extend(rest)
        made[0].config.num_hidden_layers += len(rest)  # the model runs so many
        return made[0]

    def perplexity(model: Any) -> tuple[float, float]:
        """On each text."""
        return meter.perplexity(model, evaluation), meter.perplexity(model, other)

    dense = meter.perplexity(model, evaluation)
    cases: dict[str, dict[str, Any]] = {
        "magnitude 50 %": {"initial_method": "magnitude", "sparsity": 0.5, "depth": len(model.model.layers)},
        "Wanda 60 %": {"sparsity": 0.6},
        "Wanda 70 %": {"sparsity": 0.7},
    }
    without = {name: perplexity(pruned(max_cycles=0, **options)) for name, options in cases.items()}
    times.clear()
    ours = {name: perplexity(pruned(**options)) for name, options in cases.items()}
    share = sum(inside for inside, _ in times) / sum(whole for _, whole in times)
    official = perplexity(pruned(accept="any", skip=["mlp"], var="within", **cases["Wanda 70 %"]))
    rng = torch.Generator().manual_seed(seed)
    null = perplexity(pruned(lambda *a, **k: _random_swaps(rng, *a, **k), **cases["Wanda 70 %"]))

    def row(name: str, before: tuple[float, float], after: tuple[float, float]) -> dict[str, Any]:
        ratios = {"ratio": after[0] / before[0], "ratio on source code": after[1] / before[1]}
        return {"pruned by": name, "without swaps": before[0], "with swaps": after[0], **ratios}

    ratio = {name: ours[name][0] / without[name][0] for name in cases}
    base = without["Wanda 70 %"]
    rows = [row(name, without[name], ours[name]) for name in cases]
    rows += [row("Wanda 70 %, options of the official code", base, official), row("Wanda 70 %, as many random swaps", base, null)]
    return Claim(
        paper=PAPER,
        name="Wanda 70 %",
        measured=ratio["Wanda 70 %"],
        target=0.95,
        unit=UNIT,
        better="lower",
        baseline=1.0,
        parts=[
            Measured(name="magnitude 50 %", measured=ratio["magnitude 50 %"], target=0.4, unit=UNIT, better="lower", baseline=1.0),
            Measured(name="Wanda 60 %", measured=ratio["Wanda 60 %"], target=1.0, unit=UNIT, better="lower", baseline=1.0),
            Measured(name="time of the swaps", measured=share, target=0.25, unit="share of pruning", better="lower"),
            Measured(name="control: random swaps", measured=null[0] / base[0], target=1.0, unit=UNIT, better="higher", baseline=1.0),
        ],
        rows=[{"pruned by": "dense", "without swaps": dense}, *rows],
        plot=Plot(
            kind="bar",
            title="Swaps repair a mask",
            x="first pruned by",
            y="perplexity",
            series={
                "without swaps": [(name, without[name][0]) for name in cases],
                "with swaps": [(name, ours[name][0]) for name in cases],
            },
            log=True,
        ),
        notes=[
            f"SmolLM2-135M, all linears of its first {DEPTH} blocks (by magnitude: of all), 50 cycles; 16 x 256 tokens of calibration",
            "Evaluation on 8 x 256 tokens of documentation, as the calibration is, and 4 x 256 of source code",
            "Baseline: the same scores and sparsity without swaps",
            "A row ends at a swap that would not lower its expected squared error; the official code makes any swap, and none in MLPs",
        ],
    )


def _random_swaps(rng: torch.Generator, w: Tensor, keep: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """As many swaps in each row as `refine` would make, of weights taken at random."""
    mask, error = refine(w, keep, *arguments, **named)
    swaps = (mask & ~keep).sum(1, keepdim=True)
    most = int(swaps.max())
    draw = torch.rand(w.shape, generator=rng)

    def some(among: Tensor) -> Tensor:
        columns = draw.masked_fill(~among, 2.0).topk(most, dim=1, largest=False).indices
        return torch.zeros_like(keep).scatter_(1, columns, torch.arange(most) < swaps)

    return keep & ~some(keep) | some(~keep), error


def _time_of_swaps(seed: int) -> Claim:
    rng = torch.Generator("cuda").manual_seed(seed)
    seconds = []
    for _ in range(MATRICES):
        w = torch.randn(SIZE, SIZE, device="cuda", generator=rng)
        mean, var, norm = (torch.rand(SIZE, device="cuda", generator=rng) for _ in range(3))
        score = method.wanda_score(w, norm)
        keep = tiles.row_mask(score, 0.6)
        spent = meter.time(lambda: refine(w, keep, score, mean - 0.5, var, update_threshold=0.0), repeats=5)  # noqa: B023
        seconds.append(spent.median)
    slowest = max(seconds)
    return Claim(
        paper=PAPER,
        name="swaps of a 4096 x 4096 matrix",
        measured=slowest,
        target=0.2,
        unit="seconds for 50 cycles",
        better="lower",
        spread=(min(seconds), slowest),
        rows=[{"matrix": i + 1, "seconds": s} for i, s in enumerate(seconds)],
        notes=[
            f"{MATRICES} random matrices, 60 % sparse, threshold 0 so that no row ends early; {sum(seconds):.3f} s for all of them",
            "The slowest matrix is reported: median of 5 runs",
        ],
    )
