"""The tensors of a model by name, read one at a time from where they lie: safetensors files of a folder, or memory.

A `Tensors` maps a name to a `Place`. Two names at one place are one tensor (a tied head, a shared block). Changing a model
never changes its files: a changed tensor gets a new place, and the rest stays where it was.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blockwright.errors import BlockwrightError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies: a safetensors file and its name there, or memory (`file` is None)."""

    file: Path | None
    name: str


class Facts(NamedTuple):
    """What a header says of a tensor, without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Tensors(Mapping[str, Place]):
    """Name -> place, and reading from there. Immutable: `with_` and `renamed` give a new one.

    Tensors read from a file are copied into fresh memory and the file is closed again, so nothing stays mapped.
    """

    def __init__(self, places: Mapping[str, Place], memory: Mapping[str, Tensor] | None = None) -> None:
        self.places = dict(places)
        self.memory = dict(memory or {})
        self._headers: dict[Path, dict[str, Facts]] = {}

    @classmethod
    def of_memory(cls, tensors: Mapping[str, Tensor]) -> "Tensors":
        """Tensors that are in memory already; names that share storage, dtype and shape share a place. Not copied."""
        first: dict[tuple[object, ...], str] = {}
        places = {}
        for name, t in tensors.items():
            key = (t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype, tuple(t.shape), t.stride())
            owner = first.setdefault(key, name) if t.numel() else name
            places[name] = Place(None, owner)
        return cls(places, {name: tensors[name].detach() for name in {p.name for p in places.values()}})

    @classmethod
    def of_folder(cls, folder: Path, stem: str = "model") -> "Tensors":
        """All tensors of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` names.

        Raises BlockwrightError for a missing, truncated or malformed file, an index that names a file outside the folder, and a
        tensor that the index promises and the file lacks.
        """
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.exists():
            weight_map = _weight_map(index)
            files = {name: folder / file for name, file in weight_map.items()}
        elif single.exists():
            files = dict.fromkeys(header(single), single)
        else:
            raise BlockwrightError(
                f"{folder}: no weights found",
                allowed=f"{single.name}, or {index.name} with its files",
                do="Name a model folder in safetensors format (save_pretrained writes one)",
            )
        tensors = cls({name: Place(file, name) for name, file in files.items()})
        for name, file in files.items():
            if name not in tensors._header(file):
                raise BlockwrightError(
                    f"{index}: promises tensor {name!r} in {file.name}, which does not hold it",
                    do="Copy the model folder again; one of its files is of another version",
                )
        return tensors

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def facts(self, name: str) -> Facts:
        """dtype and shape of a tensor, from the header alone."""
        place = self.places[name]
        if place.file is None:
            t = self.memory[place.name]
            return Facts(t.dtype, tuple(t.shape))
        return self._header(place.file)[place.name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors in fresh memory; names at one place give the same tensor object."""
        wanted: dict[Path | None, list[str]] = {}
        for name in names:
            wanted.setdefault(self.places[name].file, []).append(name)
        read: dict[Place, Tensor] = {}
        for file, members in wanted.items():
            if file is None:
                for name in members:
                    place = self.places[name]
                    if place not in read:
                        read[place] = self.memory[place.name].clone()
            else:
                with _opened(file) as f:
                    for name in members:
                        place = self.places[name]
                        if place not in read:
                            read[place] = _tensor(f, file, place.name)
        return {name: read[self.places[name]] for members in wanted.values() for name in members}

    def replaced(self, removed: Iterable[str], added: Mapping[str, Place], memory: Mapping[str, Tensor]) -> "Tensors":
        """Without the names `removed`, with the places `added` (their tensors in `memory` where the place is there)."""
        gone = set(removed)
        places = {name: place for name, place in self.places.items() if name not in gone} | dict(added)
        kept = self.memory | dict(memory)
        used = {p.name for p in places.values() if p.file is None}
        new = Tensors(places, {name: t for name, t in kept.items() if name in used})
        new._headers = self._headers
        return new

    def renamed(self, new_names: Mapping[str, str]) -> "Tensors":
        """Only the tensors in `new_names`, under their new names (new -> old); one old name may be used twice (sharing)."""
        new = Tensors({new_name: self.places[old] for new_name, old in new_names.items()}, self.memory)
        new._headers = self._headers
        return new

    def nbytes(self) -> int:
        """Bytes of all tensors, each place counted once."""
        return sum(self.facts(name).nbytes for name in {place: name for name, place in self.places.items()}.values())

    def _header(self, file: Path) -> dict[str, Facts]:
        if file not in self._headers:
            self._headers[file] = header(file)
        return self._headers[file]


def header(file: Path) -> dict[str, Facts]:
    """dtype and shape of every tensor of a safetensors file. Raises BlockwrightError where the file is damaged."""
    with _opened(file) as f:
        facts = {}
        for name in f.keys():  # noqa: SIM118 (safe_open is no dict)
            part = f.get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in DTYPES:
                raise BlockwrightError(
                    f"{file}: tensor {name!r} has dtype {dtype}", allowed=", ".join(DTYPES), do="Convert the weights to bf16 first"
                )
            if max(shape, default=0) > torch.iinfo(torch.int64).max:  # valid where another dimension is 0, yet torch cannot hold it
                raise BlockwrightError(f"{file}: tensor {name!r} has shape {shape}", do="Do not use this file; its header is made up")
            facts[name] = Facts(DTYPES[dtype], shape)
        return facts


def metadata(file: Path) -> dict[str, str]:
    """The text metadata of a safetensors file."""
    with _opened(file) as f:
        return dict(f.metadata() or {})


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise BlockwrightError(f"{file}: file missing", do="Copy the model folder again, whole") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise BlockwrightError(
            f"{file}: not a whole safetensors file ({error})", do="Copy or download this file again; it is truncated or damaged"
        ) from None


def _tensor(f: safe_open, file: Path, name: str) -> Tensor:
    """One tensor in fresh memory."""
    try:
        return f.get_tensor(name).clone()
    except SafetensorError as error:
        raise BlockwrightError(
            f"{file}: tensor {name!r} cannot be read ({error})", do="Run again; this file was changed since it was opened"
        ) from None


def _weight_map(index: Path) -> dict[str, str]:
    """tensor -> file of an index, every file a plain name inside the folder."""
    try:
        content = json.loads(index.read_text())
        weight_map = content["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BlockwrightError(
            f"{index}: not a safetensors index", allowed='{"weight_map": {tensor: file}}', do="Copy this file again"
        ) from None
    for name, file in pairs:
        if Path(file).name != file or file in {"", ".", ".."} or "\\" in file or "\0" in file:
            raise BlockwrightError(
                f"{index}: tensor {name!r} lies in {file!r}, outside the model folder",
                allowed="plain file names inside the folder",
                do="Do not use this folder unless you know who wrote it",
            )
    return dict(pairs)
