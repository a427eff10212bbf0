"""The wheel, installed into an empty environment, does what the checkout does."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import blockwright

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty virtual environment with the wheel; its dependencies are seen where the tests found them. Returns its bin folder."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    [site] = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(bin_folder, cwd, *arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([bin_folder / "blockwright", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_holds_what_is_needed_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n.removeprefix("blockwright/") for n in names if n.startswith("blockwright/")}
    source = {str(p.relative_to(ROOT / "src" / "blockwright")) for p in (ROOT / "src" / "blockwright").rglob("*") if p.is_file()}
    results = {f"results/{p.relative_to(ROOT / 'results')}" for p in (ROOT / "results").rglob("*") if p.is_file()}
    assert inside == {n for n in source if "__pycache__" not in n} | results
    assert {n.split("/")[0] for n in names} == {"blockwright", f"blockwright-{blockwright.__version__}.dist-info"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_it_lists_shows_and_reproduces_from_anywhere(environment, tmp_path):
    assert run(environment, tmp_path, "version").stdout.strip() == blockwright.__version__
    listed = json.loads(run(environment, tmp_path, "list", "--json").stdout)
    for row in listed:
        shipped = {p.parent.name for p in (ROOT / "results").glob(f"*/{row['slug']}.json")}
        assert set(row["results"]) == shipped
    assert {row["slug"] for row in listed} >= {"finequant"}
    said = run(environment, tmp_path, "show", "finequant").stdout
    assert re.search(r"site-packages/blockwright/compress/finequant\.py", said)
    refused = run(environment, tmp_path, "reproduce", "finequant")
    assert refused.returncode == 2 and ("--out" in refused.stderr or "no claim" in refused.stderr)


def test_it_runs_the_main_job(environment, small_job, tmp_path):
    small_job(tmp_path)
    recipe = {
        "model": "model", "stages": [{"finequant": {"bits": 4, "group_size": 32}}], "out": "cheaper",
        "calibration": {"text": "learn.txt", "num": 4, "length": 32}, "evaluation": {"text": "judge.txt", "num": 4, "length": 32},
        "measure": {"prompts": ["w1 w2"], "new_tokens": 4},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = run(environment, tmp_path, "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cheaper" / "report.json").read_text())
    assert (tmp_path / "cheaper" / "report.html").is_file() and "report.html" in done.stdout
    assert report["result"]["bytes"] < report["dense"]["bytes"] and report["versions"]["blockwright"] == blockwright.__version__
    assert not list(tmp_path.glob(".cheaper*"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cheaper", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert bool(torch.isfinite(model(torch.arange(5)[None]).logits).all())
    again = run(environment, tmp_path, "run", "recipe.yaml")
    assert again.returncode == 2 and "--overwrite" in again.stderr
    inspected = run(environment, tmp_path, "inspect", "cheaper")
    assert inspected.returncode == 0 and "int4 g32" in inspected.stdout
