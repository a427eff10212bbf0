"""The methods, found by being in a room: every file with a CARD is one. Read with `ast`, so nothing here imports torch.

Other packages add methods by the entry-point group `blockwright.methods`; an entry point's value is the dotted name of the method's module.
The claim of such a method lies beside it, as `<module>_claim`.
"""

import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from blockwright import options as option_types
from blockwright.errors import BlockwrightError

ROOMS = (
    "attention", "models", "train", "adapt", "compress", "search", "merge", "parallel", "serve", "data", "graph", "scene",
)  # fmt: skip
KINDS = ("stage", "adapter", "layer", "optimizer", "model", "planner", "search", "merge", "data", "server")
CARD_KEYS = {"slug", "room", "kind", "title", "arxiv", "summary", "saves", "needs", "writes", "claim"}
STAGE_KEYS = {"accepts", "leaves"}  # dense | packed | ...: what form of weights it works on, and what form it leaves
HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1] if (HERE.parents[1] / "pyproject.toml").is_file() and HERE.parent.name == "src" else None


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

    @property
    def claim_module(self) -> str:
        """The dotted name of the module that holds the claim: in claims/, or beside the method of another package."""
        return f"blockwright.claims.{self.name}" if self.module.startswith("blockwright.") else f"{self.module}_claim"

    @property
    def claim_path(self) -> Path | None:
        """The file of the claim, if there is one."""
        path = HERE / "claims" / f"{self.name}.py" if self.module.startswith("blockwright.") else _find(self.claim_module)
        return path if path is not None and path.is_file() else None

    def load(self) -> Any:
        """The public function or class. Imports the method, and so torch."""
        module = importlib.import_module(self.module)
        return getattr(module, self.card.get("public", self.name))


@cache
def methods() -> dict[str, Method]:
    """All built methods by slug, in the order of rooms, then of slugs. A broken one of another package is told on stderr and left out."""
    found: dict[str, Method] = {}
    for room in ROOMS:
        for path in sorted((HERE / room).glob("*.py")):
            method = read(path, f"blockwright.{room}.{path.stem}")
            if method is not None:
                found[method.slug] = method
    for point in sorted(importlib.metadata.entry_points(group="blockwright.methods"), key=lambda p: p.name):
        try:
            foreign = _foreign(point.value)
        except BlockwrightError as error:
            print(f"blockwright: {point.name} is left out: {error}", file=sys.stderr)
            continue
        if foreign.slug in found:
            print(f"blockwright: {point.name} is left out: {foreign.slug} is {found[foreign.slug].module} already", file=sys.stderr)
        else:
            found[foreign.slug] = foreign
    return found


def other_claims() -> list[str]:
    """Claims that belong to no single method, by slug: files of claims/ with a function `claim`."""
    mine = {m.claim_module for m in methods().values()}
    stems = [p.stem for p in sorted((HERE / "claims").glob("*.py")) if f"blockwright.claims.{p.stem}" not in mine]
    return [stem.replace("_", "-") for stem in stems if stem not in ("__init__", "runner", "small_model")]


def method(slug: str) -> Method:
    """The method of a slug (underscores are fine too). Raises BlockwrightError with the nearest known slug."""
    known = methods()
    wanted = slug.replace("_", "-")
    if wanted in known:
        return known[wanted]
    if wanted in roadmap():
        raise BlockwrightError(f"method {slug!r}: on the roadmap, not built yet", do="See `blockwright list` for what is built")
    raise BlockwrightError(f"method {slug!r}: unknown", do=nearest(wanted, known) or "See `blockwright list`")


@cache
def roadmap() -> dict[str, dict[str, str]]:
    """All planned methods by slug: room, title, arxiv."""
    return dict(json.loads((HERE / "roadmap.json").read_text()))


def option_namespace() -> dict[str, Any]:
    """What an option's annotation may be built from."""
    allowed = {name: getattr(option_types, name) for name in vars(option_types) if not name.startswith("_")}
    return allowed | {"Literal": typing.Literal, "Any": Any, "Annotated": typing.Annotated}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """'Did you mean ...?', or None when nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else None


def results(slug: str) -> dict[str, dict[str, Any]]:
    """The newest result of a method by device, from the results folder of this checkout or of the installed package."""
    found = {}
    for path in sorted(results_folder().glob(f"*/{slug}.json")):
        try:
            found[path.parent.name] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            print(f"blockwright: {path} is damaged and left out; `blockwright reproduce {slug}` writes it again", file=sys.stderr)
    return found


def results_folder() -> Path:
    """Where results are read: beside the sources of a checkout, or inside the installed package."""
    return CHECKOUT / "results" if CHECKOUT else HERE / "results"


def _foreign(module: str) -> Method:
    """The method of another package. Raises BlockwrightError where its module holds none."""
    path = _find(module)
    if path is None:
        raise BlockwrightError(f"module {module}: not found", do="Install its package again")
    method = read(path, module)
    if method is None:
        raise BlockwrightError(f"{path}: has no CARD", do="See CONTRIBUTING.md on adding a method")
    return method


def _find(module: str) -> Path | None:
    """The file of a module, located without importing anything."""
    name, *rest = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in rest:
        name = f"{name}.{part}"
        inside = None if spec is None else spec.submodule_search_locations
        spec = None if inside is None else PathFinder.find_spec(name, list(inside))
    return None if spec is None or spec.origin is None else Path(spec.origin)


def read(path: Path, module: str) -> Method | None:
    """The method that a file describes, or None for a file without a CARD. Raises BlockwrightError where the file breaks the house form."""

    def broken(what: str) -> BlockwrightError:
        return BlockwrightError(f"{path}: {what}", do="See CONTRIBUTING.md on adding a method")

    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        node = next((n for n in tree.body if isinstance(n, ast.Assign) and _names(n) == ["CARD"]), None)
        card = None if node is None else ast.literal_eval(node.value)
    except SyntaxError as error:
        raise broken(f"line {error.lineno}: {error.msg}") from None
    except ValueError:
        raise broken("CARD is not made of plain literals") from None
    if card is None:
        return None
    if not isinstance(card, dict) or not card.keys() >= CARD_KEYS:
        raise broken(f"CARD lacks {', '.join(sorted(CARD_KEYS - set(card)))}")
    if card["room"] not in ROOMS or card["kind"] not in KINDS:
        raise broken(f"CARD has room={card['room']!r}, kind={card['kind']!r}")
    if card["kind"] == "stage" and not card.keys() >= STAGE_KEYS:
        raise broken(f"CARD of a stage lacks {', '.join(sorted(STAGE_KEYS - set(card)))}")
    name = card["slug"].replace("-", "_")
    public = next((n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == card.get("public", name)), None)
    if public is None:
        raise broken(f"no public function or class {card.get('public', name)}")
    docstring = ast.get_docstring(public) or ""
    signature = public if isinstance(public, ast.FunctionDef) else _init(public)
    try:
        options = _options(signature, docstring) if signature else ()
    except ValueError:
        raise broken(f"a default of {public.name} is no plain literal") from None
    return Method(card["slug"], module, path, card, ast.get_docstring(tree) or "", docstring, options)


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
