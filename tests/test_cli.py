"""The command line: quick answers, exit codes, and a parent that answers while the work goes on in a child."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockwright import __version__, cli, registry

FINEQUANT = "model: none-such\nstages: [finequant]\nout: out\n"


def blockwright(*arguments, env=None, cwd=None):
    command = [sys.executable, "-m", "blockwright.cli", *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def in_process(monkeypatch, *arguments):
    """The exit code of a command that needs no child."""
    monkeypatch.setattr(sys, "argv", ["blockwright", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


# quick answers


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json", "--all"], ["show", "finequant"], ["run", "--help"], ["version"]]
)
def test_answers_come_in_a_second_and_without_torch(arguments):
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys; sys.argv = ['blockwright', *{arguments!r}]\nfrom blockwright import cli\n"
    code += f"try: cli.main()\nfinally: assert not {heavy} & set(sys.modules)"
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = os.times()  # the processor's time, so that other work on the machine does not count
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and done.stdout, done.stderr
    assert min(seconds) < 1


def test_importing_blockwright_is_quick_and_brings_no_torch():
    code = "import time; t = time.process_time(); import blockwright, sys; s = time.process_time() - t;"
    code += "print(s, 'torch' in sys.modules, 'pydantic' in sys.modules)"
    best = min(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3))
    assert float(best[0]) < 0.3 and best[1:] == ["False", "False"]


def test_the_package_offers_every_method_and_nothing_else():
    import blockwright as bw

    assert bw.finequant.__name__ == "finequant" and set(registry.methods()) <= {name.replace("_", "-") for name in dir(bw)}
    with pytest.raises(AttributeError, match="no attribute 'fineqant'"):
        bw.fineqant  # noqa: B018


# list and show


def test_list_json_gives_every_field_of_every_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "CHECKOUT", tmp_path)
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "finequant.json").write_text('{"measured": 0.5, "unit": "of it", "met": false}')
    assert in_process(monkeypatch, "list", "--json") == 0
    rows = {row["slug"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == registry.methods().keys()
    row = rows["finequant"]
    assert row.keys() == {"slug", "room", "kind", "title", "arxiv", "summary", "claim", "built", "results"}
    assert row["claim"].keys() == {"figure", "against", "where"} and row["results"]["cpu"]["measured"] == 0.5
    assert in_process(monkeypatch, "list", "--room", "compress") == 0
    assert "0.5 of it (cpu," in " ".join(capsys.readouterr().out.split())


def test_list_all_shows_the_roadmap_too(monkeypatch, capsys):
    assert in_process(monkeypatch, "list", "--json", "--all", "--room", "scene") == 0
    assert [(r["slug"], r["built"]) for r in json.loads(capsys.readouterr().out)] == [("momentum-gs", "momentum-gs" in registry.methods())]


def test_show_tells_options_claim_and_files(monkeypatch, capsys):
    assert in_process(monkeypatch, "show", "finequant") == 0
    said = " ".join(capsys.readouterr().out.split())
    for o in registry.method("finequant").options:
        assert o.name in said
    assert "up to 3.65x throughput" in said and "finequant.py" in said and "2308.09723" in said and "dict[str," in said


# exit codes


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["list", "--room", "attik"], "room 'attik': unknown"),
        (["lst"], "No such command 'lst'"),
        (["show", "fineqant"], "Did you mean 'finequant'?"),
        (["show"], "Missing argument 'method'"),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["run", "--dryrun", "x"], "No such option: --dryrun"),
        (["reproduce"], "name one method, or --all"),
        (["reproduce", "finequant", "--all"], "name one method, or --all"),
        (["reproduce", "finequant", "--device", "tpu"], "device='tpu'. Allowed: cpu, cuda"),
        (["reproduce", "nothing-of-the-kind"], "method 'nothing-of-the-kind': unknown"),
        (["inspect", "none"], "none: no report.json"),
        (["new", "attik", "x"], "room 'attik': unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("blockwright: ") and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


def test_a_mistake_found_by_the_child_is_exit_code_2_too(tmp_path):
    (tmp_path / "r.yaml").write_text(FINEQUANT)
    done = blockwright("run", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model 'none-such': no such folder" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_bug_of_ours_is_exit_code_70_and_a_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "methods", lambda: 1 / 0)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    assert in_process(monkeypatch, "list") == 70
    [report] = tmp_path.iterdir()
    err = capsys.readouterr().err
    assert str(report) in err and "ZeroDivisionError" in err and err.count("\n") == 1
    assert "Traceback" in report.read_text() and __version__ in report.read_text()


def test_a_reader_that_goes_away_is_no_bug():
    command = f"{sys.executable} -m blockwright.cli list --json --all | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# the parent answers


def started(plugin, cwd, *options):
    """A parent whose child sits in an endless C call, beside a process that the child started: (parent, ids of the two)."""
    command = [sys.executable, "-m", "blockwright.cli", "reproduce", "example-slow", "--out", "results dir", *options]
    parent = subprocess.Popen(command, env=plugin, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = parent.stdout.readline().split()
    assert words[:1] == ["pids"], parent.stderr.read()
    time.sleep(0.1)
    return parent, [int(w) for w in words[1:]]


def ended(pids, within):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_is_answered_within_a_second_with_the_line_that_resumes(plugin, tmp_path):
    parent, pids = started(plugin, tmp_path)
    assert all(map(alive, pids))
    at = time.monotonic()
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=10)
    assert time.monotonic() - at < 1 and parent.returncode == 130
    assert "Go on with: blockwright reproduce example-slow --out 'results dir'" in err and "Traceback" not in err
    assert ended(pids, 1)


def test_the_work_may_tidy_up_after_ctrl_c(plugin, tmp_path):
    parent, pids = started(plugin, tmp_path, "--seed", "1")
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=10)
    assert (tmp_path / "tidied").exists() and "Traceback" not in err and parent.returncode == 130 and ended(pids, 1)


def test_a_second_ctrl_c_ends_at_once(plugin, tmp_path):
    parent, pids = started(plugin, tmp_path)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.1)
    at = time.monotonic()
    parent.send_signal(signal.SIGINT)
    parent.wait(timeout=10)
    assert time.monotonic() - at < 0.4 and parent.returncode == 130 and ended(pids, 1)


def test_when_the_parent_is_killed_nothing_stays_behind(plugin, tmp_path):
    parent, pids = started(plugin, tmp_path)
    parent.kill()
    parent.wait()
    assert ended(pids, 2)


def test_a_killed_child_is_told(plugin, tmp_path):
    parent, pids = started(plugin, tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    _, err = parent.communicate(timeout=10)
    assert parent.returncode == 137 and "the work was killed (memory ran out" in err and "Go on with: blockwright reproduce" in err
    assert ended(pids, 1)


def test_run_resumes_with_what_it_was_started_with(monkeypatch, tmp_path):
    (tmp_path / "a recipe.yaml").write_text(FINEQUANT)
    told = []
    monkeypatch.setattr(cli, "_in_child", lambda *, resume_with: told.append(resume_with) or sys.exit(0))
    recipe = str(tmp_path / "a recipe.yaml")
    assert in_process(monkeypatch, "run", recipe, "--out", "x y", "--overwrite") == 0
    assert in_process(monkeypatch, "run", recipe, "--resume") == 0
    assert in_process(monkeypatch, "run", recipe, "--dry-run") == 0
    assert told == [["run", recipe, "--out", "x y", "--overwrite", "--resume"], ["run", recipe, "--resume"], None]
