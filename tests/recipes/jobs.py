"""Small jobs and what is asked of them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAMPLES = ("crawl", "damage", "fold", "grid", "nudge")  # sample_stages/<name>.py is the stage sample-<name>


def recipe(*stages: Any, **changes: Any) -> dict[str, Any]:
    """A job on the small model: seconds of nothing but the work itself."""
    return {
        "model": "model",
        "stages": list(stages),
        "out": "cheaper",
        "calibration": {"text": "learn.txt", "num": 4, "length": 32},
        "evaluation": {"text": "judge.txt", "num": 3, "length": 24},
        "measure": {"use": False},
        "dtype": "fp32",
    } | changes


def written(recipe: dict[str, Any], name: str = "recipe.yaml") -> str:
    """The recipe as a file (JSON is YAML); returns its name."""
    Path(name).write_text(json.dumps(recipe))
    return name


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, with the digest of the files: what must not change."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def weights(folder: Path) -> dict[str, str]:
    """Digest of every file of weights, and of the files that say how to read them."""
    return {
        name: digest
        for name, digest in tree(folder).items()
        if name.endswith((".safetensors", "index.json", "config.json", "blockwright.json"))
    }


def in_fork(work: Callable[[], Any]) -> int:
    """Do `work` in a fork of this process, which has everything imported. Returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(operation: int, work: Callable[[], Any]) -> int:
    """`in_fork(work)`, killed at the n-th file operation. Returns 0 where the work ended before that."""

    def with_a_killer() -> None:
        left = [operation]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "shutil.copyfile"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return in_fork(with_a_killer)


def python(code: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """What a fresh interpreter prints that runs this code."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
