"""`blockwright new ROOM METHOD`: the three files of a new method, from the templates beside this file."""

import re
from pathlib import Path

from blockwright import registry
from blockwright.errors import BlockwrightError

TEMPLATES = Path(__file__).parent / "templates"
KIND = {  # what a method of a room usually is; edit the card where yours is something else
    "attention": "layer", "models": "model", "train": "optimizer", "adapt": "adapter", "compress": "stage", "search": "search",
    "merge": "merge", "parallel": "planner", "serve": "server", "data": "data", "graph": "data", "scene": "model",
}  # fmt: skip


def create(room: str, slug: str, inside: Path) -> list[Path]:
    """Write a method, its claim and its test into the checkout around `inside`. Returns the new files; existing ones are never touched.

    Raises BlockwrightError for an unknown room, a slug that cannot be a module name, a file that exists, and outside a checkout.
    """
    if room not in registry.ROOMS:
        raise BlockwrightError(f"room {room!r}: unknown", allowed=", ".join(registry.ROOMS), do=registry.nearest(room, registry.ROOMS))
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise BlockwrightError(f"method {slug!r}", allowed="small letters, digits and hyphens, starting with a letter", do="Try my-method")
    root = _checkout(inside)
    planned = registry.roadmap().get(slug, {})
    if planned and planned["room"] != room:
        raise BlockwrightError(f"{slug}: is planned for the room {planned['room']}", do=f"Use: blockwright new {planned['room']} {slug}")
    name = slug.replace("-", "_")
    words = {
        "slug": slug,
        "name": name,
        "room": room,
        "kind": KIND[room],
        "title": planned.get("title") or slug.replace("-", " ").capitalize(),
        "arxiv": planned.get("arxiv") or "0000.00000",
    }
    kind = "stage" if KIND[room] == "stage" else "other"
    package = root / "src" / "blockwright"
    files = {
        package / room / f"{name}.py": f"{kind}_method.txt",
        package / "claims" / f"{name}.py": f"{kind}_claim.txt",
        root / "tests" / room / f"test_{name}.py": f"{kind}_test.txt",
    }
    for path in files:
        if path.exists():
            raise BlockwrightError(f"{path}: exists", do="Choose another slug, or edit that file")
    opener = package / room / "__init__.py"
    if not opener.exists():
        files = {opener: "room.txt", **files}
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        path.write_text(_sorted_imports(re.sub(r"<<(\w+)>>", lambda m: words[m.group(1)], text)), encoding="utf-8")
    return list(files)


def _sorted_imports(text: str) -> str:
    """The text with its `from blockwright... import a, b` lines in the order that the linter wants, whatever the new names are."""

    def members(line: str) -> str:
        module, _, names = line.partition(" import ")
        return f"{module} import {', '.join(sorted(names.split(', '), key=lambda name: (name[0].islower(), name)))}"

    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith("from blockwright.")]
    for place, line in zip(places, sorted(members(lines[i]) for i in places), strict=True):
        lines[place] = line
    return "\n".join(lines)


def _checkout(inside: Path) -> Path:
    for folder in (inside.absolute(), *inside.absolute().parents):
        if (folder / "pyproject.toml").is_file() and (folder / "src" / "blockwright" / "claims").is_dir():
            return folder
    raise BlockwrightError(f"{inside}: not in a checkout of blockwright", do="Clone the repository and run this inside it")
