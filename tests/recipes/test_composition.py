"""Stages compose: any two work, whole and reloaded, or the second is refused with a reason."""

import pytest
import torch

from blockwright.claims import composition

STAGES = composition.stages()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composition")
    composition.write_small_model(folder)
    return folder


@pytest.mark.parametrize("then", STAGES)
@pytest.mark.parametrize("first", STAGES)
def test_two_stages_work_or_are_refused_with_a_reason(scratch, first, then):
    outcome = composition.outcome(scratch, [first, then])
    assert outcome == composition.WORKS or outcome.startswith("refused: ")
    assert [p.name for p in scratch.iterdir() if p.is_dir()] == ["model"]


@pytest.mark.parametrize("stages", [["cfsp", "flexround"], ["foldgpt", "dsnot", "finequant"], ["dsnot", "cfsp", "flexround"]])
def test_stages_that_belong_together_work(scratch, stages):
    assert composition.outcome(scratch, stages) == composition.WORKS


def test_a_stage_that_crashes_or_gives_no_numbers_counts_as_failed(scratch, monkeypatch):
    monkeypatch.setattr(composition.blockwright, "run", lambda recipe: 1 / 0)
    assert composition.outcome(scratch, ["finequant"]) == "failed: ZeroDivisionError: division by zero"
    monkeypatch.setattr(composition.blockwright, "run", lambda recipe: None)

    def model(ids):
        return type("Out", (), {"logits": torch.full((1, 16, 91), torch.nan)})

    monkeypatch.setattr(composition.blockwright, "load", lambda folder: model)
    assert composition.outcome(scratch, ["finequant"]) == "failed: logits that are not finite"
