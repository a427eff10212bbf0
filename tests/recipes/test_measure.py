"""The judge gives what transformers gives on the whole model, and what is said of using a folder is what happens there."""

import math
from shutil import copytree

import pytest
import torch
from jobs import recipe
from sample_stages.fold import sample_fold
from sample_stages.grid import sample_grid
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import blockwright as bw
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.errors import BlockwrightError
from blockwright.meter import Spread
from blockwright.recipes import measure
from blockwright.recipes.measure import Judge

IDS = torch.randint(0, 92, (5, 17), generator=torch.Generator().manual_seed(3))


def treated(folder, *stages):
    run = Run(Blueprint.of_folder(folder))
    for stage, options in stages:
        run.begin(stage.__name__)
        stage(run, **options)
    return run.model


def log_probabilities(model):
    """fp64 log-probabilities of the predictions of IDS, from the whole model at once."""
    with torch.no_grad():
        return model(IDS).logits.double().log_softmax(-1)[:, :-1]


def by_hand(ours, dense):
    """The same numbers from the definitions, over all predictions."""
    nll = -ours.gather(-1, IDS[:, 1:, None]).mean().item()
    kl = (dense.exp() * (dense - ours)).sum(-1).mean().item()
    top1 = (ours.argmax(-1) == dense.argmax(-1)).double().mean().item()
    return {"nll": nll, "perplexity": math.exp(nll), "kl": kl, "top1": top1, "tokens": float(IDS[:, 1:].numel())}


@pytest.mark.parametrize(
    "stages",
    [
        [(sample_grid, {"bits": 3})],
        [(sample_fold, {"drop": [1]})],
        [(sample_fold, {"drop": [0], "share": {1: 0}}), (sample_grid, {"bits": 2, "symmetric": False})],
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_quality_is_that_of_the_whole_model_in_transformers(home, stages, batch):
    dense = log_probabilities(AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32))
    model = treated(home / "model", *stages)
    ours = log_probabilities(model.build(dtype=torch.float32))
    judge = Judge(Blueprint.of_folder(home / "model"), IDS, batch=batch)
    assert judge.quality(model) == pytest.approx(by_hand(ours, dense), rel=1e-5, abs=1e-6)
    own = judge.quality(judge.dense)
    assert own == pytest.approx({k: v for k, v in by_hand(dense, dense).items() if k in own}, rel=1e-5) and "perplexity" in own


def test_a_copy_of_the_dense_model_has_no_distance_to_it(home):
    copytree("model", "copy")
    judge = Judge(Blueprint.of_folder(home / "model"), IDS)
    copy = judge.quality(Blueprint.of_folder(home / "copy"))
    assert (copy["kl"], copy["top1"]) == (0, 1) and copy["perplexity"] == judge.quality(judge.dense)["perplexity"]


def test_the_hidden_states_can_be_given_back(home):
    dense = Blueprint.of_folder(home / "model")
    judge = Judge(dense, IDS)
    again = Judge(dense, IDS, hidden=judge.hidden)
    model = treated(home / "model", (sample_grid, {"bits": 4}))
    assert again.quality(model) == judge.quality(model)
    assert Judge(dense, IDS, hidden=2 * judge.hidden).quality(dense) != judge.quality(dense)


def gemma(folder):
    """A small model whose blocks are sliding and global in turn."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=92, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return Blueprint.of_folder(folder)


def test_blocks_that_get_different_arguments_are_judged_alike(tmp_path):
    """Gemma passes other masks and rotary tables to its sliding blocks than to its global ones."""
    gemma(tmp_path)
    dense = log_probabilities(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    model = treated(tmp_path, (sample_grid, {"bits": 4, "group_size": 16}))
    ours = log_probabilities(model.build(dtype=torch.float32))
    got, expected = Judge(Blueprint.of_folder(tmp_path), IDS).quality(model), by_hand(ours, dense)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


# the error of each block


def test_blocks_keep_their_own_arguments_where_others_were_dropped(tmp_path):
    dense = gemma(tmp_path)
    errors = Judge(dense, IDS).block_errors(dense.with_layers([0, 2, 3]))  # the sliding block 2 stands now where a global one stood
    assert errors == {0: 0, 1: 1, 2: 0, 3: 0}


def test_an_untouched_block_has_no_error_and_a_dropped_one_has_1(home):
    dense = Blueprint.of_folder(home / "model")
    judge = Judge(dense, IDS)
    assert judge.block_errors(dense) == {0: 0, 1: 0, 2: 0}
    assert judge.block_errors(dense.with_layers([0, 2])) == {0: 0, 1: 1, 2: 0}
    part = treated(home / "model", (sample_grid, {"targets": ["model.layers.1"]}))
    errors = judge.block_errors(part)
    assert errors[0] == errors[2] == 0 and 0 < errors[1] < 0.1


def test_the_error_of_a_block_is_taken_on_the_dense_models_own_inputs(home):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    with torch.no_grad():
        states = model(IDS[:2], output_hidden_states=True).hidden_states[:2]  # before block 0, before block 1
        x, y = states
    rounded = treated(home / "model", (sample_grid, {"bits": 2}))
    other = rounded.build(dtype=torch.float32)
    with torch.no_grad():
        mine = other(IDS[:2], output_hidden_states=True).hidden_states[1]
    expected = ((mine - y).square().sum() / (y - x).square().sum()).item()
    errors = Judge(Blueprint.of_folder(home / "model"), IDS).block_errors(rounded)
    assert errors[0] == pytest.approx(expected, rel=1e-5)
    alone = treated(home / "model", (sample_grid, {"bits": 2, "ignore": ["model.layers.0", "model.layers.1"]}))
    assert Judge(Blueprint.of_folder(home / "model"), IDS).block_errors(alone)[2] == errors[2]  # whatever became of the blocks before it


# using a folder


def test_use_tells_what_the_model_writes_how_fast_and_with_how_much_memory(home):
    bw.run(recipe({"finequant": {"bits": 8, "group_size": 32}}, dtype="bf16"))
    prompts = ["w1 w2 w3", "w40"]
    used = measure.use(home / "cheaper", prompts, new_tokens=6, repeats=1)
    assert used.keys() == {"tokens_per_second", "peak_memory", "samples"}
    model, tokenizer = bw.load("cheaper"), AutoTokenizer.from_pretrained("cheaper")
    for prompt, sample in zip(prompts, used["samples"], strict=True):
        ids = tokenizer(prompt + " ", return_tensors="pt").input_ids  # what the chat template makes of it
        out = ids
        for _ in range(6):
            with torch.no_grad():
                out = torch.cat([out, model(out).logits[:, -1:].argmax(-1)], 1)
            if out[0, -1] == tokenizer.eos_token_id:
                break
        assert sample == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert 1 < used["tokens_per_second"] < 1e5 and 1e6 < used["peak_memory"] < 1e9


def test_speed_is_tokens_over_seconds_and_memory_what_the_model_adds(home, monkeypatch):
    marks = iter([100, 350])
    monkeypatch.setattr(measure.meter, "high_water", lambda: next(marks))
    monkeypatch.setattr(measure.meter, "time", lambda fn, *, repeats, warmup: fn() or Spread(2.0, 1.0, 3.0))
    model = AutoModelForCausalLM.from_pretrained("model")
    model.lm_head.weight.data.zero_()  # writes <unk> for ever, which is not shown
    model.save_pretrained("model")
    used = measure._use({"folder": str(home / "model"), "prompts": ["w1"], "new_tokens": 6, "repeats": 1})
    assert used == {"tokens_per_second": 3.0, "peak_memory": 250, "samples": [""]}


@pytest.mark.parametrize(
    "script, said", [("echo first >&2; echo why >&2; exit 3", "why"), ("exit 3", "exit code 3"), ("kill -9 $$", "exit code -9")]
)
def test_a_folder_that_cannot_be_used_is_told(tmp_path, monkeypatch, script, said):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(measure.sys, "executable", str(python))
    with pytest.raises(BlockwrightError, match=rf"somewhere: could not be used \({said}\). Open it with bw.load to see more"):
        measure.use(tmp_path / "somewhere", ["x"])
