"""The claim of flexround, arXiv 2306.00317: learned division rounds better than nearest and than AdaRound, also with one step a matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockwright import meter, zoo
from blockwright.blocks.gptq import gptq
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.rounding import Codes, initial_grid, reconstruct
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block, Gram
from blockwright.claims.runner import Claim, Measured, Plot, numbers
from blockwright.claims.small_model import texts, trained
from blockwright.compress import flexround as method

flexround: Any = method.flexround  # called with a model, it takes calibration and seed too

PAPER = (
    "FlexRound learns a common step and a divisor for each weight: large language models quantised block by block lose little, "
    "and a uniform grid with one step a tensor suffices"
)
SETTINGS = {  # name -> the grid
    "W3 per channel": {"bits": 3, "strategy": "channel", "symmetric": False},
    "W4 per tensor": {"bits": 4, "strategy": "tensor", "symmetric": False},
}
GRID = (1e-2, 5e-2)  # learning rates that both learned methods choose from: near the best of each, of 1e-3 to 1e-1


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """Perplexity lost to rounding to nearest and to FlexRound; on a small model also to AdaRound, on a GPU and SmolLM2 also to GPTQ."""
    if device == "cpu":
        return _small(seed)
    tokenizer = zoo.tokenizer()
    model = zoo.smollm2(off_grid=True).to(device)
    calibration, evaluation = (
        zoo.windows("pydoc", part, num=num, length=512, tokenizer=tokenizer).to(device)  # type: ignore[arg-type]
        for part, num in (("calibration", 80), ("evaluation", 32))
    )
    return _large(model, calibration, evaluation, iters=200, seed=seed)


_perplexity = partial(meter.perplexity, batch=64)

# CPU: a small model trained here, with AdaRound in the same loop


def _small(seed: int, *, steps: int = 500, iters: int = 200, num: int = 64) -> Claim:
    train, calibration, tuning, evaluation = texts(num)
    model = trained(train, layers=4, steps=steps, seed=seed, batch=8)
    dense = _perplexity(model, evaluation)
    makers: dict[str, Callable[..., nn.Module]] = {"AdaRound": _adaround, "FlexRound": _flexround}
    rows: list[dict[str, Any]] = [{"grid": "dense", "method": "dense", "lr": None, "perplexity": dense}]
    gap: dict[str, dict[str, float]] = {}
    for setting, grid in SETTINGS.items():
        lost = gap.setdefault(setting, {})
        nearest = flexround(model, calibration=calibration, iters=0, **grid)
        lost["nearest"] = _perplexity(nearest, evaluation) - dense
        rows.append({"grid": setting, "method": "nearest", "lr": None, "perplexity": dense + lost["nearest"]})
        for name, make in makers.items():
            made = {lr: make(model, calibration, grid, iters=iters, lr=lr, seed=seed) for lr in GRID}
            tuned = {lr: _perplexity(m, tuning) for lr, m in made.items()}
            lr = min(tuned, key=lambda v: tuned[v])
            lost[name] = _perplexity(made[lr], evaluation) - dense
            rows.append({"grid": setting, "method": name, "lr": lr, "perplexity": dense + lost[name], "tuning": str(tuned)})
    return _claim(gap, "AdaRound", (0.5, 1.0), rows, seed=seed, notes=[
        f"Llama of 4 layers, width 128, trained here for {steps} steps on bytes of the Python language reference; perplexity is a byte's.",
        f"{num} samples of 128 bytes to learn from, {iters} steps a block, as many samples again to choose learning rates from {GRID} by.",
    ])  # fmt: skip


def _claim(gap: dict[str, dict[str, float]], rival: str, targets: tuple[float, float], rows: Any, *, seed: int, notes: list[str]) -> Claim:
    def against(setting: str, other: str, ours: str = "FlexRound") -> float:
        return gap[setting][ours] / gap[setting][other]

    def part(setting: str, other: str, target: float) -> Measured:
        rest = {"unit": "ratio", "better": "lower", "baseline": against(setting, other, rival)}
        name = f"{setting}: perplexity lost, against {other}"
        return Measured(name=name, measured=against(setting, other), target=target, **rest)  # type: ignore[arg-type]

    parts = [part(setting, other, target) for setting in SETTINGS for other, target in zip(("nearest", rival), targets, strict=True)]
    first, *rest = parts
    methods = list(next(iter(gap.values())))
    return Claim(
        **numbers(first),
        paper=PAPER,
        parts=rest,
        rows=rows,
        plot=Plot(
            kind="bar",
            title="What rounding costs",
            x="grid",
            y="perplexity above dense",
            series={m: [(setting, gap[setting][m]) for setting in SETTINGS] for m in methods},
        ),
        notes=notes,
    )


def _flexround(model: nn.Module, ids: Tensor, grid: dict[str, Any], *, iters: int, lr: float, seed: int) -> Any:
    return flexround(model, calibration=ids, seed=seed, iters=iters, lr=lr, batch_size=2, **grid)


def _adaround(model: nn.Module, ids: Tensor, grid: dict[str, Any], *, iters: int, lr: float, seed: int) -> Any:
    """AdaRound, arXiv 2004.10568, with BRECQ's settings, arXiv 2102.05426: the same grid, loop, samples and steps."""

    def visit(block: Block, x: Tensor, y: Tensor, rng: torch.Generator) -> Any:
        roundings = {name: AdaRound(linear.weight, *initial_grid(linear.weight, **grid, dtype=torch.bfloat16), grid["bits"])  # type: ignore[arg-type]
                     for name, linear in block.linears().items()}  # fmt: skip
        penalty = partial(_penalty, list(roundings.values()), iters)
        return reconstruct(block, roundings, x, y, rng, iters=iters, lr=lr, batch_size=2, penalty=penalty)

    return _through(model, ids, visit, seed=seed, target=True)


class AdaRound(nn.Module):
    """floor(W / s) + h(V) with h a stretched sigmoid in [0, 1]: every weight goes down or up."""

    def __init__(self, w_NK: Float[Tensor, "N K"], scale: Tensor, zero: Tensor | None, bits: int) -> None:
        super().__init__()
        self.scale, self.zero, self.bits = scale, zero, bits
        ratio = w_NK.detach() / scale.float()
        self.down = torch.floor(ratio)
        self.v = nn.Parameter(-torch.log(1.2 / (ratio - self.down + 0.1) - 1))

    def up(self) -> Float[Tensor, "N K"]:
        """h(V)."""
        return (torch.sigmoid(self.v) * 1.2 - 0.1).clamp(0, 1)

    def code(self, up: Tensor) -> Float[Tensor, "N K"]:
        """The code with this much added to the floor."""
        zero = 0 if self.zero is None else self.zero.float()
        return (self.down + up + zero).clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def forward(self) -> Float[Tensor, "N K"]:
        zero = 0 if self.zero is None else self.zero.float()
        return (self.code(self.up()) - zero) * self.scale.float()

    @torch.no_grad()
    def fold(self) -> Codes:
        """Up where h is at least a half."""
        return Codes(self.code((self.up() >= 0.5).float()).to(torch.int8), self.scale, self.zero, self.bits, -1)


def _penalty(roundings: list[AdaRound], iters: int, i: int) -> Tensor:
    """0.01 * sum(1 - |2h - 1|**b): none for the first 20 % of the steps, then b falls from 20 to 2 along a line."""
    warm = 0.2 * iters
    if i < warm:
        return torch.zeros(())
    b = 2 + 18 * max(0.0, 1 - (i - warm) / (iters - warm))
    return 0.01 * torch.stack([(1 - (2 * r.up() - 1).abs().pow(b)).sum() for r in roundings]).sum()


# GPU: SmolLM2, with GPTQ on the same grid


def _large(model: nn.Module, calibration: Int[Tensor, "n T"], evaluation: Int[Tensor, "m T"], *, iters: int, seed: int) -> Claim:
    dense = meter.perplexity(model, evaluation)
    rows: list[dict[str, Any]] = [{"grid": "dense", "method": "dense", "perplexity": dense}]
    gap: dict[str, dict[str, float]] = {}
    for setting, grid in SETTINGS.items():
        made = {
            "nearest": lambda grid=grid: flexround(model, calibration=calibration, iters=0, **grid),
            "GPTQ": lambda grid=grid: _through(model, calibration, partial(_gptq_block, grid=grid), seed=seed, target=False),
            "FlexRound": lambda grid=grid: flexround(model, calibration=calibration, seed=seed, iters=iters, **grid),
        }
        for name, make in made.items():
            value = meter.perplexity(make(), evaluation)
            gap.setdefault(setting, {})[name] = value - dense
            rows.append({"grid": setting, "method": name, "perplexity": value})
    n, t = calibration.shape
    return _claim(gap, "GPTQ", (0.4, 1.1), rows, seed=seed, notes=[
        f"SmolLM2-135M off its 4-bit grid, Python language reference, {n} samples of {t} tokens, {iters} steps a block, default rate.",
        "GPTQ: inputs in the order of their energy, damping 1 %, true sequential order within a block.",
    ])  # fmt: skip


def _through(model: nn.Module, ids: Tensor, visit: Any, *, seed: int, target: bool) -> Any:
    """A model after `visit` changed each of its blocks, on inputs from the blocks changed before."""
    device = next(model.parameters()).device
    run = Run(Blueprint.of_module(model), calibration=ids, seed=seed, device=device)
    run.begin("flexround")  # the same random numbers as the method
    run.blocks(visit, inputs="treated", target=target, write=True)
    return run.model.build(device=device)


STEPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # what has the same inputs


def _gptq_block(block: Block, x: Tensor, y: Tensor | None, rng: torch.Generator, *, grid: dict[str, Any]) -> None:
    for ends in STEPS:
        linears = {n: m for n, m in block.linears().items() if n.endswith(ends)}
        grams = block.observe(x, Gram, linears)
        for name, linear in linears.items():
            scale, zero = initial_grid(linear.weight, **grid, dtype=torch.bfloat16)  # type: ignore[arg-type]
            codes = gptq(linear.weight, grams[name].sum, scale, zero, bits=grid["bits"])  # type: ignore[arg-type]
            block.swap(name, PackedLinear.of(linear, codes, scale, zero, bits=grid["bits"], group_size=-1))
