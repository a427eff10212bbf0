"""The Run: passes over the blocks of a model, journalled per block, so that a stage is only its mathematics.

A stage is `f(run, *, options)`. The Run owns memory (one block resident), order, files, journal, progress and seeds. Each pass makes a new
blueprint: an overlay of changed tensors on the model before it. With a journal, every finished block is on disk before the next
one starts; a run that was killed repeats no finished block, and ends with the same bits.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from blockwright.blocks import folders, layers, parameters
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding
from blockwright.blocks.parameters import Place
from blockwright.blocks.stream import Block, Stream
from blockwright.errors import BlockwrightError

Facts = dict[str, Any]  # what a pass learned of one block: JSON values and tensors
Visit = Callable[[Block, Tensor | None, Tensor | None, torch.Generator], Facts | None]
Progress = Callable[[str, int, int], None]  # told of every step of long work: what is done, how much of it, out of how much


class Listener(Protocol):
    """Hears the inputs [t, K] of each linear of a block and the gradients at its outputs [t, N]; in the end it tells the block's facts."""

    def hear(self, name: str, x: Tensor, gradient: Tensor) -> None: ...

    def facts(self) -> Facts: ...


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


class Run:
    """A model on its way through stages.

    model : the blueprint as it stands now. calibration : token ids [n, T], or None for stages that need no data; images [n, C, H, W] for
    stages that run a whole vision model. mask : see Stream.
    journal : folder for finished units, or None to keep them in memory. seed : of every random number, through `generator`.
    dtype : in which the model will be written where it is not quantised.
    """

    def __init__(
        self,
        model: Blueprint,
        *,
        calibration: Int[Tensor, "n T"] | Float[Tensor, "n C H W"] | None = None,
        mask: Int[Tensor, "n T"] | None = None,
        journal: Path | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        batch: int = 8,
        progress: Progress = silent,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        self.model, self.calibration, self.mask, self.journal = model, calibration, mask, journal
        self.seed, self.device, self.batch, self.progress = seed, device, batch, progress
        self.begin("stage")

    def begin(self, stage: str) -> None:
        """A new stage starts: what the model is now is what `dense` inputs and targets mean until the next one."""
        self.stage, self.entered, self._passes = stage, self.model, 0
        self.curves: dict[str, list[float]] = {}  # for the report: a loss curve by block or loop
        self.details: dict[str, Any] = {}  # for the report: what else a stage found, as JSON

    def branch(self, name: str) -> None:
        """From here on, units are journalled and random numbers drawn under a name that tells what all that follows depends on: a digest of
        what was measured, say, where that may have come from a file. A run resumed with others then finds no units of these."""
        self.stage, self._passes = f"{self.stage}-{name}", 0

    def generator(self, *unit: object) -> torch.Generator:
        """Random numbers of one unit, from hash(seed, stage, unit): the same whatever ran before."""
        digest = hashlib.sha256(repr((self.seed, self.stage, *unit)).encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def blocks(
        self,
        fn: Visit,
        *,
        inputs: Literal["none", "treated", "dense"] = "none",
        target: bool = False,
        write: bool = False,
        watch: Callable[[Block], None] = lambda block: None,
    ) -> list[Facts]:
        """One pass: `fn(block, x, y, rng)` for each block, in order, with that block resident. Returns what each call returned, as JSON
        holds it (tuples become lists) and with copies of its tensors. fn changes neither x nor y.

        inputs : x is the block's input [n, T, d] in the model as changed so far, this pass included (treated), or in the model as
            it entered the stage (dense).
        target : y is the output of the block as it entered the stage, on the dense inputs; else None.
        write : keep what fn changed in the block.
        watch : called with a block before its output on the dense inputs is computed, to hang hooks into it that hear that forward pass.
        Raises BlockwrightError without calibration data, or where a value is not finite (tensor and block named).
        """
        if (inputs != "none" or target) and self.calibration is None:
            raise BlockwrightError(
                f"{self.stage}: needs calibration text", do="Give `calibration:` in the recipe, or calibration=token_ids"
            )
        number, self._passes = self._passes, self._passes + 1
        needs = inputs != "none" or target
        entering, entered = self.model, self.entered
        if (inputs == "dense" or target) and layers.num_blocks(entering.config) != layers.num_blocks(entered.config):
            raise BlockwrightError(f"{self.stage}: dense inputs after blocks were dropped", do="Read them first, or begin a new stage")
        stream = Stream(
            entering, self.calibration if needs else None, mask=self.mask if needs else None, device=self.device, batch=self.batch
        )
        treated = stream.embedded if inputs == "treated" else None
        dense = stream.embedded if inputs == "dense" or target else None
        found = []
        for i in range(stream.num_blocks):
            self.progress(f"{self.stage} pass {number + 1}", i, stream.num_blocks)
            unit = _Unit(self.journal, self.stage, number, i)
            done = unit.load()
            block = stream.block(self.model, i)  # not `entering`: a block before it may share its weights and have changed them
            y = None
            if dense is not None and (target or i + 1 < stream.num_blocks):
                heard = block if _same_block(self.model, entered, block.name) else stream.block(entered, i)
                if done is None:
                    watch(heard)
                y = heard.outputs(dense)
                del heard
            if done is None:
                x = treated if inputs == "treated" else dense if inputs == "dense" else None
                rng = self.generator(number, i)
                facts = fn(block, x, y if target else None, rng) or {}
                done = unit.keep(facts, block, self.model if write else None)
            found.append(done.facts)
            if done.forms is not None:
                self.model = _with_block(self.model, block.name, done)
            del block  # before the next one is read
            if treated is not None and i + 1 < stream.num_blocks:
                treated = stream.block(self.model, i).outputs(treated)  # as kept: rounded to its dtype, and without what fn did in vain
            dense = y if dense is not None else None
        self.progress(f"{self.stage} pass {number + 1}", stream.num_blocks, stream.num_blocks)
        return found

    def backward(self, listen: Callable[[Block], Listener]) -> list[Facts]:
        """One pass from the last block to the first, with that block resident, of the gradients of `Stream.surprise`: how far a change of
        each linear's output moves the model's predictions.

        listen : called with a block, gives what hears of its linears and then tells the block's facts.
        Before it, one pass forward; the inputs of each block are kept in the journal, in memory where there is none.
        Raises BlockwrightError without calibration data, or where a value is not finite (tensor and block named).
        """
        if self.calibration is None:
            raise BlockwrightError(
                f"{self.stage}: needs calibration text", do="Give `calibration:` in the recipe, or calibration=token_ids"
            )
        forward, number = self._passes, self._passes + 1
        self._passes += 2
        model, total = self.model, layers.num_blocks(self.model.config)
        stream = Stream(model, self.calibration, mask=self.mask, device=self.device, batch=self.batch)
        inputs: list[_Unit] = []
        kept: list[_Done | None] = []  # without a journal; with one they are read again when they are needed
        x = stream.embedded
        for i in range(total + 1):
            self.progress(f"{self.stage} pass {forward + 1}", i, total)
            unit = _Unit(self.journal, self.stage, forward, i)
            held = unit.load() or unit.keep({"x": x}, None, None, f"inputs of block {i}")
            inputs.append(unit)
            kept.append(held if self.journal is None else None)
            if i < total:
                x = stream.block(model, i).outputs(held.facts["x"].to(self.device))
        del x

        def entering(i: int) -> Tensor:
            there = kept[i] or inputs[i].load()
            assert there is not None
            return cast(Tensor, there.facts["x"]).to(self.device)

        found: list[Facts] = []
        gradient: Tensor | None = None
        for i in reversed(range(total)):
            self.progress(f"{self.stage} pass {number + 1}", total - 1 - i, total)
            unit = _Unit(self.journal, self.stage, number, i)
            done = unit.load()
            if done is None:
                if gradient is None:
                    gradient = stream.surprise(model, entering(total), self.generator(number, "labels"))
                block = stream.block(model, i)
                listener = listen(block)
                before = block.differentiate(entering(i), gradient, listener.hear)
                done = unit.keep(listener.facts() | {"gradient": before}, None, None, f"block {block.name}")
                del block
            gradient = done.facts["gradient"].to(self.device)
            kept[i + 1] = None
            found.append({key: value for key, value in done.facts.items() if key != "gradient"})
        self.progress(f"{self.stage} pass {number + 1}", total, total)
        return found[::-1]

    def train(
        self,
        loss: Callable[[int, torch.Generator], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        every: int = 20,
        before: Callable[[int], None] = lambda i: None,
    ) -> list[float]:
        """A loop end to end: `loss(i, rng)` and one optimiser step, `steps` times. Returns the losses.

        before : called with the step number first (learning rates, annealing). The optimiser's parameters and state are journalled every
        `every` steps. Raises BlockwrightError when the loss, a parameter or the optimiser's state is not finite.
        """
        number, self._passes = self._passes, self._passes + 1
        unit = _Unit(self.journal, self.stage, number, 0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        losses: list[float] = []
        done = unit.load()
        if done is not None:
            losses = done.facts["losses"]
            _restore(optimizer, parameters, done.facts)
        for i in range(len(losses), steps):
            self.progress(f"{self.stage} training", i, steps)
            before(i)
            optimizer.zero_grad()
            value = loss(i, self.generator(number, i))
            layers.check_finite(value.detach(), f"{self.stage}: loss at step {i}")
            value.backward()
            optimizer.step()
            losses.append(value.item())
            if (i + 1) % every == 0 or i + 1 == steps:
                unit.keep({"losses": losses} | _state(optimizer, parameters), None, None, f"{self.stage}: step {i}")
        self.progress(f"{self.stage} training", steps, steps)
        return losses


F = TypeVar("F", bound=Callable[..., None])


def stage(fn: F) -> F:
    """A stage is called with a Run inside a recipe, or with a transformers model in memory:

    `smaller = method(model, calibration=ids, seed=0, **options)` returns a new model and leaves `model` as it was.
    """

    @functools.wraps(fn)
    def call(
        subject: Run | nn.Module, /, *, calibration: Tensor | None = None, mask: Tensor | None = None, seed: int = 0, **options: Any
    ) -> nn.Module | None:
        if isinstance(subject, Run):
            return fn(subject, **options)
        device = next((p.device for p in subject.parameters()), torch.device("cpu"))
        run = Run(Blueprint.of_module(subject), calibration=calibration, mask=mask, seed=seed, device=device)
        run.begin(fn.__name__)
        fn(run, **options)
        built = run.model.build(device=device)
        for packed in (m for m in built.modules() if isinstance(m, PackedEmbedding)):
            packed.gives = next(p.dtype for p in subject.parameters())
        return built

    return cast(F, call)


class _Done:
    """A finished unit: its facts, and, where the block was written, forms and tensors by full name."""

    def __init__(self, facts: Facts, forms: dict[str, layers.Form] | None, places: dict[str, Place], memory: Mapping[str, Tensor]) -> None:
        self.facts, self.forms, self.places, self.memory = facts, forms, places, memory


_UNITS = itertools.count()  # names the units that are kept in memory


class _Unit:
    """One unit of the journal: a safetensors file holding facts and, where the block was written, its tensors."""

    def __init__(self, journal: Path | None, stage: str, number: int, index: int) -> None:
        self.path = None if journal is None else journal / stage / f"pass-{number}" / f"unit-{index:04d}.safetensors"

    def load(self) -> _Done | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            about = json.loads(parameters.metadata(self.path)["unit"])
        except (KeyError, ValueError):
            raise BlockwrightError(f"{self.path}: no finished unit", do="Use --overwrite to start again; this file is damaged") from None
        names = parameters.header(self.path)
        stored = parameters.Tensors({n: Place(self.path, n) for n in names if n.startswith("fact:")}).read(
            [n for n in names if n.startswith("fact:")]
        )
        facts = about["facts"] | {name.removeprefix("fact:"): t for name, t in stored.items()}
        places = {n.removeprefix("weight:"): Place(self.path, n) for n in names if n.startswith("weight:")}
        return _Done(facts, about["forms"], places, {})

    def keep(self, facts: Facts, block: Block | None, entering: Blueprint | None, what: str = "") -> _Done:
        """Finish the unit: its facts and, with `entering`, the block's tensors, floating ones in the dtype they were stored in.

        what : names the unit in an error, in place of its block. Raises BlockwrightError for a fact or a tensor that is not finite.
        """
        where = what or f"block {block.name if block else ''}"
        weights = {} if block is None or entering is None else _stored(block, entering)
        forms = None if block is None or entering is None else dict(block.forms)
        tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in facts.items() if isinstance(v, Tensor)}
        for key, value in tensors.items():
            layers.check_finite(value, f"{where}: {key}")
        numbers = {k: v for k, v in facts.items() if k not in tensors}
        try:
            plain = json.dumps(numbers, allow_nan=False)
        except ValueError:
            raise BlockwrightError(f"{where}: {numbers} is not finite", do="Look at the block's inputs; nothing was written") from None
        if self.path is None:
            token = f"{next(_UNITS)}:"
            memory = {token + name: t for name, t in weights.items()}
            return _Done(json.loads(plain) | tensors, forms, {name: Place(None, token + name) for name in weights}, memory)
        content = {f"fact:{key}": value for key, value in tensors.items()}
        content |= {f"weight:{name}": t.cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
        about = {"unit": json.dumps({"facts": json.loads(plain), "forms": forms})}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folders.replace_file(self.path, lambda scratch: save_file(content, scratch, metadata=about))
        except OSError as error:
            raise folders.told(self.path.parent, error) from error
        done = self.load()
        assert done is not None
        return done


def _stored(block: Block, entering: Blueprint) -> dict[str, Tensor]:
    out = {}
    for inner, t in block.module.state_dict().items():
        name = f"{block.name}.{inner}"
        known = name in entering.tensors and t.is_floating_point()
        out[name] = t.detach().to(entering.tensors.facts(name).dtype) if known else t.detach()
        layers.check_finite(out[name], f"{name} (block {block.name})")  # as it is kept: fp16 overflows where fp32 does not
    return out


def _same_block(a: Blueprint, b: Blueprint, name: str) -> bool:
    """Whether a block's tensors lie in the same places in both."""
    mine, theirs = ({n: p for n, p in m.tensors.items() if n.startswith(name + ".")} for m in (a, b))
    return mine == theirs


def _with_block(model: Blueprint, name: str, done: _Done) -> Blueprint:
    """The model with a block's tensors in their new places; blocks that shared a tensor with it go on sharing it."""
    tensors, forms = model.tensors, dict(model.forms)
    removed = [n for n in tensors if n.startswith(name + ".")]
    added = dict(done.places)
    forms.update(done.forms or {})
    old = {tensors[n] for n in removed}
    for sibling, own in _siblings(model, name):  # full module names: another block's, this block's
        theirs = {n: tensors[n] in old for n in tensors if n.rpartition(".")[0] == sibling}  # shared, or its own (a bias, say)
        removed += [n for n, shared in theirs.items() if shared]
        for n in done.places:
            follows = n.rpartition(".")[0] == own or (own in (done.forms or {}) and n.startswith(own + "."))
            if follows and theirs.get(sibling + n[len(own) :], True):
                added[sibling + n[len(own) :]] = done.places[n]
        if own in (done.forms or {}):
            forms[sibling] = (done.forms or {})[own]
    return model.edited(tensors=tensors.replaced(removed, added, done.memory), forms=forms)


def _siblings(model: Blueprint, name: str) -> list[tuple[str, str]]:
    """Modules outside block `name` that hold the very tensors of one inside it: (outside, inside)."""
    inside = {place: n.rpartition(".")[0] for n, place in model.tensors.items() if n.startswith(name + ".")}
    pairs = {
        (n.rpartition(".")[0], inside[place]) for n, place in model.tensors.items() if place in inside and not n.startswith(name + ".")
    }
    return sorted(pairs)


def _state(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[str, Tensor]:
    out = {f"parameter:{i}": p.detach().cpu() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        out |= {f"state:{i}:{key}": torch.as_tensor(v).detach().cpu() for key, v in optimizer.state[p].items()}
    return out


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, parameters: list[Tensor], facts: Facts) -> None:
    for i, p in enumerate(parameters):
        p.copy_(facts[f"parameter:{i}"])
        prefix = f"state:{i}:"
        for key, value in facts.items():
            if key.startswith(prefix):
                optimizer.state[p][key[len(prefix) :]] = value.to(p.device) if value.dim() else value.clone()
