"""The only way anything here is measured: time, memory, FLOPs, file bytes, and how well a language model predicts a text.

Importing this module does not import torch.
"""

import copy
import gc
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blockwright.errors import BlockwrightError

if TYPE_CHECKING:
    from torch import Tensor, nn


CHUNK = 128  # positions whose logits are compared at a time
COLD_BYTES = 320 * 2**20  # more than any GPU's cache holds


class Spread(NamedTuple):
    """A repeated measurement: median and quartiles, in the unit of what was measured."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some measurements. Raises BlockwrightError where there are none."""
    if not values:
        raise BlockwrightError("meter: no measurement", allowed="repeats >= 1")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def time(fn: Callable[[], Any], *, repeats: int = 7, warmup: int = 2) -> Spread:
    """Seconds that a call takes, on the device it runs on."""
    for _ in range(warmup):
        fn()
    return spread([_seconds(fn) for _ in range(repeats)])


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], *, repeats: int = 7, warmup: int = 2) -> Spread:
    """How many times longer `slow` takes than `fast`, in interleaved pairs so that a busy machine burdens both alike."""
    for _ in range(warmup):
        slow()
        fast()
    return spread([_seconds(slow) / _seconds(fast) for _ in range(repeats)])


def cold_copies(value: Any, nbytes: int) -> list[Any]:
    """Enough copies of a tensor, or a tuple of tensors and numbers, of `nbytes` that together they exceed every cache: for use in turn."""
    return [copy.deepcopy(value) for _ in range(max(2, -(-COLD_BYTES // nbytes)))]


def graph_microseconds(calls: Sequence[Callable[[], Any]], *, number: int) -> float:
    """Microseconds of one call on CUDA, without its launch: on average over a graph of `number` calls, and at least one of each in turn."""
    import torch

    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    number = max(len(calls), number)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(number):
            calls[i % len(calls)]()
    return 1e6 * time(graph.replay, repeats=7, warmup=2).median / number


def _seconds(fn: Callable[[], Any]) -> float:
    _synchronize()
    start = clock.perf_counter()
    fn()
    _synchronize()
    return clock.perf_counter() - start


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def saved_bytes(fn: Callable[[], Any], *, ignore: Sequence["Tensor"] = ()) -> int:
    """Bytes that autograd keeps for the backward of what `fn` computes: each storage once, parameters and those of `ignore` not at all."""
    import torch

    skipped = {t.untyped_storage().data_ptr() for t in ignore}
    seen: dict[int, int] = {}
    alive: list[Any] = []  # keeps storages from being freed and their addresses from being used again while we count

    def pack(t: "Tensor") -> "Tensor":
        storage = t.untyped_storage()
        owner = t if t._base is None else t._base  # a transposed weight is a view of its parameter
        if storage.data_ptr() not in skipped and not isinstance(owner, torch.nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t.detach()  # an output that its own node held as it is would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = fn()
    del result
    return sum(seen.values())


def peak_cuda(fn: Callable[[], Any]) -> int:
    """Peak bytes that the CUDA allocator held during a call, above what it held before."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


_REPORTS_ITS_PEAK = """
import runpy, sys
from blockwright import meter
report, module, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
try:
    if module == "-c":
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    open(report, "w").write(str(meter.high_water()))
"""


def peak_rss(module: str, *arguments: str, env: dict[str, str] | None = None) -> int:
    """Peak resident bytes of `python -m module arguments`, run as a child, itself only; `peak_rss("-c", code)` runs code instead.

    Raises CalledProcessError, with what the child said, when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "peak"
        command = [sys.executable, "-c", _REPORTS_ITS_PEAK, str(report), module, *arguments]
        subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(report.read_text())


def high_water() -> int:
    """Peak resident bytes of this process so far (VmHWM), to about 1 MiB: the kernel counts in batches."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that the control groups of this process allow it, such as a container's; sys.maxsize where nothing limits it.

    groups : where the system shows them, of version 1 or 2. own : the file that says which this process is in.
    """
    found = [sys.maxsize]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (groups / "memory", "memory.limit_in_bytes") if kinds else (groups, "memory.max")
        inner = top / group.lstrip("/")
        for path in (folder / name for folder in (inner, *inner.parents) if folder.is_relative_to(top)):  # a group around it limits it too
            limit = path.read_text().strip() if path.is_file() else "max"
            found += [int(limit)] if limit.isdigit() else []
    return min(found)


def flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix multiplications, convolutions and attentions in a call (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fn()
    return int(counter.get_total_flops())


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. Raises BlockwrightError where there is neither."""
    if not path.exists():
        raise BlockwrightError(f"{path}: no such file or folder", do="Check the path")
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


class Quality:
    """How well a model predicts a text, and how close it is to the dense model: running sums over windows.

    Every window of T tokens gives T-1 predictions; means are over predictions (token-weighted).
    """

    def __init__(self) -> None:
        self.nll = self.kl = 0.0
        self.agree = self.tokens = self.compared = 0

    def add(self, logits: "Tensor", ids: "Tensor", dense_logits: "Tensor | None" = None) -> None:
        """logits [n, T, V] of any float dtype, ids [n, T], and the dense model's logits for the same ids.

        Computed in fp32, summed in fp64. Memory: about four fp32 copies of the logits of CHUNK positions, whatever n and T.
        Raises BlockwrightError where the shapes do not match.
        """
        import torch

        if logits.shape[:2] != ids.shape or (dense_logits is not None and dense_logits.shape != logits.shape):
            dense = None if dense_logits is None else tuple(dense_logits.shape)
            raise BlockwrightError(
                f"Quality: logits {tuple(logits.shape)}, ids {tuple(ids.shape)}, dense logits {dense}",
                allowed="[n, T, V], [n, T] and [n, T, V]",
            )
        steps = ids.shape[1] - 1
        for i, start in itertools.product(range(len(ids)), range(0, steps, CHUNK)):
            rows = slice(start, min(start + CHUNK, steps))
            log_p = torch.log_softmax(logits[i, rows].float(), -1)
            targets = ids[i, 1:][rows].to(log_p.device)
            self.nll -= log_p.gather(-1, targets[:, None]).double().sum().item()
            self.tokens += len(targets)
            if dense_logits is not None:
                log_q = torch.log_softmax(dense_logits[i, rows].float(), -1)
                self.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                self.kl += float(log_q.exp().mul_(log_q - log_p).sum(-1).double().sum())  # sum of q (log q - log p)
                self.compared += len(targets)

    def result(self) -> dict[str, float]:
        """perplexity, nll (nats a token), tokens; and, where compared, kl (dense || model, nats a token) and top1 (agreement, 0..1).

        Raises BlockwrightError where nothing was predicted.
        """
        if not self.tokens:
            raise BlockwrightError("Quality: no token was predicted", allowed="windows of 2 tokens or more")
        nll = self.nll / self.tokens
        perplexity = math.inf if nll > 709 else math.exp(nll)  # what fp64 holds
        out = {"perplexity": perplexity, "nll": nll, "tokens": float(self.tokens)}
        if self.compared:
            out |= {"kl": max(self.kl / self.compared, 0.0), "top1": self.agree / self.compared}
        return out


def quality(model: "nn.Module", ids: "Tensor", *, dense: "nn.Module | None" = None, batch: int = 4) -> dict[str, float]:
    """`Quality` of a model in memory on windows ids [n, T]; with `dense`, also how close the two are."""
    import torch

    out = Quality()
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch]
            other = None if dense is None else dense(rows, use_cache=False).logits
            out.add(model(rows, use_cache=False).logits, rows, other)
    return out.result()


def loss(model: "nn.Module", ids: "Tensor", *, batch: int = 4) -> float:
    """Token-weighted mean negative log-likelihood, nats a token, over windows ids [n, T]."""
    return quality(model, ids, batch=batch)["nll"]


def perplexity(model: "nn.Module", ids: "Tensor", *, batch: int = 4) -> float:
    """exp of the token-weighted mean negative log-likelihood over windows ids [n, T]."""
    return quality(model, ids, batch=batch)["perplexity"]
