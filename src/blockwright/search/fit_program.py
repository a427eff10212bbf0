"""The program of `fit`: what is built of what, what each choice takes and adds, and the best choice within a number of bytes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks import layers, treatments
from blockwright.blocks.assign import Alternative, Item, assign
from blockwright.blocks.embedding import GROUP
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block
from blockwright.blocks.subblocks import Option, variant
from blockwright.blocks.treatments import Treatment
from blockwright.errors import BlockwrightError
from blockwright.search.fit_scores import Wanted, library_of, role_of

NAME_BYTES = 120  # what a tensor takes in the header of a file, at most, beside its name
WITHIN = (0.25, 4.0)  # by how much a block's scores may be corrected in one round


class Choice(NamedTuple):
    """What was chosen. blocks : for each, the options of its subblocks other than the parents', and linear -> treatment.

    embedding : its bits, 0: dense. predicted : what that adds to the loss, in nats a token. bytes : of the files, at most.
    gap : how much less the best choice might add.
    """

    picks: tuple[Any, ...]
    blocks: list[tuple[list[str], dict[str, Treatment]]]
    embedding: int
    predicted: float
    bytes: int
    gap: float


class Way(NamedTuple):
    """One way to build a slot. option : of its subblock, "" for the parent's. linears : name -> outputs, inputs. other : more numbers."""

    option: str
    score: float
    linears: dict[str, tuple[int, int]]
    other: int


class Problem:
    """The slots of a model with what each way and treatment adds and takes; `correct` changes what they add."""

    def __init__(self, run: Run, wanted: Wanted, measured: Mapping[str, Any]) -> None:
        self.measured, self.itemsize = measured, run.dtype.itemsize
        self.skeleton = run.model.skeleton()
        self.path = layers.chain_path(self.skeleton)
        self.parts, _ = library_of(run.model, wanted)
        self.scale = [1.0] * len(measured["blocks"])  # of each block's scores, by what was measured of an earlier choice
        linears = layers.block_linears(self.skeleton)
        self.offered = {name: wanted.of_linear(name, linears[name]) for block in measured["blocks"] for name in block["estimates"]}
        self.slots: list[tuple[int, list[Way]]] = [(i, ways) for i, block in enumerate(measured["blocks"]) for ways in self._ways(i, block)]
        facts = {place: run.model.tensors.facts(name) for name, place in run.model.tensors.items()}
        self.whole = sum(math.prod(f.shape) * (self.itemsize if f.dtype.is_floating_point else f.dtype.itemsize) for f in facts.values())
        v, d = self.skeleton.get_input_embeddings().weight.shape
        packed = {int(b): treatments.nbytes(Treatment("quantise", int(b), GROUP), v, d, 2) for b in measured["embedding"]}
        self.embedding_bytes = {0: v * d * self.itemsize} | packed
        parents = [ways[0] for _, ways in self.slots]
        counted = sum(way.other + sum(map(math.prod, way.linears.values())) for way in parents) * self.itemsize
        self.outside = self.whole - counted - self.embedding_bytes[0]  # bytes that no choice changes
        self.header = 64 + sum(len(n) + NAME_BYTES for n in run.model.tensors) + sum(3 * (len(n) + NAME_BYTES) for n in linears)
        smallest = sum(min(_least(a) for a in alternatives) for alternatives in self._slots())
        self.smallest = self.outside + self.header + smallest  # bytes of the files of the smallest choice, at most

    def _ways(self, index: int, block: Mapping[str, Any]) -> list[list[Way]]:
        if not self.parts:
            return [[Way("", 0.0, {name: layers.size(self.skeleton.get_submodule(name)) for name in block["estimates"]}, 0)]]
        slots: list[list[Way]] = []
        for part in ("attention", "ffn"):
            slots.append([])
            for option, about in block["alternatives"].items():
                if option.startswith(part) and about["score"] is not None:
                    linears = {name: tuple(size) for name, size in about["linears"].items()}
                    slots[-1].append(Way("" if option.endswith("parent") else option, about["score"], linears, about["other"]))
        return slots

    def treatments(self, name: str, size: tuple[int, int]) -> list[Treatment]:
        """Those offered to a linear that fit one of this size."""
        own = size == layers.size(self.skeleton.get_submodule(name))
        return [t for t in self.offered[name] if own or (t.kind != "low_rank" and (not t.group_size or size[1] % t.group_size == 0))]

    def items(self, index: int, name: str, size: tuple[int, int]) -> tuple[Item, ...]:
        """What each of these adds and takes. A linear smaller than the model's adds its share."""
        estimates, role = self.measured["blocks"][index]["estimates"][name], role_of(name)
        n, k = layers.size(self.skeleton.get_submodule(name))
        share = self.scale[index] * size[0] * size[1] / (n * k)
        factors = self.measured["factors"]
        return tuple(
            Item(share * factors.get(f"{role} {t.kind}", 1.0) * estimates[str(t)], (treatments.nbytes(t, *size, self.itemsize),))
            for t in self.treatments(name, size)
        )

    def _slots(self) -> list[list[Alternative]]:
        """The subblocks and the embedding as the program takes them."""
        slots = [
            [
                Alternative(
                    self.scale[index] * way.score,
                    (way.other * self.itemsize,),
                    tuple(self.items(index, name, size) for name, size in way.linears.items()),
                )
                for way in ways
            ]
            for index, ways in self.slots
        ]
        scores = self.measured["embedding"]
        return [*slots, [Alternative(scores.get(str(bits), 0.0), (size,)) for bits, size in self.embedding_bytes.items()]]

    def refuse(self, target: int, *, least: bool = True) -> None:
        """Raise BlockwrightError for a size above the dense model's and, with `least`, below that of the smallest choice."""
        if target > self.whole + self.header or (least and target < self.smallest):
            raise BlockwrightError(
                f"fit: {target / 1e6:.2f} MB: the smallest choice takes {self.smallest / 1e6:.2f} MB, "
                f"the dense model {self.whole / 1e6:.2f} MB",
                allowed="a size between the two",
                do="Raise the size, or allow more" if target < self.smallest else "Leave the model as it is, or lower the size",
            )

    def solve(self, target: int, gap: float) -> Choice:
        """The best choice whose files have at most `target` bytes. Raises BlockwrightError where there is none, or nothing to do."""
        self.refuse(target)
        slots, fixed = self._slots(), self.outside + self.header
        found = assign(slots, [target - fixed], gap=gap)
        blocks: list[tuple[list[str], dict[str, Treatment]]] = [([], {}) for _ in self.measured["blocks"]]
        for (index, ways), (a, picked) in zip(self.slots, found.picks, strict=False):
            options, named = blocks[index]
            options += [ways[a].option] if ways[a].option else []
            named |= {name: self.treatments(name, size)[i] for (name, size), i in zip(ways[a].linears.items(), picked, strict=True)}
        bits = list(self.embedding_bytes)[found.picks[-1][0]]
        return Choice(found.picks, blocks, bits, found.cost, fixed + found.amounts[0], found.gap)

    def correct(self, choice: Choice, measured: Sequence[float]) -> None:
        """Scale each block's scores by what its choice was measured to add over what was predicted."""
        for i, value in enumerate(measured):
            predicted = self.predicted(i, choice)
            if predicted > 0 and value > 0:
                self.scale[i] *= min(max(value / predicted, WITHIN[0]), WITHIN[1])

    def predicted(self, index: int, choice: Choice) -> float:
        """What the chosen treatments of one block add by its scores."""
        total = 0.0
        for (i, ways), (a, items) in zip(self.slots, choice.picks, strict=False):
            if i == index:
                total += self.scale[i] * ways[a].score
                total += sum(self.items(i, name, size)[j].cost for (name, size), j in zip(ways[a].linears.items(), items, strict=True))
        return total

    def value(self, choice: Choice) -> float:
        """What all of a choice adds by the scores as they stand."""
        blocks = math.fsum(self.predicted(i, choice) for i in range(len(choice.blocks)))
        return blocks + float(self.measured["embedding"].get(str(choice.embedding), 0.0))

    def offers(self, index: int, name: str, size: tuple[int, int]) -> list[tuple[str, float, int]]:
        """Each treatment of a linear of this size by name, with what it adds and takes."""
        pairs = zip(self.treatments(name, size), self.items(index, name, size), strict=True)
        return [(str(t), item.cost, item.amounts[0]) for t, item in pairs]

    def uniform(self) -> list[tuple[str, float, int]]:
        """For each treatment that all linears can have: its name, what it adds to the loss everywhere, the bytes of the files at most."""
        slots = [(i, ways[0]) for i, ways in self.slots]
        linears = [(i, name, size) for i, way in slots for name, size in way.linears.items()]
        offers = [{label: (cost, amount) for label, cost, amount in self.offers(*linear)} for linear in linears]
        rest = self.outside + self.header + self.embedding_bytes[0] + sum(way.other for _, way in slots) * self.itemsize
        shared = [label for label in offers[0] if all(label in offer for offer in offers)]
        return [(t, math.fsum(o[t][0] for o in offers), rest + sum(o[t][1] for o in offers)) for t in shared]

    def squares(self, index: int, name: str) -> Tensor:
        return torch.tensor(self.measured["blocks"][index]["x2"][name])

    def modules(self, block: Block, options: Sequence[str]) -> dict[str, nn.Module]:
        """The other shapes of a block's subblocks, made from its weights."""
        made: dict[str, nn.Module] = {}
        for text in options:
            part, kind, size = re.fullmatch(r"(\w+): (\w+) ?(\d*)", text).groups()  # type: ignore[union-attr]
            mean = torch.tensor(self.measured["blocks"][block.index]["mean_abs"])
            made |= variant(block.module, self.parts[block.index], Option(part, kind, int(size or 0)), mean)
        return made


def _least(a: Alternative) -> int:
    return a.amounts[0] + sum(min(item.amounts[0] for item in part) for part in a.parts)
