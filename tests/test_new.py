"""`blockwright new`: what it writes keeps the house's own rules and runs as it is, in a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockwright import new, registry
from blockwright.errors import BlockwrightError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """As much of a checkout as `new` and the house's rules need."""
    for name in ("pyproject.toml", "src", "tests/test_house.py"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path


LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def runs(checkout, *command, by="-m"):
    env = os.environ | {"PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, by, *command], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("room, slug", [("compress", "my-own-method"), ("attention", "my2")])
def test_three_files_that_keep_the_rules_and_run(checkout, room, slug):
    name = slug.replace("-", "_")
    runs(checkout, "blockwright.cli", "new", room, slug)
    files = [checkout / "src/blockwright" / room / f"{name}.py", checkout / "src/blockwright/claims" / f"{name}.py"]
    files.append(checkout / "tests" / room / f"test_{name}.py")
    assert all(f.is_file() and "<<" not in f.read_text() for f in files)
    passed = runs(checkout, "pytest", "-p", "no:cacheprovider", "-k", f"{name} or {slug}", "tests/test_house.py", str(files[2]))
    assert int(re.search(r"(\d+) passed", passed)[1]) >= 8
    runs(checkout, "ruff", "check", *map(str, files))
    runs(checkout, "ruff", "format", "--check", *map(str, files))
    assert "0 broken" in runs(checkout, LINT_IMPORTS, "--no-cache", by="-c")
    [row] = [r for r in json.loads(runs(checkout, "blockwright.cli", "list", "--json")) if r["slug"] == slug]
    assert row["room"] == room and row["kind"] == new.KIND[room]
    assert "met" in runs(checkout, "blockwright.cli", "reproduce", slug)
    assert {p.name for p in (checkout / "results" / "cpu").iterdir()} == {f"{slug}.json", f"{slug}.svg"}


def test_what_exists_is_never_touched(checkout):
    new.create("data", "a-b", checkout / "src")
    before = {p: p.read_bytes() for p in checkout.rglob("*a_b.py")}
    assert len(before) == 3
    for path in before:  # any one of the three is enough
        for other in before.keys() - {path}:
            other.unlink(missing_ok=True)
        with pytest.raises(BlockwrightError, match=re.escape(f"{path}: exists")):
            new.create("data", "a-b", checkout)
        assert list(checkout.rglob("*a_b.py")) == [path] and path.read_bytes() == before[path]
        for other in before:
            other.write_bytes(before[other])


def test_a_planned_method_gets_its_title_and_its_room(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "src/blockwright/claims").mkdir(parents=True)
    slug, planned = next((s, p) for s, p in registry.roadmap().items() if s not in registry.methods() and p["arxiv"])
    with pytest.raises(BlockwrightError, match=f"is planned for the room {planned['room']}. Use: blockwright new {planned['room']} {slug}"):
        new.create(next(r for r in registry.ROOMS if r != planned["room"]), slug, tmp_path)
    written = new.create(planned["room"], slug, tmp_path)
    assert planned["title"] in written[1].read_text() and planned["arxiv"] in written[1].read_text()


@pytest.mark.parametrize("slug", ["My-Method", "my_method", "2fast", "a--b", "-a", "a-", "a/b", "../a", ""])
def test_a_slug_that_is_no_module_name_is_refused(tmp_path, slug):
    with pytest.raises(BlockwrightError, match="Allowed: small letters, digits and hyphens"):
        new.create("data", slug, tmp_path)
    assert not list(tmp_path.iterdir())


def test_outside_a_checkout_it_says_so(tmp_path):
    with pytest.raises(BlockwrightError, match="not in a checkout of blockwright"):
        new.create("data", "a-b", tmp_path)
    assert not list(tmp_path.iterdir())
