"""The command line: thin, and quick to answer. Exit codes: 0 good, 1 target missed, 2 wrong input, 70 our bug, 130 interrupted."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import blockwright.registry as registry
from blockwright import __version__
from blockwright.errors import BlockwrightError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Efficient deep learning, block by block: a model in, a cheaper one out.",
)
console = Console()
CHILD = "BLOCKWRIGHT_CHILD"  # set in the process that does the work of a long command
MISSED, MISTAKE, BUG, INTERRUPTED = 1, 2, 70, 130


@app.command("list")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="Everything known of each method, as JSON.")] = False,
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what is on the roadmap.")] = False,
) -> None:
    """The methods by room: what each buys, its claim, its last measured value."""
    if room is not None and room not in registry.ROOMS:
        raise BlockwrightError(f"room {room!r}: unknown", allowed=", ".join(registry.ROOMS), do=registry.nearest(room, registry.ROOMS))
    found = [m for m in registry.methods().values() if room in (None, m.card["room"])]
    if as_json:
        keys = ("slug", "room", "kind", "title", "arxiv", "summary", "claim")
        rows = [{key: m.card[key] for key in keys} | {"results": registry.results(m.slug)} for m in found]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, header_style="bold")
    for column in ("room", "method", "what it buys", "claim", "measured here"):
        table.add_column(column)
    for m in found:
        claim = f"{m.card['claim']['figure']} vs {m.card['claim']['against']}"
        table.add_row(m.card["room"], m.slug, m.card["saves"], claim, _measured(m.slug))
    built = {m.slug for m in registry.methods().values()}
    for slug, planned in registry.roadmap().items() if every else ():
        if slug not in built and room in (None, planned["room"]):
            table.add_row(planned["room"], f"[dim]{slug}[/]", f"[dim]{planned['title']}[/]", "", "[dim]not built yet[/]")
    console.print(table)


@app.command()
def show(method: Annotated[str, typer.Argument(help="A slug; see `blockwright list`.")]) -> None:
    """What a method does, when to use it, its options, its claim, its files."""
    m = registry.method(method)
    console.print(f"[bold]{m.slug}[/]  {m.card['title']}  (arXiv {m.card['arxiv']})\n", highlight=False)
    console.print(m.docstring + "\n", markup=False, highlight=False)
    console.print(m.function + "\n", markup=False, highlight=False)
    table = Table(box=None, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column)
    for o in m.options:
        table.add_row(o.name, o.annotation, "required" if o.required else repr(o.default), o.help)
    console.print(table)
    claim = m.card["claim"]
    console.print(f"\nsaves   {m.card['saves']}\nneeds   {', '.join(m.card['needs']) or 'nothing'}\nwrites  {m.card['writes']}", highlight=False)
    console.print(f"claim   {claim['figure']}, against {claim['against']} ({claim['where']}); measured here: {_measured(m.slug)}", highlight=False)
    console.print(f"file    {m.module.replace('.', '/')}.py; claim: blockwright reproduce {m.slug}", highlight=False)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see examples/.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan: memory, time, bytes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    out: Annotated[Path | None, typer.Option(help="The output folder, instead of the recipe's.")] = None,
) -> None:
    """The main job: a model in, stages, a cheaper model out, with its report."""
    from blockwright.recipes.recipe import load_recipe

    checked = load_recipe(recipe)
    if out is not None:
        checked = checked.model_copy(update={"out": out})
    if CHILD not in os.environ:  # the parent stays light, so that it can answer at once
        _in_child(["run", *sys.argv[2:]], resume_with=f"blockwright run {recipe} --resume" + (f" --out {out}" if out else ""))
        return
    from blockwright.recipes import execute, report

    if dry_run:
        _print_plan(execute.plan(checked))
        return
    with _bar() as progress:
        made = execute.execute(checked, resume=resume, overwrite=overwrite, progress=progress)
    console.print(report.table(made))
    console.print(f"model and report: {checked.out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A folder that blockwright wrote.")]) -> None:
    """What was done to a model, block by block."""
    from blockwright.blocks import folders

    folders.settle(folder)
    if not (folder / "report.json").is_file():
        raise BlockwrightError(f"{folder}: no report.json", allowed="a folder that `blockwright run` wrote", do="Check the path")
    folders.verify(folder)
    from blockwright.recipes import report

    made = json.loads((folder / "report.json").read_text())
    console.print(report.table(made))
    console.print(report.block_table(made))


@app.command()
def reproduce(
    method: Annotated[str | None, typer.Argument(help="A slug; see `blockwright list`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method that can run here.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Where results go; default: results/ of this checkout.")] = None,
) -> None:
    """Re-measure a paper's claim at a size this machine can do: claimed, measured, baseline, plot."""
    if (method is None) == (not every):
        raise BlockwrightError("reproduce: name one method, or --all", do="See `blockwright list`")
    if device not in ("cpu", "cuda"):
        raise BlockwrightError(f"reproduce: device={device!r}", allowed="cpu, cuda")
    slugs = [registry.method(method).slug] if method else list(registry.methods())
    if CHILD not in os.environ:
        _in_child(["reproduce", *sys.argv[2:]], resume_with="blockwright reproduce " + " ".join(sys.argv[2:]))
        return
    from blockwright.claims import runner

    raise typer.Exit(0 if runner.reproduce_all(slugs, device=device, seed=seed, out=out, console=console) else MISSED)


@app.command()
def version() -> None:
    """The version."""
    print(__version__)


def main() -> None:
    """Entry point: runs the command line and turns errors into exit codes."""
    if CHILD in os.environ:
        _end_with_parent()
    try:
        app(standalone_mode=False)
    except BlockwrightError as error:
        print(f"blockwright: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            print(f"blockwright: {getattr(error, 'format_message', lambda: error)()}", file=sys.stderr)
            sys.exit(MISTAKE)
        sys.exit(_report_bug())


def _in_child(arguments: list[str], *, resume_with: str) -> None:
    """Run this command in a child process; on Ctrl-C stop it within a second and say how to resume (a second one ends at once)."""
    child = subprocess.Popen([sys.executable, "-m", "blockwright.cli", *arguments], env=os.environ | {CHILD: str(os.getpid())})

    def stop(number: int, frame: Any) -> None:
        child.kill()  # whatever is finished is in the journal; nothing else needs saving
        print(f"\nblockwright: interrupted. Go on with: {resume_with}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    code = child.wait()
    if code == -signal.SIGKILL:
        print(f"blockwright: killed (out of memory?). Go on with: {resume_with}", file=sys.stderr)
    raise typer.Exit(code if code >= 0 else BUG)


def _end_with_parent() -> None:
    """In the child: leave Ctrl-C to the parent, and end when the parent does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[CHILD]):
            os._exit(INTERRUPTED)


def _report_bug() -> int:
    """Write the traceback to a file and say where. Returns the exit code of our own bugs."""
    with tempfile.NamedTemporaryFile("w", prefix="blockwright-bug-", suffix=".txt", delete=False) as f:
        f.write(f"blockwright {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    last = traceback.format_exc().strip().splitlines()[-1]
    print(f"blockwright: a bug of ours ({last}). The details are in {f.name}; please report them.", file=sys.stderr)
    return BUG


class _bar:
    """A rich progress bar as a `Progress`: what is being done, how far, time left."""

    def __enter__(self) -> Any:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description:<32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
        )
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done, total=total)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def _print_plan(plan: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("step", "memory", "time", "bits a weight"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for s in plan["stages"]:
        table.add_row(s["name"], f"{s['memory'] / 1e9:.2f} GB", f"{s['seconds']:.0f} s", f"{s['bits']:.2f}")
    table.add_row("measuring", f"{plan['measuring']['memory'] / 1e9:.2f} GB", f"{plan['measuring']['seconds']:.0f} s", "")
    console.print(table)
    share = plan["bytes"] / plan["bf16_bytes"]
    console.print(
        f"in all: {plan['memory'] / 1e9:.2f} GB of memory, about {plan['seconds']:.0f} s; {plan['bytes'] / 1e6:.1f} MB of weights, "
        f"{share:.0%} of bf16, in {plan['out']}",
        highlight=False,
    )


def _measured(slug: str) -> str:
    found = [f"{r['measured']:.3g} {r['unit']} ({device}, {'met' if r['met'] else 'missed'})" for device, r in registry.results(slug).items()]
    return ", ".join(found) or "-"


if __name__ == "__main__":
    main()
