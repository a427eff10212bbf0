"""The methods, found by being in a room: every file with a CARD is one. Read with `ast`, so nothing here imports torch.

Other packages add methods by the entry-point group `blockwright.methods`; an entry point's value is the dotted name of the method's module.
"""

import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from blockwright import options as option_types
from blockwright.errors import BlockwrightError

ROOMS = (
    "attention", "models", "train", "adapt", "compress", "search", "merge", "parallel", "serve", "data", "graph", "scene",
)  # fmt: skip
CARD_KEYS = {"slug", "room", "kind", "title", "arxiv", "summary", "saves", "needs", "writes", "claim"}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Option:
    """One option of a method: its type as written, its default (None with required=True when it has none), its help line."""

    name: str
    annotation: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class Method:
    """A method as its file describes it."""

    slug: str
    module: str  # dotted
    path: Path
    card: dict[str, Any]
    docstring: str
    function: str  # the public function's docstring
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        """The slug with underscores: module, claim, test and public function."""
        return self.slug.replace("-", "_")

    def load(self) -> Any:
        """The public function or class. Imports the method, and so torch."""
        module = importlib.import_module(self.module)
        return getattr(module, self.card.get("public", self.name))


@cache
def methods() -> dict[str, Method]:
    """All built methods by slug, in the order of rooms, then of slugs."""
    found = {}
    for room in ROOMS:
        for path in sorted((HERE / room).glob("*.py")):
            method = _read(path, f"blockwright.{room}.{path.stem}")
            if method is not None:
                found[method.slug] = method
    for point in sorted(importlib.metadata.entry_points(group="blockwright.methods"), key=lambda p: p.name):
        path = _find(point.value)
        method = None if path is None else _read(path, point.value)
        if method is not None:
            found.setdefault(method.slug, method)
    return found


def method(slug: str) -> Method:
    """The method of a slug (underscores are fine too). Raises BlockwrightError with the nearest known slug."""
    known = methods()
    wanted = slug.replace("_", "-")
    if wanted in known:
        return known[wanted]
    if wanted in roadmap():
        raise BlockwrightError(f"method {slug!r}: on the roadmap, not built yet", do="See `blockwright list --all` for what is built")
    raise BlockwrightError(f"method {slug!r}: unknown", do=nearest(wanted, known) or "See `blockwright list`")


@cache
def roadmap() -> dict[str, dict[str, str]]:
    """All planned methods by slug: room, title, arxiv."""
    return dict(json.loads((HERE / "roadmap.json").read_text()))


def option_namespace() -> dict[str, Any]:
    """What an option's annotation may be built from."""
    allowed = {name: getattr(option_types, name) for name in vars(option_types) if not name.startswith("_")}
    return allowed | {"Literal": typing.Literal, "Any": Any, "Annotated": typing.Annotated}


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """'Did you mean ...?', or None when nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else None


def results(slug: str) -> dict[str, dict[str, Any]]:
    """The newest result of a method by device, from the results folder of this checkout or of the installed package."""
    found = {}
    for folder in results_folders():
        for path in sorted(folder.glob(f"*/{slug}.json")):
            found.setdefault(path.parent.name, json.loads(path.read_text()))
    return found


def results_folders() -> list[Path]:
    """Where results lie: beside the sources of a checkout, or inside the installed package."""
    return [p for p in (HERE.parents[1] / "results", HERE / "results") if p.is_dir()]


def _find(module: str) -> Path | None:
    """The file of a module, located without importing it (its parent packages are)."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _read(path: Path, module: str) -> Method | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    card = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and _names(n) == ["CARD"]), None)
    if card is None:
        return None
    name = card.get("public", card["slug"].replace("-", "_"))
    public = next((n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name), None)
    if public is None or not CARD_KEYS <= card.keys():
        raise BlockwrightError(
            f"{path}: CARD lacks {sorted(CARD_KEYS - card.keys())}" if public else f"{path}: no public function or class {name}",
            do="See CONTRIBUTING.md on adding a method",
        )
    docstring = ast.get_docstring(public) or ""
    signature = public if isinstance(public, ast.FunctionDef) else _init(public)
    return Method(
        card["slug"], module, path, card, ast.get_docstring(tree) or "", docstring, _options(signature, docstring) if signature else ()
    )


def _names(node: ast.Assign) -> list[str]:
    return [t.id for t in node.targets if isinstance(t, ast.Name)]


def _init(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _options(function: ast.FunctionDef, docstring: str) -> tuple[Option, ...]:
    found = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        value = None if default is None else ast.literal_eval(default)
        annotation = ast.unparse(argument.annotation) if argument.annotation else "Any"
        found.append(Option(argument.arg, annotation, value, default is None, _help(argument.arg, docstring)))
    return tuple(found)


def _help(name: str, docstring: str) -> str:
    """The text behind `name :` in a docstring, continued by deeper lines."""
    lines = docstring.splitlines()
    for i, line in enumerate(lines):
        head, colon, text = line.partition(" : ")
        if colon and name in [n.strip() for n in head.split(",")]:
            indent = len(line) - len(line.lstrip())
            for more in lines[i + 1 :]:
                if not more.strip() or len(more) - len(more.lstrip()) <= indent:
                    break
                text += " " + more.strip()
            return text.strip()
    return ""
