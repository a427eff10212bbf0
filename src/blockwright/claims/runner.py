"""Claims: what a paper says, measured again. A claim is a function; this file runs it, keeps its numbers and draws them.

def claim(*, seed: int = 0, device: str = "cpu") -> Claim        # in claims/<method>.py
"""

import dataclasses
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from blockwright import registry
from blockwright.blocks.folders import replace_file
from blockwright.errors import BlockwrightError

Number = float | int
VERSIONS = ("blockwright", "torch", "transformers", "compressed-tensors", "numpy", "triton")


def reaches(measured: Number, target: Number, better: str) -> bool:
    """Whether a number reaches its target, where `better` is "higher" or "lower". NaN does not."""
    return measured >= target if better == "higher" else measured <= target


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured number with the target that was set before it was measured.

    name : what is measured. unit : of measured, target, baseline and spread. better : which way is good, so met is measured >= target
    or <= target. baseline : the strongest fair rival at the same data and budget. spread : lowest and highest over seeds or repeats.
    """

    name: str = ""
    measured: Number
    target: Number
    unit: str
    better: Literal["higher", "lower"]
    baseline: Number | None = None
    spread: tuple[Number, Number] | None = None

    @property
    def met(self) -> bool:
        """Whether the number reaches its target. NaN does not."""
        return reaches(self.measured, self.target, self.better)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What to draw: for each series its points (x, y). Bars take words for x, lines and scatters take numbers.

    In a scatter a thin line joins the points that no other beats in both x and y, where less is better.
    """

    kind: Literal["bar", "line", "scatter"]
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[Number | str, Number]]]
    target: Number | None = None  # a dashed line across
    log: bool = False  # the y axis


@dataclass(frozen=True, kw_only=True)
class Claim(Measured):
    """A paper's claim, measured again: the headline number (the fields of Measured), and what else it takes to believe it.

    paper : the claim in the paper's words. parts : further numbers with targets of their own; the claim is met when all are.
    rows : the table behind the numbers, one mapping a row. plot : what to draw. notes : size, data, what differs from the paper.
    """

    paper: str
    parts: Sequence[Measured] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    plot: Plot | None = None
    notes: Sequence[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the headline number and every part reach their targets."""
        return super().met and all(part.met for part in self.parts)


def reproduce(slug: str, *, seed: int = 0, device: str = "cpu", out: Path | None = None) -> dict[str, Any]:
    """Measure a claim and keep it: `<out>/<device>/<slug>.json` and `.svg`. Returns what the JSON file holds.

    slug : a method's, or the name of another file in claims/. device : cpu or cuda. out : default the results folder of this checkout.
    Raises BlockwrightError for an unknown slug or device, and where neither `out` nor a checkout is at hand.
    """
    folder = results_folder(out) / device_name(device)
    claim = import_module(claim_module(slug)).claim
    started = time.perf_counter()
    made: Claim = claim(seed=seed, device=device)
    result = {
        "format": 1,
        "method": slug,
        "paper": made.paper,
        **numbers(made),
        "met": made.met,
        "parts": [numbers(part) | {"met": part.met} for part in made.parts],
        "rows": [dict(row) for row in made.rows],
        "plot": None if made.plot is None else dataclasses.asdict(made.plot),
        "notes": list(made.notes),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "device": folder.name,
        "versions": versions(),
        "commit": commit(),
    }
    text = json.dumps(result, indent=1, allow_nan=False, default=float) + "\n"  # default: numbers of numpy and torch
    folder.mkdir(parents=True, exist_ok=True)
    if made.plot is not None:
        replace_file(folder / f"{slug}.svg", lambda p: draw(made.plot, p))  # type: ignore[arg-type]
    replace_file(folder / f"{slug}.json", lambda p: _write(p, text))
    return dict(json.loads(text))


def reproduce_all(
    slugs: Iterable[str], *, seed: int = 0, device: str = "cpu", out: Path | None = None, console: Console | None = None
) -> bool:
    """Measure several claims and print their table; one that fails does not stop the others. Returns whether all were met."""
    console = console or Console()
    slugs = list(slugs)
    table = Table(title=f"claims on {device_name(device)}", title_style="bold", header_style="bold", box=None)
    for column in ("method", "number", "target", "measured", "baseline", "spread", "", "seconds"):
        table.add_column(column, justify="right" if column in ("target", "measured", "baseline", "spread", "seconds") else "left")
    good, failed = True, []
    for slug in slugs:
        try:
            result = reproduce(slug, seed=seed, device=device, out=out)
        except BlockwrightError as error:
            if len(slugs) == 1:
                raise
            failed.append((slug, str(error)))
        except Exception as error:
            if len(slugs) == 1:
                raise
            failed.append((slug, f"{type(error).__name__}: {error}"))
        else:
            good = good and result["met"]
            for number in (result, *result["parts"]):
                _row(table, slug, number, result["seconds"] if number is result else None)
            if len(slugs) > 1:
                console.print(f"{slug}: {'met' if result['met'] else 'missed'}, {result['seconds']:.0f} s", highlight=False)
    console.print(table)
    for slug, why in failed:
        console.print(f"{slug}: failed: {why}", style="red", highlight=False, markup=False)
    return good and not failed


def claim_module(slug: str) -> str:
    """The module of a slug's claim: `blockwright.claims.<name>`, or `<module>_claim` beside a method of another package."""
    if slug not in registry.methods() and slug in registry.other_claims():
        return f"blockwright.claims.{slug.replace('-', '_')}"
    method = registry.method(slug)
    if method.claim_path is None:
        raise BlockwrightError(f"{slug}: has no claim to reproduce", do=f"Write one: {method.claim_module}")
    return method.claim_module


def results_folder(out: Path | None) -> Path:
    """Where results go: `out`, or `results/` of the checkout that this package runs from."""
    if out is not None:
        return out
    if registry.CHECKOUT is None:
        raise BlockwrightError("reproduce: nowhere to write", allowed="a checkout of blockwright, or a folder", do="Add --out FOLDER")
    return registry.CHECKOUT / "results"


def device_name(device: str) -> str:
    """`cpu`, or the short name of the GPU, such as `h100`. Raises BlockwrightError where there is none."""
    if device == "cpu":
        return "cpu"
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        raise BlockwrightError(
            f"device {device!r}: not on this machine",
            allowed="cpu" + (", cuda" if torch.cuda.is_available() else ""),
            do="Use --device cpu",
        )
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((w for w in words if any(c.isdigit() for c in w)), "-".join(words))


def versions() -> dict[str, str]:
    """Versions of what a number depends on, and the processor."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` where the sources differ from it; None outside a checkout."""
    if registry.CHECKOUT is None:
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(registry.CHECKOUT), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return None if head is None else head + ("-dirty" if git("status", "--porcelain", "--", "src") else "")


def draw(plot: Plot, path: Path) -> None:
    """A plot as SVG: the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        {"bar": _bars, "line": _lines, "scatter": _scatter}[plot.kind](axes, plot)
        if plot.target is not None:
            axes.axhline(plot.target, color="#b4413c", linewidth=1.2, linestyle=(0, (5, 3)), zorder=3)
            axes.annotate(
                f"target {plot.target:g}", (1, plot.target), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
                ha="right", color="#b4413c", fontsize=8, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
            )  # fmt: skip
        if plot.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(plot.title, loc="left", fontweight="bold", fontsize=10.5)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        if len(plot.series) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


STYLE = {
    "svg.hashsalt": "blockwright",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a949e",
    "axes.labelcolor": "#3c4650",
    "text.color": "#1f272e",
    "xtick.color": "#3c4650",
    "ytick.color": "#3c4650",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e8ec",
    "axes.axisbelow": True,
}
COLOURS = ("#2f7ebc", "#e08a3c", "#4aa36b", "#9467b5", "#8a949e", "#c9b037", "#cf6f93", "#3fb3a3")


def _bars(axes: Any, plot: Plot) -> None:
    labels = list(dict.fromkeys(str(x) for points in plot.series.values() for x, _ in points))
    width = 0.8 / len(plot.series)
    for i, (name, points) in enumerate(plot.series.items()):
        at = [labels.index(str(x)) + (i - (len(plot.series) - 1) / 2) * width for x, _ in points]
        bars = axes.bar(at, [y for _, y in points], width * 0.92, label=name, color=COLOURS[i % len(COLOURS)], zorder=2)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.12)


def _lines(axes: Any, plot: Plot) -> None:
    for i, (name, points) in enumerate(plot.series.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker="o",
            markersize=3.5,
            linewidth=1.6,
        )


def _scatter(axes: Any, plot: Plot) -> None:
    points = sorted((float(x), y) for series in plot.series.values() for x, y in series)
    front = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
    axes.plot(*zip(*front, strict=True), color="#8a949e", linewidth=1, zorder=1)
    for i, (name, series) in enumerate(plot.series.items()):
        marker = "osD^v"[i // len(COLOURS) % 5]
        axes.scatter(*zip(*series, strict=True), label=name, color=COLOURS[i % len(COLOURS)], marker=marker, s=26, zorder=2)


def numbers(m: Measured) -> dict[str, Any]:
    """The fields of a measured number: for its row in a result, and to make it a claim's headline, `Claim(**numbers(first), ...)`."""
    return {f.name: getattr(m, f.name) for f in dataclasses.fields(Measured)}


def _row(table: Table, slug: str, number: Mapping[str, Any], seconds: float | None) -> None:
    sign = ">=" if number["better"] == "higher" else "<="
    spread = "" if number["spread"] is None else "{:.3g} to {:.3g}".format(*number["spread"])
    table.add_row(
        slug if seconds is not None else "",
        f"{number['name']} ({number['unit']})" if number["name"] else number["unit"],
        f"{sign} {number['target']:.4g}",
        f"{number['measured']:.4g}",
        "" if number["baseline"] is None else f"{number['baseline']:.4g}",
        spread,
        "[green]met[/]" if reaches(number["measured"], number["target"], number["better"]) else "[red]missed[/]",
        "" if seconds is None else f"{seconds:.0f}",
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
