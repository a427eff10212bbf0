"""The claim of foldgpt, arXiv 2407.00928: gates choose the blocks to delete better than block influence; sharing beats deletion."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockwright import meter
from blockwright.blocks.layers import Blueprint
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.claims.small_model import texts, trained
from blockwright.compress import foldgpt as method

foldgpt: Any = method.foldgpt  # called with a model, it takes calibration and seed too

PAPER = "learned gates, shared blocks and a short cure beat earlier depth compression at equal size"
LAYERS, REMOVE = 8, 0.25
UNIT = "ratio of perplexities"
_perplexity = partial(meter.perplexity, batch=64)


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """An 8-layer model trained here: which 2 blocks go, without a cure; then 6 blocks on 4 blocks' weights against 4 blocks, both cured."""
    train, calibration, _, evaluation = (part.to(device) for part in texts(64))
    model = trained(train.cpu(), layers=LAYERS, steps=300, seed=seed).to(device)
    fold = partial(foldgpt, model, calibration=calibration, seed=seed, batch_size=8, max_seq_length=128)
    value = partial(_perplexity, ids=evaluation)

    made = {"dense": model} | {
        name: fold(remove=REMOVE, ranking=ranking, gate_steps=100) for name, ranking in (("gates", "gates"), ("influence", "influence"))
    }
    found = {name: value(m) for name, m in made.items()}
    drawn = [value(_without(model, pair)) for pair in _pairs(seed)]
    found["random, mean of 6"] = sum(drawn) / len(drawn)

    cure = partial(fold, ranking="gates", gate_steps=100, cure_steps=60, cure_lr=1e-3, r=4, lora_alpha=8)
    shared = cure(remove=REMOVE, group_size=2)
    cured = {
        "shared": value(shared),
        "shared, no tail": value(cure(remove=REMOVE, group_size=2, tail_weight=0.0)),
        "deleted": value(cure(remove=0.5)),
        "dense": value(cure(remove=0.0)),
    }
    rows = [{"model": name, "cured": False, "perplexity": v} for name, v in found.items()]
    rows += [{"model": name, "cured": True, "perplexity": v} for name, v in cured.items()]

    def part(name: str, over: dict[str, float], ours: str, rival: str, target: float) -> Measured:
        return Measured(name=name, measured=over[ours] / over[rival], target=target, unit=UNIT, better="lower", baseline=1.0)

    first, *rest = (
        part("delete 2 of 8: gates over block influence", found, "gates", "influence", 0.95),
        part("delete 2 of 8: gates over random blocks", found, "gates", "random, mean of 6", 0.5),
        part("shared and cured: with over without tail distillation", cured, "shared", "shared, no tail", 0.99),
        part("cured: 6 blocks on 4 blocks' weights over 4 blocks", cured, "shared", "deleted", 1.0),
    )
    size = {name: sum(p.numel() for p in m.model.layers.parameters()) for name, m in (("dense", model), ("shared", shared))}
    return Claim(
        name=first.name,
        paper=PAPER,
        measured=first.measured,
        target=first.target,
        unit=first.unit,
        better=first.better,
        baseline=first.baseline,
        parts=rest,
        rows=rows,
        plot=Plot(
            kind="bar",
            title="8 blocks made fewer",
            x="",
            y="perplexity of a byte",
            series={"not cured": list(found.items()), "cured": list(cured.items())},
        ),
        notes=[
            "Llama of 8 layers, width 128, trained here for 300 steps on bytes of the Python language reference; disjoint evaluation",
            f"The shared stack has {size['shared'] / size['dense']:.0%} of the dense parameters, adapters included; 4 blocks have 50 %",
            "All sides are cured for the same 60 steps of 8 x 128 bytes with the same rates",
        ],
    )


def _pairs(seed: int) -> Tensor:
    """6 pairs of blocks, the first block in none."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([1 + torch.randperm(LAYERS - 1, generator=rng)[:2] for _ in range(6)])


def _without(model: Any, gone: Tensor) -> nn.Module:
    """The model with two blocks deleted."""
    keep = [i for i in range(LAYERS) if i not in gone.tolist()]
    return Blueprint.of_module(model).with_layers(keep).build(device=model.device)
