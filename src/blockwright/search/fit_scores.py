"""What `fit` offers each part of a model, and what each offer adds to the loss: estimated, corrected and measured, kept in a table."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks import folders, layers, treatments
from blockwright.blocks.embedding import pack_embedding
from blockwright.blocks.fisher import Fisher
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer, divergence
from blockwright.blocks.run import Facts, Run
from blockwright.blocks.stream import Block
from blockwright.blocks.subblocks import Library, Option, Subblocks, find_subblocks, like, mean_abs, variant
from blockwright.blocks.treatments import DENSE, Treatment
from blockwright.errors import BlockwrightError

ALLOWED = ("quantise", "low-rank", "prune", "drop")
SAMPLED = (3, 4, 5)  # bits of the linears that are measured too, to correct the estimates


class Wanted(NamedTuple):
    """The options that say what is offered. They are part of what a table of measurements belongs to."""

    allow: tuple[str, ...]
    keep: tuple[str, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    embedding: tuple[int, ...]
    ranks: tuple[float, ...]
    widths: tuple[float, ...]

    @classmethod
    def checked(cls, *values: Sequence[Any]) -> "Wanted":
        wanted = cls(*(tuple(v) for v in values))
        if not wanted.allow:
            raise BlockwrightError("fit: allow is empty", allowed=", ".join(ALLOWED), do="Leave it out, which allows quantise")
        for word in wanted.allow:
            if word not in ALLOWED:
                raise BlockwrightError(f"fit: allow={word!r}", allowed=", ".join(ALLOWED))
        if not all(2 <= b <= 8 for b in wanted.bits) or not all(g >= 1 for g in wanted.group_sizes):
            raise BlockwrightError(f"fit: bits={list(wanted.bits)}, group_sizes={list(wanted.group_sizes)}", allowed="2 to 8; 1 and more")
        if not all(0 < share < 1 for share in (*wanted.ranks, *wanted.widths)):
            raise BlockwrightError(f"fit: ranks={list(wanted.ranks)}, widths={list(wanted.widths)}", allowed="shares between 0 and 1")
        return wanted

    @property
    def structural(self) -> bool:
        """Whether subblocks may change their shape."""
        return "prune" in self.allow or "drop" in self.allow

    def flat(self) -> "Wanted":
        """Without what changes the shape of subblocks."""
        return self._replace(allow=tuple(word for word in self.allow if word not in ("prune", "drop")))

    def keeps(self, name: str, module: nn.Module) -> bool:
        return layers.selected(name, module, self.keep, [])

    def of_linear(self, name: str, linear: nn.Module) -> list[Treatment]:
        """The treatments offered to a linear, dense first."""
        n, k = layers.size(linear)
        grids = [Treatment("quantise", b, g) for b in self.bits for g in self.group_sizes if k % g == 0] if "quantise" in self.allow else []
        shares = self.ranks if "low-rank" in self.allow else ()
        counts = list(dict.fromkeys(max(1, round(share * min(n, k) / 64)) * 64 for share in shares))
        low = [Treatment("low_rank", b, 64 if b else 0, r) for r in counts if r < min(n, k) for b in (0, 8) if not b or k % 64 == 0]
        return [DENSE] if self.keeps(name, linear) else [DENSE, *grids, *low]

    def of_block(self, block: Block) -> dict[str, list[Treatment]]:
        return {name: self.of_linear(name, linear) for name, linear in block.linears().items()}


def measure(run: Run, wanted: Wanted, samples: int, windows: int) -> dict[str, Any]:
    """What every choice adds to the loss, in nats a token, as JSON: blocks, factors, embedding, sampled."""
    if run.calibration is None:
        raise BlockwrightError("fit: needs calibration text", do="Give `calibration:` in the recipe, or calibration=token_ids")
    tokens = run.calibration.numel() if run.mask is None else int(run.mask.sum())
    facts = run.backward(lambda block: Fisher(block, wanted.of_block(block), tokens))
    parts, library = library_of(run.model, wanted)
    chosen = _sampled(run, facts, samples)
    scorers: list[Scorer] = []

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None
        if not scorers:  # not before a block asks for it: a resumed run may have nothing left to measure
            scorers.append(Scorer(run, windows))
        trials: list[tuple[dict[str, nn.Module], dict[str, Treatment]]] = [({}, {name: t}) for name, t in chosen.get(block.index, [])]
        found: Facts = {"alternatives": {}}
        if library is not None:
            mean = mean_abs(block, parts[block.index], x, run.mask)
            found["mean_abs"] = mean.tolist()
            for option in _options(library, block.index):
                modules = variant(block.module, parts[block.index], option, mean)
                found["alternatives"][str(option)] = _described(block, modules)
                if option.kind != "parent":
                    trials.append((modules, {}))
        squares = {name: facts[block.index][f"x2:{name}"] for name in facts[block.index]["estimates"]}
        values = scorers[0].of_variants(block.index, x, [trial_of(block, modules, named, squares) for modules, named in trials])
        sampled = chosen.get(block.index, [])
        found["sampled"] = [[name, str(t), v] for (name, t), v in zip(sampled, values, strict=False)]
        others = [about for option, about in found["alternatives"].items() if not option.endswith(": parent")]
        for about, value in zip(others, values[len(sampled) :], strict=True):
            about["score"] = value if math.isfinite(value) else None
        return found

    more = run.blocks(visit, inputs="dense") if chosen or library is not None else [{"alternatives": {}, "sampled": []} for _ in facts]
    blocks = []
    for first, second in zip(facts, more, strict=True):
        squares = {name: first[f"x2:{name}"].tolist() for name in first["estimates"]}
        blocks.append({"estimates": first["estimates"], "x2": squares, **second})
    ids = first_windows(run, windows)
    head = {
        str(b): divergence(run.model, pack_embedding(run.model, b), *ids, device=run.device)
        for b in (wanted.embedding if _embedding_is_free(run.model, wanted) else ())
    }
    return {"blocks": blocks, "embedding": head, "factors": _factors(blocks)}


def unmeasured(run: Run, wanted: Wanted) -> dict[str, Any]:
    """The form of what `measure` gives, where all linears keep their shapes, with nothing measured: enough to know sizes."""
    skeleton = run.model.skeleton()
    blocks: list[dict[str, Any]] = [{"estimates": {}} for _ in range(layers.num_blocks(run.model.config))]
    path = layers.chain_path(skeleton) + "."
    for name, linear in layers.block_linears(skeleton).items():
        if not layers.fixed(linear):
            index = int(name.removeprefix(path).partition(".")[0])
            blocks[index]["estimates"][name] = {str(t): 0.0 for t in wanted.of_linear(name, linear)}
    offered = wanted.embedding if _embedding_is_free(run.model, wanted) else ()
    return {"blocks": blocks, "embedding": {str(b): 0.0 for b in offered}, "factors": {}}


def library_of(model: Blueprint, wanted: Wanted) -> tuple[list[Subblocks], Library | None]:
    """The subblocks and their other shapes; none where only linears are treated."""
    if not wanted.structural:
        return [], None
    skeleton = model.skeleton()
    path = layers.chain_path(skeleton)
    parts = [find_subblocks(block, f"{path}.{i}", by="fit") for i, block in enumerate(skeleton.get_submodule(path))]  # type: ignore[arg-type]
    prune, drop = "prune" in wanted.allow, "drop" in wanted.allow
    return parts, Library(parts, by="fit", heads=None if prune else (), widths=wanted.widths if prune else (), linear=drop, no_op=drop)


def _options(library: Library, index: int) -> list[Option]:
    """All that the subblocks of a block may be, what they are among it."""
    return [option for slot in library.slots[2 * index : 2 * index + 2] for option in slot]


def _described(block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Which linears these modules are, by full name, and how many other numbers they hold."""
    linears = {f"{block.name}.{n}": list(layers.size(m)) for n, m in modules.items() if layers.is_linear(m)}
    inside = sum(p.numel() for n, m in modules.items() for q, p in m.named_parameters() if not (layers.is_linear(m) and q == "weight"))
    return {"linears": linears, "other": inside, "score": 0.0}


def _sampled(run: Run, facts: Sequence[Facts], samples: int) -> dict[int, list[tuple[str, Treatment]]]:
    """Block -> linears and treatments to be measured: `samples` of each kind of linear and of treatment, in blocks drawn at random."""
    rng = run.generator("sample")
    found: dict[int, list[tuple[str, Treatment]]] = {}
    kinds: dict[tuple[str, str], list[tuple[int, str, Treatment]]] = {}
    for index, fact in enumerate(facts):
        for name, estimates in fact["estimates"].items():
            for t in map(Treatment.named, estimates):
                if t.kind == "low_rank" or (t.kind == "quantise" and (t.bits in SAMPLED or not set(SAMPLED) & {*_bits(estimates)})):
                    kinds.setdefault((role_of(name), t.kind), []).append((index, name, t))
    for every in kinds.values():
        for i in torch.randperm(len(every), generator=rng, device=rng.device).tolist()[:samples]:
            index, name, t = every[i]
            found.setdefault(index, []).append((name, t))
    return found


def _bits(estimates: Mapping[str, float]) -> list[int]:
    return [Treatment.named(t).bits for t in estimates]


def _factors(blocks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What estimates of a kind of linear and of treatment are multiplied by: the geometric mean of measured over estimated."""
    logs: dict[str, list[float]] = {}
    for block in blocks:
        for name, t, value in block["sampled"]:
            estimate = block["estimates"][name][t]
            if value > 0 and estimate > 0:
                logs.setdefault(f"{role_of(name)} {Treatment.named(t).kind}", []).append(math.log(value / estimate))
    return {kind: math.exp(math.fsum(found) / len(found)) for kind, found in logs.items()}


def role_of(name: str) -> str:
    """The name of a linear without the number of its block: q_proj of every block is one kind."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def trial_of(
    block: Block, modules: Mapping[str, nn.Module], named: Mapping[str, Treatment], squares: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The modules, and the linears treated, by name below the block, as plain modules: what `Scorer` puts into the dense model."""
    made = dict(modules)
    for full, t in named.items():
        name = full.removeprefix(block.name + ".")
        linear = made.get(name, block.module.get_submodule(name))
        w = layers.matrix(linear).float()
        weight = treatments.treated(w, t, fitting(squares.get(full), w))
        made[name] = like(linear, weight, linear.bias)  # type: ignore[arg-type]
    return made


def fitting(squares: Tensor | None, w: Tensor) -> Tensor | None:
    """The mean squares of the inputs, where they are those of this matrix: a narrower one has fewer."""
    return squares.to(w.device) if squares is not None and len(squares) == w.shape[1] else None


def first_windows(run: Run, windows: int) -> tuple[Tensor, Tensor | None]:
    assert run.calibration is not None
    return run.calibration[:windows].long(), None if run.mask is None else run.mask[:windows]


def _embedding_is_free(model: Blueprint, wanted: Wanted) -> bool:
    table = model.skeleton().get_input_embeddings()
    kept = any(word in ("embedding", "lm_head") for word in wanted.keep)
    return "quantise" in wanted.allow and not kept and type(table) is nn.Embedding and table.embedding_dim % 64 == 0


def _belongs(run: Run, wanted: Wanted) -> dict[str, Any]:
    """What a table of measurements belongs to: the model's tensors, the text, and what was offered."""
    assert run.calibration is not None
    weights, text = hashlib.sha256(), hashlib.sha256()
    for name in run.model.tensors:
        weights.update(run.model.tensors.read([name])[name].contiguous().view(torch.uint8).numpy().tobytes())
    for t in (run.calibration, run.mask):
        text.update(repr(None if t is None else t.tolist()).encode())
    return {"format": 1, "model": weights.hexdigest(), "text": text.hexdigest(), "offers": json.loads(json.dumps(wanted._asdict()))}


def read_table(table: str | None, run: Run, wanted: Wanted) -> dict[str, Any] | None:
    if table is None or not Path(table).exists() or run.calibration is None:
        return None
    try:
        kept = json.loads(Path(table).read_text())
        theirs, measured = kept["belongs"], dict(kept["measured"])
    except (OSError, ValueError, LookupError, TypeError):
        raise BlockwrightError(f"fit: table {table}: damaged", do="Delete it, and all is measured again") from None
    mine = _belongs(run, wanted)
    differ = [key for key in mine if theirs.get(key) != mine[key]]
    if differ:
        raise BlockwrightError(
            f"fit: table {table}: of another {differ[0]}", allowed="the same model, text and offers", do="Name another file"
        )
    return measured


def keep_table(path: Path, run: Run, wanted: Wanted, measured: Mapping[str, Any]) -> None:
    """Write the measurements of this model, text and offers. Raises BlockwrightError where the file cannot be written."""
    text = json.dumps({"belongs": _belongs(run, wanted), "measured": measured})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.replace_file(path, lambda scratch: scratch.write_text(text))
    except OSError as error:
        raise folders.told(path, error) from error
