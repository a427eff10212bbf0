"""The site builds strictly and offline, with a page for every method and every planned one on the roadmap."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockwright import registry

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install blockwright[docs]")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out), "-f", str(ROOT / "mkdocs.yml")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def words(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())


def test_every_method_has_a_page_with_its_options(site):
    for m in registry.methods().values():
        said = words(site / "methods" / f"{m.slug}.html")
        assert " ".join(m.card["title"].split()) in said and " ".join(m.docstring.split()[:6]) in said
        assert all(o.name in said for o in m.options)
        assert m.slug in words(site / "methods" / "index.html")
        for device, result in registry.results(m.slug).items():
            assert f"{result['measured']:.4g}" in said and device in said


def test_the_roadmap_names_every_planned_method_and_what_is_built(site):
    rows = re.findall(r"<tr>(.*?)</tr>", (site / "roadmap.html").read_text(), re.DOTALL)
    state = {}
    for row in rows:
        cells = [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)]
        if cells:
            state[cells[0]] = cells[-1]
    built = registry.methods()
    assert state == {slug: "built" if slug in built else "not built yet" for slug in registry.roadmap()} and len(state) == 71


def test_nothing_is_fetched_when_a_page_opens(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loads += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect)[^>]*href=[\"']?([^\"'\s>]+)", text)
        assert not [link for link in loads if link.startswith(("http:", "https:", "//"))], page


def test_recipes_lists_the_keys_and_the_examples(site):
    said = words(site / "recipes.html")
    assert "calibration" in said and "source_text" not in said
    for path in (ROOT / "examples").glob("*.yaml"):
        assert f"examples/{path.name}" in said
