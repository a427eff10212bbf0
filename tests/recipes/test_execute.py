"""The main job on a small model: what stands in the folder, and that the numbers told are those of the folder."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jobs import recipe, tree, written
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import blockwright as bw
from blockwright import cli
from blockwright.blocks import folders
from blockwright.blocks.layers import Blueprint
from blockwright.errors import BlockwrightError
from blockwright.recipes import execute, export, measure, outcome
from blockwright.recipes.load import open_folder
from blockwright.recipes.plan import estimate, parse_bytes, plan
from blockwright.recipes.prepare import prepare
from blockwright.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[2]
GRID = {"sample-grid": {"bits": 4, "group_size": 32}}
SIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
OURS = {"config.json", "blockwright.json", "manifest.json", "report.json", "report.html", "README.md"}


def tensor_bytes(folder):
    return sum(t.numel() * t.element_size() for path in folder.glob("*.safetensors") for t in load_file(path).values())


# the folder


def test_a_run_leaves_a_whole_folder_and_nothing_beside_it(home, blockwright):
    before = tree(home)
    code, out, err = blockwright("run", written(recipe(GRID)))
    assert (code, err) == (0, "") and "cheaper/report.html" in out and "perplexity" in out
    folder = home / "cheaper"
    assert {p.name for p in folder.iterdir()} == SIDE | OURS | {"model.safetensors"}
    folders.verify(folder)
    named = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(named) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for name in SIDE:
        assert (folder / name).read_bytes() == (home / "model" / name).read_bytes()
    about = json.loads((folder / "blockwright.json").read_text())
    assert (about["format"], about["layout"], about["seed"], about["model"]) == (1, "standard", 0, "model")
    assert [s["name"] for s in about["stages"]] == ["sample-grid"] and about["stages"][0]["options"]["bits"] == 4
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["blockwright"] == bw.__version__
    after = {k: v for k, v in tree(home).items() if not k.startswith("cheaper") and k != "recipe.yaml"}
    assert after == before  # the inputs, and nothing of ours beside the folder


def test_python_and_the_command_line_do_the_same(home, blockwright):
    assert blockwright("run", written(recipe("sample-nudge", GRID)))[0] == 0
    made = bw.run(recipe("sample-nudge", GRID, out="other"))
    for name in ("model.safetensors", "config.json", "blockwright.json"):
        assert (home / "cheaper" / name).read_bytes() == (home / "other" / name).read_bytes()
    assert json.loads((home / "other" / "report.json").read_text()) == json.loads(json.dumps(made))


def test_the_report_tells_what_the_folder_holds(home):
    made = bw.run(recipe("sample-nudge", {"sample-fold": {"drop": [1], "share": {1: 0}}}, GRID, embedding=8))
    folder = home / "cheaper"
    assert made["result"]["layout"] == "blockwright" and made["result"]["opens_with"] == "blockwright: bw.load"
    assert made["result"]["bytes"] == (folder / "blockwright.safetensors").stat().st_size
    dense = AutoModelForCausalLM.from_pretrained("model")
    parameters = sum(p.numel() for p in dense.parameters())
    assert made["model"]["parameters"] == parameters and made["dense"]["bytes"] == 2 * parameters == made["model"]["bf16_bytes"]
    assert made["model"]["source_bytes"] == (home / "model" / "model.safetensors").stat().st_size
    assert made["model"]["architecture"] == "LlamaForCausalLM"
    stages = made["stages"]
    assert [s["name"] for s in stages] == ["sample-nudge", "sample-fold", "sample-grid"] and stages[2]["options"]["bits"] == 4
    assert len(stages[0]["curves"]["loss"]) == 6 and stages[2]["curves"] is None
    assert stages[0]["bytes"] == 4 * parameters > stages[1]["bytes"] > stages[2]["bytes"] > tensor_bytes(folder)
    assert [w for w in made["warnings"] if "Plain transformers cannot open this folder: model.embed_tokens is packed embedding" in w]
    assert math.isclose(made["result"]["perplexity"], stages[2]["perplexity"], rel_tol=0.05)  # they differ by the embedding's 8 bits
    assert yaml.safe_load(made["recipe"])["embedding"] == 8
    assert made["seconds"] > 0 and made["seed"] == 0 and made["machine"]["threads"] == torch.get_num_threads()


def test_the_block_table_adds_up_to_the_files(home):
    made = bw.run(recipe({"sample-fold": {"drop": [1], "share": {1: 0}}}, {"sample-grid": {"ignore": ["o_proj"]}}, embedding=4))
    rows = {row["name"]: row for row in made["blocks"]}
    assert rows.keys() == {"embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head"}
    assert sum(r["bytes_after"] for r in rows.values()) == tensor_bytes(home / "cheaper")
    assert sum(r["bytes_before"] for r in rows.values()) == made["dense"]["bytes"]
    assert rows["layers.1"]["treatment"] == ["dropped"] and rows["layers.1"]["error"] == 1 and rows["layers.1"]["bytes_after"] == 0
    assert rows["layers.0"]["treatment"] == ["int4 g32"] and "shared" in rows["layers.2"]["treatment"]
    assert rows["embed_tokens"]["treatment"] == ["int4 g64"] and rows["norm"]["treatment"] == ["dense"] and rows["lm_head"]["error"] is None
    parts = {p["name"]: p for p in rows["layers.0"]["parts"]}
    assert parts["mlp.up_proj"]["shape"] == [96, 64] and parts["mlp.up_proj"]["bits"] == pytest.approx(5 + 16 * 8 / (96 * 64))
    assert parts["self_attn.o_proj"]["treatment"] == "dense" and parts["self_attn.o_proj"]["sparsity"] == 0
    for row in rows.values():
        assert row["bytes_after"] == sum(p["bytes_after"] for p in row["parts"])


def test_a_tied_head_is_counted_and_packed_once(home):
    config = AutoConfig.from_pretrained("model", tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    made = bw.run(recipe(GRID, embedding=8))
    assert {row["name"] for row in made["blocks"]} == {"embed_tokens", "layers.0", "layers.1", "layers.2", "norm"}
    assert sum(row["bytes_before"] for row in made["blocks"]) == made["dense"]["bytes"] == 2 * made["model"]["parameters"]
    assert (
        sum(row["bytes_after"] for row in made["blocks"])
        == tensor_bytes(home / "cheaper")
        == plan(load_recipe(recipe(GRID, embedding=8)))["bytes"]
    )
    assert made["result"]["kl"] < 0.01


def test_what_was_pruned_is_shown(home):
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained("pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "pruned" / name).write_bytes((home / "model" / name).read_bytes())
    made = bw.run(recipe(model="pruned"))
    row = next(r for r in made["blocks"] if r["name"] == "layers.0")
    part = next(p for p in row["parts"] if p["name"] == "mlp.up_proj")
    assert part["sparsity"] == 0.5 and part["treatment"] == "50% zeros" and row["treatment"] == ["50% zeros"]
    assert row["sparsity"] == pytest.approx(
        0.5 * part["bytes_before"] / sum(p["bytes_before"] for p in row["parts"] if p["sparsity"] is not None), rel=0.05
    )


def test_the_numbers_are_those_of_the_folder_as_written(home):
    made = bw.run(recipe({"sample-grid": {"bits": 3}}))
    ids = prepare(load_recipe(recipe())).evaluation
    with torch.no_grad():
        ours = bw.load("cheaper", dtype=torch.float32, fast=False)(ids).logits.double().log_softmax(-1)[:, :-1]
        dense = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)(ids).logits.double().log_softmax(-1)[:, :-1]
    targets = ids[:, 1:, None]
    assert made["result"]["perplexity"] == pytest.approx(math.exp(-ours.gather(-1, targets).mean()), rel=1e-5)
    assert made["dense"]["perplexity"] == pytest.approx(math.exp(-dense.gather(-1, targets).mean()), rel=1e-5)
    assert made["result"]["kl"] == pytest.approx(float((dense.exp() * (dense - ours)).sum(-1).mean()), rel=1e-3)
    assert made["result"]["top1"] == pytest.approx(float((dense.argmax(-1) == ours.argmax(-1)).double().mean()))


def test_a_model_card_tells_how_it_was_made_and_how_to_open_it(home, blockwright):
    file = written(recipe(GRID, embedding=8))
    Path(file).write_text(Path(file).read_text() + "  # a remark\n")
    assert blockwright("run", file)[0] == 0
    text = (home / "cheaper" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"tags": ["blockwright", "sample-grid"], "pipeline_tag": "text-generation"}
    report = json.loads((home / "cheaper" / "report.json").read_text())
    assert "    " + Path(file).read_text().strip() in text and "# a remark" in text
    assert 'bw.load("this folder")' in text and "Plain transformers cannot open" in text and "see `LICENSE`" in text
    assert f"| perplexity | {report['dense']['perplexity']:.4g} | {report['result']['perplexity']:.4g} |" in text
    assert f"| bytes | {report['dense']['bytes']:,} | {report['result']['bytes']:,} |" in text
    (home / "model" / "LICENSE").unlink()
    bw.run(recipe(GRID, out="standard"))
    text = (home / "standard" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers" and "cannot open" not in text and "licence" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("this folder", str(home / "standard"))
    made: dict[str, object] = {}
    exec(code, made)
    assert type(made["model"]).__name__ == "LlamaForCausalLM"


def test_no_stage_at_all_is_a_copy(home):
    made = bw.run(recipe(dtype="fp32"))
    a, b = load_file(home / "model" / "model.safetensors"), load_file(home / "cheaper" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert made["result"]["kl"] == 0 and made["result"]["top1"] == 1 and made["title"] == "model: unchanged"
    assert all(row["error"] in (0, None) for row in made["blocks"])


def test_what_is_not_measured_is_left_out(home):
    made = bw.run(recipe(GRID, measure={"use": False, "quality": False, "blocks": False}))
    assert made["result"]["perplexity"] is None and made["samples"] == [] and made["dense"]["tokens_per_second"] is None
    assert {row["error"] for row in made["blocks"]} == {None}


def test_use_is_measured_for_both_and_a_failure_there_loses_no_model(home, monkeypatch):
    wanted = {"prompts": ["w1", "w2 w3"], "new_tokens": 3}
    used = []

    def use(folder, prompts, *, new_tokens):
        used.append((Path(folder).name, prompts, new_tokens))
        if len(used) == 4:
            raise BlockwrightError("cheaper: could not be used")
        return {"tokens_per_second": 7.0 * len(used), "peak_memory": 10, "samples": [f"{len(used)} a", f"{len(used)} b"]}

    monkeypatch.setattr(measure, "use", use)
    made = bw.run(recipe(GRID, measure=wanted))
    assert used[0] == ("model", ["w1", "w2 w3"], 3) and used[1][1:] == (["w1", "w2 w3"], 3)
    assert (made["dense"]["tokens_per_second"], made["result"]["tokens_per_second"]) == (7, 14)
    assert made["samples"] == [{"prompt": "w1", "dense": "1 a", "result": "2 a"}, {"prompt": "w2 w3", "dense": "1 b", "result": "2 b"}]
    made = bw.run(recipe(GRID, measure=wanted, out="second"))
    assert (
        "Speed, memory and samples are missing: cheaper: could not be used." in made["warnings"]
        and (home / "second" / "README.md").exists()
    )
    assert made["samples"] == [] and made["result"]["perplexity"] > 1


def test_the_real_thing_in_a_process_of_its_own(home, environment):
    r = recipe("sample-nudge", {"finequant": {"group_size": 32}}, measure={"prompts": ["w1 w2"], "new_tokens": 5}, dtype="bf16")
    done = subprocess.run(
        [sys.executable, "-m", "blockwright.cli", "run", written(r)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    report = json.loads((home / "cheaper" / "report.json").read_text())
    assert report["dense"]["tokens_per_second"] > 0 and report["result"]["peak_memory"] > 0 and not report["warnings"]
    [sample] = report["samples"]
    words = re.compile(r"(w\d+ ?)+")
    assert sample["prompt"] == "w1 w2" and words.fullmatch(sample["dense"]) and words.fullmatch(sample["result"])
    said = " ".join(done.stdout.split())
    assert "measuring the dense model" in said and "0-sample-nudge pass 1" in said and "1-finequant pass 1" in said
    assert "after stage" in said and "smaller" in said and "tokens/s" in said
    assert set(SIDE | OURS) < {p.name for p in (home / "cheaper").iterdir()} and not list(home.glob(".cheaper*"))


def test_an_architecture_with_another_linear_and_positions(home, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=92, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gpt2" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    made = bw.run(recipe("sample-nudge", GRID, model="gpt2"))
    assert made["result"]["layout"] == "blockwright" and "packed Conv1D" in made["warnings"][0]
    assert made["result"]["perplexity"] == pytest.approx(made["stages"][1]["perplexity"], rel=1e-5)
    with pytest.raises(BlockwrightError, match=r"evaluation: length=65. Allowed: up to 64, the positions that the model has"):
        bw.run(recipe(GRID, model="gpt2", out="b", evaluation={"text": "judge.txt", "num": 1, "length": 65}))


FINE = {"finequant": {"bits": 4, "group_size": 32}}
LEARNED = {"flexround": {"bits": 3, "group_size": 32, "iters": 2}}
FOLD = {"remove": 0.34, "gate_steps": 2}
SHARE = FOLD | {"remove": 0.0, "group_size": 2}


@pytest.mark.parametrize(
    "stages, options, layout",
    [
        (["dsnot"], {}, "standard"),
        ([{"dsnot": {"mask_structure": "2:4"}}, FINE], {}, "standard"),
        ([LEARNED], {}, "standard"),
        (["dsnot", {"flexround": LEARNED["flexround"] | {"symmetric": False}}], {}, "standard"),
        ([{"foldgpt": FOLD}, FINE], {}, "standard"),
        ([{"foldgpt": FOLD}, "dsnot", LEARNED], {"embedding": 8}, "blockwright"),
        ([{"foldgpt": SHARE}, FINE], {}, "blockwright"),
        ([{"foldgpt": SHARE}, FINE], {"export": "unrolled"}, "standard"),
        ([{"foldgpt": SHARE | {"cure_steps": 2}}], {"export": "dense"}, "standard"),
    ],
    ids=str,
)
def test_the_stages_go_together(home, stages, options, layout):
    made = bw.run(recipe(*stages, **options))
    assert made["result"]["layout"] == layout and len(made["stages"]) == len(stages)
    if "embedding" not in options:  # what was written is what the last stage left
        assert made["result"]["perplexity"] == pytest.approx(made["stages"][-1]["perplexity"], rel=1e-4)
    assert made["result"]["kl"] > 0 and made["stages"][-1]["bytes"] <= 4 * made["model"]["parameters"]
    dropped = [row["name"] for row in made["blocks"] if row["treatment"] == ["dropped"]]
    assert len(dropped) == any("foldgpt" in s and s["foldgpt"]["remove"] for s in stages if not isinstance(s, str))
    if layout == "standard":
        _, info = AutoModelForCausalLM.from_pretrained("cheaper", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = bw.load("cheaper", dtype=torch.float32)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > 3


# the plan


def test_a_dry_run_tells_memory_time_and_bytes_and_writes_nothing(home, blockwright):
    file = written(recipe("sample-nudge", GRID, embedding=8))
    before = tree(home)
    code, out, err = blockwright("run", file, "--dry-run")
    said = " ".join(out.split())
    assert (code, err) == (0, "") and tree(home) == before
    assert re.search(
        r"step memory time bits a weight sample-nudge \d\.\d\d GB \d+ s 32\.00 sample-grid \d\.\d\d GB \d+ s 5\.00 measuring", said
    )
    assert re.search(r"in all: \d\.\d\d GB of memory, about \d+ s; 0\.1 MB of weights, \d+% of bf16, in cheaper", said)


@pytest.mark.parametrize(
    "stages, options",
    [
        ([], {}),
        ([], {"dtype": "bf16"}),
        ([GRID], {}),
        ([GRID], {"embedding": 8}),
        ([GRID], {"embedding": 5, "dtype": "fp16"}),
        ([{"sample-grid": {"bits": 3, "group_size": 16, "overrides": {"down_proj": {"bits": 8}, "q_proj": {"group_size": 32}}}}], {}),
        ([{"sample-grid": {"bits": 8, "ignore": ["v_proj", "model.layers.1"]}}], {"dtype": "bf16"}),
        ([{"sample-grid": {"targets": ["re:mlp"]}}], {}),
        ([GRID], {"export": "dense", "dtype": "bf16"}),
        ([{"finequant": {"bits": 4, "group_size": 32, "overrides": {"re:down": {"bits": 8}}}}], {"embedding": 8, "dtype": "bf16"}),
        ([{"finequant": {"bits": 8, "group_size": -1, "overrides": {"re:down": {"group_size": 32, "scale_dtype": "fp32"}}}}], {}),
        ([{"flexround": {"iters": 1, "strategy": "channel"}}], {}),
        ([{"flexround": {"iters": 1, "bits": 8, "group_size": -1, "symmetric": False, "scale_dtype": "fp32"}}], {}),
        ([{"flexround": {"iters": 1, "strategy": "tensor", "symmetric": False}}], {}),
    ],
)
def test_the_bytes_of_the_plan_are_those_written(home, stages, options):
    r = recipe(*stages, **options, measure={"use": False, "quality": False, "blocks": False})
    told = plan(load_recipe(r))
    bw.run(r)
    assert told["bytes"] == tensor_bytes(home / "cheaper")
    assert (
        told["parameters"] == sum(t.numel() for t in load_file("model/model.safetensors").values())
        and told["bf16_bytes"] == 2 * told["parameters"]
    )
    job = prepare(load_recipe(r))
    assert export.predicted_bytes(job.dense, torch.float32) == 4 * told["parameters"]


def test_the_plan_grows_with_text_and_model(home):
    small, long = (plan(load_recipe(recipe("sample-nudge", calibration={"text": "learn.txt", "num": n, "length": 32}))) for n in (2, 16))
    assert long["stages"][0]["memory"] - small["stages"][0]["memory"] == 3 * 14 * 32 * 64 * 4
    assert long["stages"][0]["seconds"] > small["stages"][0]["seconds"]
    assert small["memory"] == max(small["stages"][0]["memory"], small["measuring"]["memory"])
    assert small["seconds"] == pytest.approx(small["stages"][0]["seconds"] + small["measuring"]["seconds"])


def test_a_stage_that_holds_the_model_and_drops_blocks_says_so_in_its_plan(home, monkeypatch):
    from sample_stages import fold

    plain = plan(load_recipe(recipe("sample-fold")))
    monkeypatch.setattr(fold, "plan", lambda **options: {"copies": 1, "passes": 0, "bits": None, "resident": 2, "layers": 0.5})
    held = plan(load_recipe(recipe("sample-fold")))
    in_blocks = sum(t.numel() for n, t in load_file("model/model.safetensors").items() if "layers." in n)
    assert held["stages"][0]["memory"] - plain["stages"][0]["memory"] == 2 * 4 * in_blocks
    assert plain["bytes"] - held["bytes"] == 4 * in_blocks // 2


@pytest.mark.parametrize("text, expected", [("8GB", 8e9), ("500 MB", 5e8), ("2GiB", 2**31), ("1.5KiB", 1536), ("640kb", 640_000)])
def test_bytes_are_parsed(text, expected):
    assert parse_bytes(text) == expected


def test_bytes_without_sense_are_told():
    with pytest.raises(BlockwrightError, match=r"memory: '8 TB'"):
        parse_bytes("8 TB")


# the parts


def test_the_embedding_is_packed_once_for_both_of_its_places(home):
    model = Blueprint.of_folder(home / "model")
    packed = execute.pack_embedding(model, 8)
    assert set(packed.forms) == {"model.embed_tokens"} and "lm_head.weight" in packed.tensors  # two matrices: the head stays
    expected = model.tensors.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    got = packed.build(dtype=torch.float32).model.embed_tokens(torch.arange(92))
    step = expected.abs().amax(1, keepdim=True) * 2 / 255
    assert ((got - expected).abs() <= 0.51 * step + 0.01 * expected.abs()).all() and not torch.equal(got, expected)


def test_versions_are_told_even_where_a_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(outcome, "VERSIONS", ("torch", "no-such-package"))
    assert outcome.versions().keys() == {"python", "torch", "no-such-package"} and outcome.versions()["no-such-package"] == "source"


def test_a_folder_of_ours_is_not_run_again(home):
    bw.run(recipe(GRID))
    with pytest.raises(BlockwrightError, match=r"cheaper: already quantised"):
        bw.run(recipe(GRID, model="cheaper", out="b"))
    bw.run(recipe({"sample-fold": {"share": {1: 0}}}, out="own"))
    with pytest.raises(BlockwrightError, match=r"own: no weights found"):
        bw.run(recipe(GRID, model="own", out="b"))
    assert open_folder(home / "own").origin == () and estimate(prepare(load_recipe(recipe())))["bytes"] > 0


def test_the_tokenizer_of_the_folder_is_the_models(home):
    bw.run(recipe(GRID))
    a, b = (AutoTokenizer.from_pretrained(home / name) for name in ("model", "cheaper"))
    text = "w3 w7 nothing w89"
    assert a(text).input_ids == b(text).input_ids and a.chat_template == b.chat_template is not None


# the first screen


def test_the_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    first = "\n".join(text.splitlines()[:40])
    assert {"demo", "test"} <= set(re.findall(r"^    make (\w+)", first, re.MULTILINE))
    targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)\b +#", text)) <= set(targets)
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert set(re.findall(r"^    blockwright (\w+)", text, re.MULTILINE)) <= commands
    shipped = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.yaml")}
    assert set(re.findall(r"examples/[\w-]+\.yaml", text)) <= shipped and "examples/demo.yaml" in shipped
    for name in shipped:
        assert load_recipe(ROOT / name).out.parts[0] == "out"
    assert "blockwright run examples/demo.yaml" in (ROOT / "Makefile").read_text()


def test_the_threads_of_the_recipe_are_used(home):
    before = torch.get_num_threads()
    try:
        assert bw.run(recipe(threads=before + 1))["machine"]["threads"] == before + 1
    finally:
        torch.set_num_threads(before)
