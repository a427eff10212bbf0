"""Works in C with the interpreter's lock held, so that no Python signal handler runs; and leaves a process of its own.

With seed 1 it can be interrupted, and then tidies up.
"""

import itertools
import os
import subprocess
import time
from pathlib import Path


def claim(*, seed: int = 0, device: str = "cpu") -> None:
    other = subprocess.Popen(["sleep", "60"])
    print("pids", os.getpid(), other.pid, flush=True)
    if seed == 0:
        sum(itertools.repeat(0))
    try:
        time.sleep(60)
    finally:
        Path("tidied").touch()
