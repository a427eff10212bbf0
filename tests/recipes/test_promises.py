"""The promises that a run keeps, each with its test; the numbers are those of docs and design."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import in_fork, killed_at, recipe, tree, weights, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import blockwright as bw
from blockwright.blocks import folders
from blockwright.errors import BlockwrightError
from blockwright.recipes import execute, export
from blockwright.recipes.load import load
from blockwright.recipes.recipe import load_recipe

GRID = {"sample-grid": {"bits": 4, "group_size": 32}}
QUICK = {"measure": {"use": False, "quality": False, "blocks": False}}
SAMPLES = Path(__file__).parents[1] / "samples"


def started(file, *options, env, log="log"):
    """A run as a user starts it, in a process of its own: its output goes into a file."""
    command = [sys.executable, "-m", "blockwright.cli", "run", file, *options]
    with Path(log).open("w") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


# 1: old or new, never mixed


def test_promise_1_the_folder_is_old_or_new_whatever_file_operation_the_kill_comes_at(home):
    old, new = recipe({"sample-grid": {"bits": 8}}, **QUICK), recipe(GRID, **QUICK)
    bw.run(new)
    digest = {"new": weights(home / "cheaper")}
    bw.run(old, overwrite=True)
    digest["old"] = weights(home / "cheaper")
    kept = tree(home / "cheaper")
    seen, operation, step = [], 1, 1
    while True:
        code = killed_at(operation, lambda: bw.run(new, overwrite=True))
        assert code in (0, -signal.SIGKILL)
        folders.settle(home / "cheaper")
        folders.verify(home / "cheaper")
        [state] = [name for name, d in digest.items() if d == weights(home / "cheaper")]
        seen.append(state)
        assert state == "new" or tree(home / "cheaper") == kept
        if code == 0:
            break
        if state == "new":
            bw.run(old, overwrite=True)
            kept = tree(home / "cheaper")
        operation += step
        step = max(1, operation // 8)  # closer where little is done, wider later on
    assert seen[-1] == "new" and {"old", "new"} == set(seen) and len(seen) > 15
    left = [p.name for p in home.iterdir() if p.name.startswith(".cheaper")]
    assert not left  # what the killed ones left was cleaned up by the next


def test_promise_1_a_killed_run_of_the_command_line_leaves_the_old_folder(home, environment):
    bw.run(recipe(GRID, **QUICK))
    before = tree(home / "cheaper")
    file = written(recipe({"sample-crawl": {"seconds": 1.0}}, "sample-nudge", **QUICK))
    run = started(file, "--overwrite", env=environment)
    wait_for(lambda: (home / ".cheaper.work" / "0-sample-crawl" / "pass-0" / "unit-0001.safetensors").exists())
    run.kill()
    run.wait()
    wait_for(lambda: not running(home))  # the watchman ends the child
    assert tree(home / "cheaper") == before
    folders.verify(home / "cheaper")


def running(folder):
    """Ids of other processes that work in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if int(path.parent.name) != os.getpid() and path.resolve() == folder.resolve():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("limit", [100, 3_000, 60_000, 100_000])
@pytest.mark.parametrize("before", ["nothing", "a folder"])
def test_promise_1_a_full_disk_at_any_byte_leaves_the_old_folder(home, before, limit):
    if before == "a folder":
        bw.run(recipe({"sample-grid": {"bits": 8}}, **QUICK))
    kept = {k: v for k, v in tree(home).items() if not k.startswith(".cheaper.work")}
    r = recipe("sample-nudge", GRID, **QUICK)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(BlockwrightError, match=r"the disk is full"):
            bw.run(r, overwrite=True)

    assert in_fork(limited) == 0
    assert {k: v for k, v in tree(home).items() if not k.startswith(".cheaper.work")} == kept
    bw.run(r, overwrite=before == "a folder", resume=(home / ".cheaper.work").exists())  # with room again it goes on
    assert not (home / ".cheaper.work").exists()
    folders.verify(home / "cheaper")


# 2: a killed run goes on to the same bits


def test_promise_2_a_run_killed_at_any_operation_resumes_to_the_same_bits(home):
    r = recipe("sample-nudge", {"sample-fold": {"drop": [1], "share": {1: 0}}}, GRID, embedding=8)
    bw.run(r | {"out": "whole"})
    whole = weights(home / "whole")
    numbers = json.loads((home / "whole" / "report.json").read_text())
    kills, operation = 0, 6
    while killed_at(operation, lambda: bw.run(r | {"out": "cut"}, resume=True)):
        kills += 1
        operation += 8  # each time it comes a little further
        assert not (home / "cut").exists() or weights(home / "cut") == whole
        if (home / "cut").exists():  # killed after the commit
            shutil.rmtree(home / "cut")
    assert kills > 12 and weights(home / "cut") == whole
    again = json.loads((home / "cut" / "report.json").read_text())
    for part in ("blocks", "dense", "samples"):
        assert again[part] == numbers[part]
    for a, b in zip(again["stages"], numbers["stages"], strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert again["result"] | {"folder": ""} == numbers["result"] | {"folder": ""}


def test_promise_2_no_finished_block_is_done_again(home, monkeypatch):
    from sample_stages import crawl

    seen = []
    monkeypatch.setenv("CRAWL", "1")
    monkeypatch.setattr(crawl.time, "sleep", lambda seconds: seen.append(seconds) or (len(seen) == 3 and sys.exit("stopped")))
    r = recipe({"sample-crawl": {"seconds": 0.01}}, GRID, **QUICK)
    with pytest.raises(SystemExit):
        bw.run(r)
    assert len(seen) == 3 and (home / ".cheaper.work").exists()
    bw.run(r, resume=True)
    assert len(seen) == 4  # blocks 0 and 1 from the journal, 2 once more


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda home: {"stages": ["sample-nudge", {"sample-grid": {"bits": 3}}]}, "recipe differs"),
        (lambda home: {"seed": 1}, "recipe differs"),
        (lambda home: {"embedding": 8}, "recipe differs"),
        (lambda home: {"calibration": {"text": "learn.txt", "num": 3, "length": 32}}, "recipe differs"),
        (lambda home: (home / "learn.txt").write_text((home / "learn.txt").read_text().replace("w4 ", "w5 ")) and {}, "text differs"),
        (lambda home: changed_weights(home / "model") or {}, "model differs"),
        (lambda home: os.utime(home / "model" / "config.json") or {"measure": {"use": False}, "memory": "50GB"}, None),
        (lambda home: torch.set_num_threads(2) or {}, "threads differs"),
    ],
)
def test_promise_2_other_options_or_inputs_are_refused(home, change, said):
    r = recipe("sample-nudge", {"sample-crawl": {"seconds": 0.001}}, **QUICK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert killed_at(60, lambda: bw.run(r)) == -signal.SIGKILL and list((home / ".cheaper.work").rglob("unit-*"))
    before = tree(home / ".cheaper.work")
    try:
        other = r | change(home)
        if said is None:  # neither the time of a file nor what is measured matters
            assert bw.run(other, resume=True)["result"]
        else:
            with pytest.raises(
                BlockwrightError, match=f"--resume: {said} from the unfinished run's. Allowed: the same recipe.*--overwrite"
            ):
                bw.run(other, resume=True)
            assert tree(home / ".cheaper.work") == before and not (home / "cheaper").exists()
            with pytest.raises(
                BlockwrightError, match="out cheaper: an unfinished run is here. Go on with --resume, or start again with --over"
            ):
                bw.run(other)
    finally:
        torch.set_num_threads(threads)


def changed_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_promise_2_and_4_killed_and_resumed_in_other_processes(home, environment):
    environment = environment | {"PYTHONHASHSEED": "3"}
    r = recipe("sample-nudge", {"sample-crawl": {"seconds": 1.0}}, {"sample-fold": {"share": {1: 0}}}, GRID, embedding=8, **QUICK)
    bw.run(r | {"out": "whole"})
    file = written(r)
    run = started(file, env=environment)
    wait_for(lambda: (home / ".cheaper.work" / "1-sample-crawl" / "pass-0" / "unit-0001.safetensors").exists())
    child = [pid for pid in running(home) if "blockwright.cli" in Path(f"/proc/{pid}/cmdline").read_text() and pid != run.pid]
    os.kill(child[0], signal.SIGKILL)
    run.wait()
    said = Path("log").read_text()
    assert run.returncode == 137 and f"Go on with: blockwright run {file} --resume" in said
    assert started(file, "--resume", env=environment).wait() == 0, Path("log").read_text()
    assert weights(home / "cheaper") == weights(home / "whole") and not list(home.glob(".cheaper*"))


# 4: same seed, same bits


def test_promise_4_same_seed_same_bits_whatever_ran_before(home):
    r = recipe("sample-nudge", GRID, **QUICK)
    bw.run(r)
    torch.manual_seed(5)
    torch.rand(100)
    bw.run(recipe({"sample-grid": {"bits": 3}}, **QUICK, out="something else"))
    bw.run(r | {"out": "b"})
    assert weights(home / "cheaper") == weights(home / "b")
    bw.run(r | {"out": "c", "seed": 1})
    assert weights(home / "c")["model.safetensors"] != weights(home / "b")["model.safetensors"]


# 5: inputs untouched, output only where asked


def test_promise_5_inputs_stay_and_nothing_is_written_elsewhere(home, monkeypatch):
    (home / "elsewhere").mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "BLOCKWRIGHT_CACHE", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(home / "elsewhere"))
    for path in (home / "model").iterdir():
        path.chmod(0o444)
    before, times = tree(home), {p: p.stat().st_mtime_ns for p in (home / "model").iterdir()}
    opened = []

    def hook(event, arguments):
        if event == "open" and opened is not None and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            opened.append(str(arguments[0]))

    def work():
        sys.addaudithook(hook)
        bw.run(recipe("sample-nudge", GRID, embedding=8))
        strangers = [p for p in map(os.path.abspath, opened) if not p.startswith((f"{home}/.cheaper.", "/dev/"))]
        assert not strangers, strangers

    assert in_fork(work) == 0
    after = tree(home)
    assert {k: v for k, v in after.items() if not k.startswith("cheaper")} == before
    assert times == {p: p.stat().st_mtime_ns for p in (home / "model").iterdir()}


def test_promise_5_nothing_is_fetched_unless_named(home, monkeypatch):
    def refuse(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            os._exit(9)

    def work():
        sys.addaudithook(refuse)
        bw.run(recipe("sample-nudge", GRID))

    assert in_fork(work) == 0


# 6: memory is estimated first


def test_promise_6_a_job_too_large_is_refused_at_once_with_what_would_fit(home, blockwright):
    text = {"text": "learn.txt", "num": 18, "length": 32}
    r = recipe("sample-nudge", calibration=text, memory="629.9MB")  # what the interpreter takes, and a little
    before = tree(home)
    at = time.monotonic()
    code, out, err = blockwright("run", written(r))
    assert time.monotonic() - at < 3 and code == 2 and not out.strip()
    assert err.startswith(
        "blockwright: sample-nudge: needs about 0.63 GB of memory, 0.63 GB may be used. This would fit: calibration: {num: "
    )
    assert {k: v for k, v in tree(home).items() if k != "recipe.yaml"} == before
    fits = int(err.split("calibration: {num: ")[1].split("}")[0])
    judged = int(err.split("evaluation: {num: ")[1].split("}")[0])
    smaller = r | {"calibration": text | {"num": fits}, "evaluation": {"text": "judge.txt", "num": judged, "length": 24}}
    assert 1 <= fits < 18 and blockwright("run", written(smaller))[0] == 0


def test_promise_6_what_can_never_fit_says_so(home):
    with pytest.raises(
        BlockwrightError, match=r"measuring: needs about 0.63 GB of memory, 0.10 GB may be used. Even one window of text takes 0.6"
    ):
        bw.run(recipe(memory="100MB"))
    assert not list(home.glob(".cheaper*"))


def test_promise_6_running_out_in_the_middle_keeps_the_finished_blocks(home, monkeypatch):
    from sample_stages import crawl

    calls = []

    def out_of_memory(seconds):
        calls.append(seconds)
        if len(calls) == 2:
            torch.empty(10**15)

    monkeypatch.setenv("CRAWL", "1")
    monkeypatch.setattr(crawl.time, "sleep", out_of_memory)
    r = recipe("sample-crawl", **QUICK)
    with pytest.raises(BlockwrightError, match="out cheaper: memory ran out. Free some and go on with --resume; finished blocks are kept"):
        bw.run(r)
    assert [p.name for p in (home / ".cheaper.work").rglob("unit-*")] == ["unit-0000.safetensors"]
    bw.run(r, resume=True)
    assert len(calls) == 4


# 7: NaN stops the run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_promise_7_nan_in_the_weights_is_named_and_reaches_no_file(home, blockwright, name, value):
    path = home / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[7] = value
    save_file(tensors, path, metadata={"format": "pt"})
    before = tree(home)
    code, _, err = blockwright("run", written(recipe("sample-nudge", GRID)))
    assert code == 2 and f"blockwright: {name}: {value} at [" in err and err.count("\n") == 1
    assert {k: v for k, v in tree(home).items() if k != "recipe.yaml"} == before


def test_promise_7_nan_in_activations_is_named_by_block(home, blockwright):
    path = home / "model" / "model.safetensors"
    tensors = load_file(path)
    for end in ("gate_proj", "up_proj"):  # finite, and their product overflows
        tensors[f"model.layers.1.mlp.{end}.weight"] = torch.full_like(tensors[f"model.layers.1.mlp.{end}.weight"], 3e37)
    save_file(tensors, path, metadata={"format": "pt"})
    before = tree(home)
    code, _, err = blockwright("run", written(recipe("sample-nudge", GRID)))
    assert code == 2 and "output of block model.layers.1: " in err and err.count("\n") == 1
    assert {k: v for k, v in tree(home).items() if k != "recipe.yaml"} == before


def test_promise_7_nan_made_by_a_stage_is_named_and_reaches_no_file(home):
    with pytest.raises(BlockwrightError, match=r"model\.layers\.0\.\S+ \(block model\.layers\.0\): (inf|-inf|nan) at"):
        bw.run(recipe("sample-damage", **QUICK))
    assert not (home / "cheaper").exists() and not list(home.glob(".cheaper*"))


# 8: Ctrl-C


def test_promise_8_ctrl_c_is_answered_within_a_second_with_the_line_that_resumes(home, environment):
    r = recipe("sample-nudge", {"sample-crawl": {"seconds": 3}}, GRID, **QUICK)
    file = written(r)
    run = started(file, "--out", "new folder", env=environment)
    wait_for(
        lambda: list((home / ".new folder.work").rglob("1-sample-crawl")) or (home / ".new folder.work" / "0-sample-nudge.json").exists()
    )
    time.sleep(0.3)  # inside a block
    at = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == 130 and time.monotonic() - at < 1
    said = Path("log").read_text()
    assert f"Go on with: blockwright run {file} --out 'new folder' --resume" in said and "Traceback" not in said
    wait_for(lambda: not running(home), 2)
    assert not (home / "new folder").exists()
    bw.run(r | {"out": "new folder"}, resume=True)
    bw.run(r | {"out": "whole"})
    assert weights(home / "new folder") == weights(home / "whole")


# 9: exit codes


def test_promise_9_exit_codes(home, blockwright, monkeypatch, tmp_path):
    file = written(recipe(GRID, **QUICK))
    assert blockwright("run", file)[0] == 0
    code, _, err = blockwright("run", file)
    assert (
        code == 2
        and err
        == "blockwright: out cheaper: not empty. Allowed: a new or empty folder. Use --overwrite to replace it, or name another folder.\n"
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(execute, "_run_stages", lambda *a: {}["no such key"])
    code, _, err = blockwright("run", file, "--overwrite")
    assert code == 70 and "a bug of ours (KeyError: 'no such key')" in err and "Traceback" not in err
    [report] = tmp_path.glob("blockwright-bug-*.txt")
    assert "Traceback" in report.read_text()


def test_promise_9_two_runs_into_one_folder_do_not_meet(home):
    job = execute.prepare(load_recipe(recipe(GRID, **QUICK)))
    with execute.workspace(job, resume=False, overwrite=False):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(BlockwrightError, match="out cheaper: another run is writing it. Wait for it"):
                bw.run(recipe(GRID, **QUICK), **options)


# 10: what one release writes the later ones read


@pytest.mark.parametrize("name", ["format-1-standard", "format-1-own"])
def test_promise_10_samples_of_every_format_are_read(name):
    folder = SAMPLES / name
    about = json.loads((folder / "blockwright.json").read_text())
    assert about["format"] == 1 <= export.FORMAT and json.loads((folder / "manifest.json").read_text())["format"] == 1 <= folders.FORMAT
    model = load(folder, dtype=torch.float32, fast=False)
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits[0]
    expected = load_file(SAMPLES / f"{name}.logits.safetensors")["logits"]  # written together with the folder
    assert torch.allclose(logits, expected, atol=1e-4 * expected.abs().max().item())
    if about["layout"] == "standard":
        plain, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.allclose(plain(torch.arange(8)[None]).logits[0], expected, atol=1e-4 * expected.abs().max().item())
