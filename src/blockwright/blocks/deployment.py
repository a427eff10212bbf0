"""What subblocks cost where a model is used: bytes of parameters, of keys and values, and time, at a stated batch, length and dtype."""

import copy
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from blockwright.blocks import folders, layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.subblocks import Option, Subblocks, swapped, variant
from blockwright.errors import BlockwrightError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMAT = 1
NANO = 10**9


class Deployment(NamedTuple):
    """How a model is used: `batch` requests at a time, each of `prefill` tokens and `generation` more, in this dtype (bf16, fp16, fp32)."""

    batch: int
    prefill: int
    generation: int
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize


def kv_bytes(kv_width: int, deployment: Deployment) -> int:
    """Bytes of the keys and values of one layer at full length. kv_width : heads times width of one."""
    return 2 * kv_width * deployment.itemsize * (deployment.prefill + deployment.generation) * deployment.batch


@dataclass(frozen=True)
class Times:
    """Seconds of a batch, prefill and generation together: of each option in one block, and of what is around the options (`around`)."""

    deployment: Deployment
    around: float
    options: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"format": FORMAT, **self.deployment._asdict(), "around": self.around, "options": dict(self.options)}

    def save(self, path: Path) -> None:
        """Write it as a JSON file."""
        folders.replace_file(path, lambda scratch: scratch.write_text(json.dumps(self.json(), indent=1) + "\n"))

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "Times":
        """From what `json` gave. Raises LookupError, TypeError or ValueError for anything else."""
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        deployment = Deployment(int(about["batch"]), int(about["prefill"]), int(about["generation"]), str(about["dtype"]))
        times = cls(deployment, float(about["around"]), {str(name): float(t) for name, t in dict(about["options"]).items()})
        if not all(math.isfinite(t) and t >= 0 for t in (times.around, *times.options.values())):
            raise ValueError("a time below 0")
        return times

    @classmethod
    def load(cls, path: Path, deployment: Deployment, options: Sequence[Option]) -> "Times":
        """From a file, for this deployment and these options.

        Raises BlockwrightError where it is no such file, lacks an option, or was measured at another batch, length or dtype.
        """
        try:
            times = cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise BlockwrightError(
                f"times {path}: no table of times", allowed="a file that Times.save wrote", do="Measure it again"
            ) from None
        for key, there, here in zip(Deployment._fields, times.deployment, deployment, strict=True):
            if there != here:
                raise BlockwrightError(
                    f"times {path}: measured at {key}={there}", allowed=f"{key}={here}, as asked for", do="Measure it again"
                )
        missing = [str(o) for o in options if str(o) not in times.options]
        if missing:
            raise BlockwrightError(f"times {path}: holds no {missing[0]!r}", do="Measure it with the same options")
        return times


@torch.no_grad()
def measure_times(
    model: Blueprint, parts: Sequence[Subblocks], options: Sequence[Option], deployment: Deployment, *, device: str | torch.device = "cpu"
) -> Times:
    """The time of each option, measured on whole models whose blocks all have it and nothing in the place of their other subblock.

    So caches are as cold as in use, and the cost of what is around the options (embedding, head, masks, residuals) is that of a model with
    neither. Raises BlockwrightError for blocks of different sizes, and for a length beyond what the model knows.
    """
    check_length(model.config, deployment)
    whole: Any = model.build(device=device, dtype=DTYPES[deployment.dtype])
    blocks = whole.get_submodule(layers.chain_path(whole))
    if len({(p.attention.kv_width, p.ffn.size) for p in parts}) > 1:
        raise BlockwrightError("times: blocks of different sizes", allowed="blocks of one size", do="Use a budget of bytes")
    nothing = {part: Option(part, "none") for part in ("attention", "ffn")}

    def seconds(attention: Option, ffn: Option) -> float:
        with ExitStack() as stack:
            for block, where in zip(blocks, parts, strict=True):
                made = {**variant(block, where, attention), **variant(block, where, ffn)}
                stack.enter_context(swapped(block, made))
            return time_of(whole, deployment)

    around = seconds(nothing["attention"], nothing["ffn"])
    times = {}
    for option in options:
        mine = {**nothing, option.part: option}
        bare = option == nothing[option.part]
        times[str(option)] = 0.0 if bare else max(0.0, seconds(mine["attention"], mine["ffn"]) - around) / len(blocks)
    return Times(deployment, around, times)


@torch.no_grad()
def time_of(model: Any, deployment: Deployment, *, repeats: int = 5) -> float:
    """Seconds that a batch takes: the prefill, and as many steps as tokens are generated, each like one at half their number.

    The least of some repeats: what else runs on a machine only ever adds.
    """
    batch, prefill, generation, _ = deployment
    device = next(model.parameters()).device
    ids = torch.arange(batch * (prefill + generation), device=device).reshape(batch, -1) % int(model.config.vocab_size)
    accepted = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    name = "cache" if "cache" in accepted else "past_key_values"

    def forward(rows: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(rows, use_cache=True, **{name: cache}, **last)
        return cache

    full = forward(ids[:, : prefill + generation // 2])

    def step(given: list[DynamicCache]) -> None:
        model(ids[:, :1], use_cache=True, **{name: given.pop()}, **last)

    first = least(lambda _: forward(ids[:, :prefill]), repeats)
    return first + generation * least(step, repeats, lambda: [copy.deepcopy(full)])


def least(fn: Callable[[Any], Any], repeats: int, prepare: Callable[[], Any] = lambda: None) -> float:
    """The least seconds of some calls on what `prepare` gives, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        given = prepare()
        _synchronize()
        start = time.perf_counter()
        fn(given)
        _synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def check_length(config: PreTrainedConfig, deployment: Deployment) -> None:
    """Raise BlockwrightError where a request is longer than the model knows."""
    most, length = getattr(config, "max_position_embeddings", None), deployment.prefill + deployment.generation
    if isinstance(most, int) and length > most:
        raise BlockwrightError(
            f"prefill={deployment.prefill}, generation={deployment.generation}: {length} tokens",
            allowed=f"up to {most}, which the model knows",
        )


class Cost(NamedTuple):
    """Bytes of parameters, bytes of keys and values, nanoseconds of a batch."""

    parameters: int
    kv: int
    time: int


class Costs:
    """What each option of each subblock costs, and the rest of the model: a child's cost is their sum.

    slots : for each, its options. around : the rest. parent : the sum for the model as it is.
    """

    def __init__(
        self,
        model: Blueprint,
        parts: Sequence[Subblocks],
        slots: Sequence[Sequence[Option]],
        deployment: Deployment,
        times: Times | None = None,
    ) -> None:
        skeleton = model.skeleton()
        blocks = skeleton.get_submodule(layers.chain_path(skeleton))
        self.slots: list[list[Cost]] = []
        for i, (block, where) in enumerate(zip(blocks, parts, strict=True)):  # type: ignore[call-overload]
            nothing = {part: variant(block, where, Option(part, "none")) for part in ("attention", "ffn")}
            left = _numel(block, nothing["attention"] | nothing["ffn"])
            for other, options in zip(("ffn", "attention"), slots[2 * i : 2 * i + 2], strict=True):
                costs = []
                for option in options:
                    width = where.attention.kv_width if option.part == "attention" else 0
                    kept = {"parent": width, "heads": option.size * width // (where.attention.kv_heads or 1)}.get(option.kind, 0)
                    size = (_numel(block, nothing[other] | variant(block, where, option)) - left) * deployment.itemsize
                    costs.append(Cost(size, kv_bytes(kept, deployment), 0 if times is None else round(times.options[str(option)] * NANO)))
                self.slots.append(costs)
        once = {place: name for name, place in model.tensors.items()}.values()
        total = sum(torch.Size(model.tensors.facts(name).shape).numel() for name in once) * deployment.itemsize
        whole = total - sum(costs[0].parameters for costs in self.slots)
        self.around = Cost(whole, 0, 0 if times is None else round(times.around * NANO))
        self.parent = self.of([0] * len(self.slots))

    def of(self, picks: Sequence[int]) -> Cost:
        """The cost of the model with these picks."""
        chosen = [costs[i] for costs, i in zip(self.slots, picks, strict=True)]
        return Cost(*(sum(values) for values in zip(self.around, *chosen, strict=True)))


def _numel(block: nn.Module, modules: Mapping[str, nn.Module]) -> int:
    """Parameters of a block with these modules in it."""
    with swapped(block, modules):
        return sum(p.numel() for p in block.parameters())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
