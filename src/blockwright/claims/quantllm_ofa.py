"""The claim of LLM-QFA, arXiv 2405.20202: one training gives sub-models for many budgets, each nearly as good as one tuned for it alone.

On a CPU a small Llama that is trained on the spot; on a GPU SmolLM2-135M.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

from jaxtyping import Int
from torch import Tensor, nn

from blockwright import meter, zoo
from blockwright.blocks.configurations import Choice
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.tuning import Feed
from blockwright.claims import small_model
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.compress import quantllm_ofa as method
from blockwright.compress.quantllm_ofa_supernet import Made, Supernet

PAPER = "as good as QA-LoRA tuned for each budget (72.4/68.0/61.7 against 72.4/67.7/61.7 at 4/3/2 bits), with one training for all of them"
WIDTHS = (2, 3, 4)
GAP = "perplexity above the dense model's"
NONE = 1e-4  # a rival's gap counts as at least this


class Setting(NamedTuple):
    """A model, its texts, and how long everything is trained: the same for all sides.

    train, held_out, evaluation : windows to learn from, to choose configurations by, to judge by. steps : of the supernet, of each rival.
    log : gaps are of the logarithm of the perplexity.
    """

    model: nn.Module
    train: Int[Tensor, "n T"]
    held_out: Int[Tensor, "m T"]
    evaluation: Int[Tensor, "k T"]
    budgets: Sequence[float]
    steps: int
    batch: int
    lr: float
    samples: int
    log: bool
    device: str


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """Perplexities of sub-models of one supernet, of GPTQ at mixed widths, and of QA-LoRA trained for each budget by itself."""
    return _smollm2(seed, device) if device == "cuda" else _small(seed)


def _small(seed: int, *, steps: int = 140, dense_steps: int = 500, samples: int = 60) -> Claim:
    """Six blocks of width 128, trained here. Adapters learn from the text that the model learned from, so that they bring nothing new."""
    text, _, held_out, evaluation = small_model.texts(64)
    model = small_model.trained(text, layers=6, steps=dense_steps, seed=seed, batch=8)
    train = text[: len(text) // 128 * 128].view(-1, 128)
    setting = Setting(model, train, held_out[:8], evaluation[::4], (2.25, 2.5, 3.0, 3.5), steps, 2, 2e-4, samples, log=False, device="cpu")
    notes = [
        f"A Llama of 6 blocks of width 128 that learned bytes of the Python manual for {dense_steps} steps of 8 x 128; the adapters learn "
        f"from the same text. {len(setting.held_out)} other windows to search by, {len(setting.evaluation)} to judge by",
    ]
    return _claim(setting, seed, notes, ablations=True)


def _smollm2(seed: int, device: str, *, steps: int = 120, length: int = 256, windows: int = 176) -> Claim:
    """SmolLM2-135M, whose weights are moved off the 4-bit grid that its file has."""
    tokenizer, model = zoo.tokenizer(), zoo.smollm2(off_grid=True).to(device)
    calibration = zoo.windows("pydoc", "calibration", num=windows, length=length, tokenizer=tokenizer)
    evaluation = zoo.windows("pydoc", "evaluation", num=16, length=length, tokenizer=tokenizer)
    held = max(2, windows // 16)
    setting = Setting(
        model, calibration[:-held], calibration[-held:], evaluation, (2.5, 3.0), steps, 16, 2e-4, samples=100, log=True, device=device
    )
    notes = [f"SmolLM2-135M; {windows - held} windows of {length} tokens to learn from, {held} to search by, 16 to judge by"]
    return _claim(setting, seed, notes, ablations=False)


def _claim(setting: Setting, seed: int, notes: list[str], *, ablations: bool) -> Claim:
    calibration = setting.train[:: max(1, len(setting.train) // 128)]
    run = Run(Blueprint.of_module(setting.model), calibration=calibration, seed=seed, device=setting.device)
    run.begin("quantllm-ofa")
    untrained = method.quantised(run, Made(WIDTHS))
    run.model = run.entered
    with mock.patch.object(method, "fitted", lambda w, gram, codes, alpha, beta, **_: beta):
        gptq = method.quantised(run, Made(WIDTHS))
    feed = Feed(run, setting.batch, setting.train.shape[1])
    feed.ids = setting.train
    seconds: dict[str, float] = {}
    clock = time.process_time if setting.device == "cpu" else time.perf_counter  # of the processor: others may use it too

    def tuned(what: str, **changes: Any) -> Supernet:
        """Adapters trained from the same start, with these functions of the method in place of its own."""
        net, started = copy.deepcopy(untrained), clock()
        if what == "shared":
            share_adapters(net)
        with mock.patch.multiple(method, **changes) if changes else nullcontext():
            method.train(run, net, feed, steps=setting.steps, lr=setting.lr, teacher=setting.model)
        seconds[what] = clock() - started
        return net

    def perplexity(net: Supernet, choice: Choice) -> float:
        net.activate(choice)
        return meter.perplexity(net.model, setting.evaluation.to(setting.device))

    def found(net: Supernet, what: str) -> dict[float, Choice]:
        started, seen = clock(), dict[Choice, float]()
        picks = {
            b: net.find(setting.held_out, bits=b, seen=seen, samples=setting.samples, teacher=setting.model, seed=seed)
            for b in setting.budgets
        }
        seconds[f"search, {what}"] = clock() - started
        return picks

    dense = meter.perplexity(setting.model, setting.evaluation.to(setting.device))

    def divergence(net: Supernet, choice: Choice) -> float:
        return net.scorer(setting.evaluation, teacher=setting.model)(choice)

    def gap(value: float) -> float:
        return math.log(value / dense) if setting.log else value - dense

    ours = tuned("supernet")
    picks, rival_picks = found(ours, "supernet"), found(gptq, "GPTQ")
    values: dict[str, dict[float, float]] = {"LLM-QFA": {}, "GPTQ": {}, "QA-LoRA": {}}
    rows: list[dict[str, Any]] = [{"model": "dense", "perplexity": dense, "KL to dense": 0.0}]
    for b in setting.budgets:
        alone = tuned(f"alone, {b}", draw=fixed(picks[b]))
        for name, net, choice in (("LLM-QFA", ours, picks[b]), ("GPTQ", gptq, rival_picks[b]), ("QA-LoRA", alone, picks[b])):
            values[name][b] = perplexity(net, choice)
            rows.append(
                {
                    "model": name,
                    "budget, bits a code": b,
                    "bits a code": untrained.costs.mean_bits(choice),
                    "bits a weight, stored": untrained.costs.stored_bits(choice),
                    "widths": " ".join(map(str, choice)),
                    "perplexity": values[name][b],
                    "KL to dense": divergence(net, choice),
                }
            )

    def over_gap(mine: float, theirs: float) -> float:
        return gap(mine) / max(gap(theirs), NONE)

    over = {rival: {b: over_gap(values["LLM-QFA"][b], values[rival][b]) for b in picks} for rival in ("GPTQ", "QA-LoRA")}
    spent = seconds["supernet"] + seconds["search, supernet"]
    each = sum(s for what, s in seconds.items() if what.startswith("alone"))
    parts = [_ratio(f"{b:g} bits: gap over GPTQ's", over["GPTQ"][b], 0.6) for b in list(picks)[1:]]
    parts += [_ratio(f"{b:g} bits: gap over QA-LoRA's, tuned for it alone", over["QA-LoRA"][b], 1.1) for b in picks]
    share = 0.3 if len(picks) > 3 else 0.6
    parts.append(_ratio(f"training for {len(picks)} budgets: seconds over QA-LoRA's", seconds["supernet"] / each, share))
    if ablations:
        shared, uniform = tuned("shared"), tuned("uniform", mean_width=lambda i, widths, period: sum(widths) / len(widths))
        low, ends = min(picks), ((WIDTHS[0],) * len(ours.units), (WIDTHS[-1],) * len(ours.units))
        value = perplexity(shared, picks[low])
        parts.append(_ratio(f"{low:g} bits: gap over that with shared adapters", over_gap(values["LLM-QFA"][low], value), 1.0))
        rows.append({"model": "shared adapters", "budget, bits a code": low, "perplexity": value})
        both = {name: [perplexity(net, choice) for choice in ends] for name, net in (("LLM-QFA", ours), ("uniform sampling", uniform))}
        mine, theirs = (sum(map(gap, v)) for v in both.values())
        parts.append(_ratio("all 2 and all 4 bits: sum of gaps over that with uniform sampling", mine / max(theirs, NONE), 1.0))
        rows += [
            {"model": name, "bits a code": choice[0], "widths": f"all {choice[0]}", "perplexity": v}
            for name, found_at in both.items()
            for choice, v in zip(ends, found_at, strict=True)
        ]
    first = min(picks)
    return Claim(
        paper=PAPER,
        name=f"{first:g} bits a code: gap over GPTQ's at mixed widths, the same search",
        measured=over["GPTQ"][first],
        target=0.6,
        unit=f"times the {'log ' if setting.log else ''}{GAP}",
        better="lower",
        baseline=1.0,
        parts=parts,
        rows=rows,
        plot=Plot(
            kind="line",
            title="One training, many budgets",
            x="mean bits of a code",
            y="perplexity",
            series={name: sorted(v.items()) for name, v in values.items()},
            target=dense,
            log=setting.log,
        ),
        notes=[
            *notes,
            "Groups of 32 with 16-bit steps and offsets: one bit more for each stored weight",
            f"{setting.steps} steps of {setting.batch} windows for the supernet and for each QA-LoRA, from the same start, at one rate; "
            "QA-LoRA gets the configuration that our search found",
            "GPTQ as such: integer zero points, no fit of the offsets",
            f"Training and searching for all budgets: {spent:.0f} s{' of processor time' if setting.device == 'cpu' else ''}; "
            f"QA-LoRA's trainings: {each:.0f} s",
        ],
    )


def _ratio(name: str, measured: float, target: float) -> Measured:
    return Measured(name=name, measured=measured, target=target, unit="times", better="lower", baseline=1.0)


def fixed(choice: Choice) -> Callable[..., Choice]:
    """Instead of drawing: always this configuration. The supernet's training is then QA-LoRA's."""
    return lambda *_: choice


def share_adapters(net: Supernet) -> None:
    """Let all widths of a linear have the adapter of the smallest."""
    first, *others = net.made.widths
    shared = net.adapters(first)
    for linear in net.linears.values():
        for bits in others:
            linear.width(bits).lora_A, linear.width(bits).lora_B = linear.width(first).lora_A, linear.width(first).lora_B
    net.adapters = lambda *widths: shared if not widths or first in widths else []  # type: ignore[method-assign]
