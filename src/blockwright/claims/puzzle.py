"""The claim of Puzzle, arXiv 2411.19146: variants chosen per block by an exact program beat the same ones everywhere and fewer blocks.

On a CPU a small model is trained on real text first; on a GPU the parent is SmolLM2.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from blockwright import meter, zoo
from blockwright.blocks import layers
from blockwright.blocks.deployment import Costs, Deployment, measure_times
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer
from blockwright.blocks.run import Facts, Run
from blockwright.blocks.stream import Stream
from blockwright.blocks.subblocks import Option, variant
from blockwright.claims import small_model
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.search import puzzle as method

PAPER = "2.17 times the throughput of Llama-3.1-70B at 98.4 % of its accuracy; scores by KL beat scores by loss"
LATENCY = 0.6  # of the parent's measured time
TRAINING = 300  # steps of the parent
STEPS, LR = 40, 3e-3  # of each distillation
RANDOM = 24  # architectures that scores are compared on
UNIFORM = 2  # uniform children that are distilled in full, the best of all after a quarter of the steps
CPU = Deployment(32, 112, 16, "fp32")
GPU = Deployment(256, 512, 1024, "bf16")  # a step's length is 1024 on average


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """Children at the same measured cost: by the program, uniform, and by greedy removal of blocks; on cuda, SmolLM2 at 1.8 times."""
    return _smollm2(seed) if device == "cuda" else _small(seed)


class Bench:
    """A parent, the text, its library with measured times, and children made of it. loss : of a model on evaluation text, nats a token."""

    def __init__(
        self, model: nn.Module, text: Sequence[Int[Tensor, "n T"]], use: Deployment, seed: int, device: str, **library: Any
    ) -> None:
        self.parent, self.use, self.seed, self.device = model, use, seed, device
        self.calibration, self.evaluation = text
        self.blueprint = Blueprint.of_module(model)
        self.parts = method.find_all(self.blueprint)
        self.library = method.Library(self.parts, by="puzzle", **library)
        times = measure_times(self.blueprint, self.parts, self.library.every, use, device=device)
        self.costs = Costs(self.blueprint, self.parts, self.library.slots, use, times)
        self.dense = self.loss(model)

    def run(self) -> Run:
        run = Run(self.blueprint, calibration=self.calibration, seed=self.seed, device=self.device)
        run.begin("puzzle")
        return run

    def loss(self, model: nn.Module) -> float:
        return meter.loss(model, self.evaluation, batch=16)

    def learn(self, steps: int) -> Callable[..., Any]:
        return partial(method.distil, mask=None, steps=steps, lr=LR, batch_size=8)

    def weigh(self, steps: int) -> list[Facts]:
        return method.weigh(self.run(), self.parts, self.library, learn=self.learn(steps))

    def choose(self, facts: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> tuple[int, ...]:
        return method.choose(self.library, [f["scores"] for f in facts], self.costs, limits)

    def child(self, picks: Sequence[int], facts: Sequence[Facts], steps: int) -> nn.Module:
        run = self.run()
        method.realise(run, self.parts, self.library.named(picks), facts, learn=self.learn(method.WHOLE * steps))
        return run.model.build(device=self.device)

    def uniform(self, facts: Sequence[Facts], limits: Mapping[str, float]) -> list[tuple[int, ...]]:
        """The same two options everywhere, of all that are within the limits, by their loss after a short distillation."""
        attention, ffn = self.library.slots[:2]
        pairs = [(i, k) * len(self.parts) for i in range(len(attention)) for k in range(len(ffn))]
        return sorted((p for p in pairs if self.within(p, limits)), key=lambda p: self.loss(self.child(p, facts, STEPS // 4)))

    def within(self, picks: Sequence[int], limits: Mapping[str, float]) -> bool:
        cost, parent = self.costs.of(picks), self.costs.parent
        spent = {"latency": cost.time / parent.time, "memory": (cost.parameters + cost.kv) / (parent.parameters + parent.kv)}
        return all(spent[name] <= share for name, share in limits.items())

    def estimate(self, picks: Sequence[int], facts: Sequence[Mapping[str, Any]]) -> float:
        pairs = enumerate(self.library.named(picks))
        return sum(facts[i]["scores"][str(o)] for i, options in pairs for o in options if o.kind != "parent")

    def greedy(self, limits: Mapping[str, float]) -> tuple[int, ...]:
        """Whole blocks removed one by one, each time the one without which the model diverges least, until the limits are kept."""
        last = [len(options) - 1 for options in self.library.slots]  # nothing
        scorer, picks = Scorer(self.run(), 16), [0] * len(last)
        while not self.within(picks, limits):
            tried = []
            for i in [i for i in range(len(self.parts)) if not picks[2 * i]]:
                trial = [*picks[: 2 * i], *last[2 * i : 2 * i + 2], *picks[2 * i + 2 :]]
                keep = [j for j in range(len(self.parts)) if not trial[2 * j]]
                tried.append((scorer.of_model(self.blueprint.with_layers(keep)), trial))
            picks = min(tried, key=lambda pair: pair[0])[1]
        return tuple(picks)

    def shallow(self, picks: Sequence[int], steps: int) -> nn.Module:
        """The model without the blocks that `greedy` removed. A block after removed ones learns to do their work too, the last one that of
        those after it: from the parent's inputs before them to its outputs. steps : of all that learning together."""
        keep = [i for i in range(len(self.parts)) if not picks[2 * i]]
        stream = Stream(self.blueprint, self.calibration, device=self.device)
        hidden = [stream.embedded]
        for i in range(stream.num_blocks):
            hidden.append(stream.block(self.blueprint, i).outputs(hidden[-1]))
        spans = []
        for at, i in enumerate(keep):
            start = keep[at - 1] + 1 if at else 0
            end = i + 1 if i != keep[-1] else stream.num_blocks
            if end - start > 1:
                spans.append((at, i, start, end))
        model = self.blueprint.with_layers(keep).build(device=self.device)
        chain: Any = model.get_submodule(layers.chain_path(model))
        for at, i, start, end in spans:
            block = stream.block(self.blueprint, i)
            modules = {n: m for p in ("attention", "ffn") for n, m in variant(block.module, self.parts[i], Option(p, "parent")).items()}
            rng = torch.Generator(self.device).manual_seed(self.seed)
            self.learn(steps // len(spans))(block, modules, hidden[start], hidden[end], rng=rng)
            for name, module in modules.items():
                chain[at].get_submodule(name).load_state_dict(module.state_dict())
        return model


def _small(seed: int) -> Claim:
    ids, calibration, _, evaluation = small_model.texts(64)
    parent = small_model.trained(ids, layers=6, steps=TRAINING, seed=seed, batch=8, heads=8, kv_heads=4)
    bench = Bench(parent, (calibration, evaluation[:128]), CPU, seed, "cpu", heads=[1], widths=[0.5, 0.25])
    limits = {"latency": LATENCY}
    made: dict[tuple[int, str], Mapping[str, nn.Module]] = {}  # the trained variants
    by_loss: list[dict[str, Any]] = []

    true = Scorer.of_variants

    def both(scorer: Any, index: int, x: Float[Tensor, "n T d"], variants: Sequence[Mapping[str, nn.Module]]) -> list[float]:
        names = [str(o) for options in bench.library.slots[2 * index : 2 * index + 2] for o in options[1:]]
        made.update({(index, name): modules for name, modules in zip(names, variants, strict=True)})
        scorer.metric = "loss"
        by_loss.append({"scores": dict(zip(names, true(scorer, index, x, variants), strict=True))})
        scorer.metric = "kl"
        return true(scorer, index, x, variants)

    with mock.patch.object(Scorer, "of_variants", both):
        facts = bench.weigh(STEPS)
    bare = bench.weigh(0)

    rows: list[dict[str, Any]] = []

    def row(name: str, picks: Sequence[int], model: nn.Module) -> float:
        rise = bench.loss(model) - bench.dense
        share = bench.costs.of(picks).time / bench.costs.parent.time
        rows.append(
            {"child": name, "loss above the parent's": rise, "time by the table": share, "blocks": _words(bench.library.named(picks))}
        )
        return rise

    picks = bench.choose(facts, limits)
    child = bench.child(picks, facts, STEPS)
    ours = row("by the program", picks, child)
    bare_picks = bench.choose(bare, limits)
    untrained = row("by the program, without distillation", bare_picks, bench.child(bare_picks, bare, 0))
    uniform = min(row("uniform", p, bench.child(p, facts, STEPS)) for p in bench.uniform(facts, limits)[:UNIFORM])
    removed = bench.greedy(limits)
    changed = sum(any(pair) for pair in zip(picks[::2], picks[1::2], strict=True))
    shallow = row("whole blocks removed", removed, bench.shallow(removed, method.WHOLE * STEPS * changed))
    by_kl, by_rise = _ranking(bench, made, facts, by_loss)
    predicted = bench.costs.parent.time / bench.costs.of(picks).time
    faster = meter.ratio(lambda: _generate(parent, CPU), lambda: _generate(child, CPU), repeats=9)

    return Claim(
        paper=PAPER,
        name="rise of the loss at 60 % of the time: by the program over uniform",
        measured=ours / uniform,
        target=0.5,
        unit="ratio of rises",
        better="lower",
        baseline=1.0,
        parts=[
            Measured(
                name="over whole blocks removed", measured=ours / shallow, target=0.5, unit="ratio of rises", better="lower", baseline=1.0
            ),
            Measured(
                name="with distillation over without",
                measured=ours / untrained,
                target=0.8,
                unit="ratio of rises",
                better="lower",
                baseline=1.0,
            ),
            Measured(
                name=f"rank correlation with the true rise, {RANDOM} random children: scores by KL less scores by loss",
                measured=by_kl - by_rise,
                target=0.0,
                unit="Spearman's rho",
                better="higher",
            ),
            Measured(
                name="speed-up measured against the table's",
                measured=abs(faster.median / predicted - 1),
                target=0.1,
                unit="relative error",
                better="lower",
                spread=(abs(faster.low / predicted - 1), abs(faster.high / predicted - 1)),
            ),
        ],
        rows=[{"child": "the parent", "loss above the parent's": 0.0, "time by the table": 1.0, "loss": bench.dense}, *rows],
        plot=Plot(
            kind="bar",
            title="Children at 60 % of the parent's time",
            x="",
            y="loss above the parent's, nats a byte",
            series={"": [("program", ours), ("not distilled", untrained), ("uniform", uniform), ("blocks removed", shallow)]},
        ),
        notes=[
            f"A Llama of 6 blocks, width 128, 8 heads on 4, 352 channels, trained {TRAINING} steps on the bytes of Python's documentation",
            f"Times at batch {CPU.batch}, {CPU.prefill} tokens in, {CPU.generation} out, fp32: {predicted:.2f} times as fast by the table, "
            f"{faster.median:.2f} measured",
            "Attention: parent, 1 key head, linear, none; feed-forward: parent, 50 %, 25 %, linear, none",
            f"{STEPS} steps of 8 x 128 bytes for each variant, {method.WHOLE} times as many for each changed block as a whole",
            f"Uniform children within the budget learn for a quarter of the steps, the best {UNIFORM} in full",
            "Blocks next to removed ones share as many steps as the chosen child had, and learn to do the work of the removed ones too, "
            "which is more than the method offers its own children",
            f"Spearman's rho of the sum of scores with the true rise of the loss: {by_kl:.3f} by KL, {by_rise:.3f} by loss",
        ],
    )


def _ranking(
    bench: Bench, made: Mapping[tuple[int, str], Mapping[str, nn.Module]], by_kl: Sequence[Any], by_loss: Sequence[Any]
) -> tuple[float, float]:
    """Spearman's rho of the two estimates with the true rise of the loss, over random children of distilled variants."""
    rng = torch.Generator().manual_seed(bench.seed)
    estimates: tuple[list[float], list[float]] = ([], [])
    truths = []
    for number in range(RANDOM):
        picks = [0] * len(bench.library.slots)
        for slot in torch.randperm(len(picks), generator=rng)[: 1 + number % 6].tolist():
            picks[slot] = int(torch.randint(1, len(bench.library.slots[slot]), (1,), generator=rng))
        model = bench.blueprint.build()
        chain: Any = model.get_submodule(layers.chain_path(model))
        for i, options in enumerate(bench.library.named(picks)):
            for option in [o for o in options if o.kind != "parent"]:
                for name, module in made[i, str(option)].items():
                    layers.swap(chain[i], name, module)
        truths.append(bench.loss(model))
        for found, facts in zip(estimates, (by_kl, by_loss), strict=True):
            found.append(bench.estimate(picks, facts))
    return tuple(float(spearmanr(found, truths).statistic) for found in estimates)  # type: ignore[return-value]


def _words(options: Sequence[tuple[Option, Option]]) -> str:
    """The options of each block in short."""
    return "; ".join(" + ".join(o.kind + (f" {o.size}" if o.size else "") for o in pair) for pair in options)


@torch.no_grad()
def _generate(model: Any, use: Deployment) -> None:
    """A batch, greedily: the prefill, then a step a token."""
    device = next(model.parameters()).device
    ids = (torch.arange(use.batch * use.prefill, device=device) % 97).reshape(use.batch, -1)
    cache = {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": DynamicCache(config=model.config)}
    for _ in range(use.generation + 1):
        ids = model(ids, use_cache=True, logits_to_keep=1, **cache).logits.argmax(-1)


# GPU


def _smollm2(
    seed: int,
    *,
    device: str = "cuda",
    model: Any = None,
    text: Sequence[Int[Tensor, "n T"]] | None = None,
    use: Deployment = GPU,
    steps: int = 24,
    gkd_steps: int = 120,
) -> Claim:
    """SmolLM2-135M at 1.8 times the throughput and 60 % of the bytes, distilled, against the best uniform child of the same steps."""
    if model is None:
        model, tokenizer = zoo.smollm2(), zoo.tokenizer()
        text = (
            zoo.windows("python-source", "calibration", num=256, length=512, tokenizer=tokenizer),
            zoo.windows("python-source", "evaluation", num=16, length=512, tokenizer=tokenizer).to(device),
        )
    assert text is not None
    bench = Bench(model.to(device), text, use, seed, device, widths=[0.75, 0.5, 0.25])
    limits = {"latency": 1 / 1.8, "memory": 0.6}
    facts = bench.weigh(steps)

    def healed(picks: Sequence[int]) -> nn.Module:
        run = bench.run()
        method.realise(run, bench.parts, bench.library.named(picks), facts, learn=bench.learn(method.WHOLE * steps))
        return method.heal(run, method.Feed(run, 8, 256), steps=gkd_steps, lr=3e-4).eval()

    rows: list[dict[str, Any]] = []
    children: dict[str, Any] = {}
    picks = bench.choose(facts, limits)
    for name, chosen in {"by the program": picks, "uniform": bench.uniform(facts, limits)[0]}.items():
        children[name] = healed(chosen)
        cost, parent = bench.costs.of(chosen), bench.costs.parent
        rows.append(
            {
                "child": name,
                **meter.quality(children[name], bench.evaluation, dense=bench.parent),
                "times as fast by the table": parent.time / cost.time,
                "share of bytes": (cost.parameters + cost.kv) / (parent.parameters + parent.kv),
                "blocks": _words(bench.library.named(chosen)),
            }
        )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[use.dtype]
    slow, fast = bench.parent.to(dtype), children["by the program"].to(dtype)
    faster = meter.ratio(lambda: _generate(slow, use), lambda: _generate(fast, use), repeats=3, warmup=1)
    ours, theirs = rows
    bound = (bench.costs.parent.parameters + bench.costs.parent.kv) / (bench.costs.of(picks).parameters + bench.costs.of(picks).kv)
    return Claim(
        paper=PAPER,
        name=f"throughput at batch {use.batch}, length {use.prefill} to {use.prefill + use.generation}",
        measured=faster.median,
        target=1.8,
        unit="times the parent's",
        better="higher",
        baseline=1.0,
        spread=(faster.low, faster.high),
        parts=[
            Measured(name="same next token as the parent", measured=ours["top1"], target=0.9, unit="share", better="higher"),
            Measured(
                name="KL to the parent over the uniform child's",
                measured=ours["kl"] / theirs["kl"],
                target=1.0,
                unit="ratio",
                better="lower",
            ),
            Measured(
                name="bytes of weights, keys and values",
                measured=ours["share of bytes"],
                target=0.6,
                unit="of the parent's",
                better="lower",
            ),
        ],
        rows=rows,
        notes=[
            f"{steps} steps of distillation a variant and a block, {gkd_steps} of the whole, for both children",
            f"Decoding at a large batch is bound by bytes: at most {bound:.2f} times",
        ],
    )
