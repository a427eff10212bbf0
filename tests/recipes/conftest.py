"""A small job in a folder of its own, its stages, and the command line inside this process."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import HERE, SAMPLES

from blockwright import cli, registry


@pytest.fixture
def home(small_job: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds a small model and two texts: model, learn.txt, judge.txt."""
    small_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def sample_stages() -> Iterator[None]:
    """The stages of sample_stages/ are methods like any other."""
    samples = {f"sample-{name}": registry.read(HERE / "sample_stages" / f"{name}.py", f"sample_stages.{name}") for name in SAMPLES}
    known = registry.methods() | samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "methods", lambda: known)
        yield


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which other processes find sample_stages/ too: as an installed package looks."""
    site = tmp_path_factory.mktemp("site")
    (site / "sample_stages").symlink_to(HERE / "sample_stages")
    about = site / "sample_stages-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-stages\nVersion: 1\n")
    points = "".join(f"sample-{name} = sample_stages.{name}\n" for name in SAMPLES)
    (about / "entry_points.txt").write_text(f"[blockwright.methods]\n{points}")
    return {**os.environ, "CRAWL": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


@pytest.fixture
def blockwright(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command, run in this process as its child would: (exit code, stdout, stderr)."""
    monkeypatch.setenv(cli.CHILD, "this process")
    monkeypatch.setattr(cli, "_obey_parent", lambda: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockwright", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code), out, err

    return run
