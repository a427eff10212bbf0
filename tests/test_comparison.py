"""The comparison at equal size: its recipes are ones that can be run, and its numbers are those of its rows."""

import pytest

from blockwright import registry
from blockwright.claims import comparison
from blockwright.recipes.recipe import option_model

EVERY = [(group, name) for group, runs in comparison.RUNS.items() for name in runs]


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_its_stages_and_options_exist(group, name):
    for stage in comparison.RUNS[group][name]:
        [(slug, options)] = stage.items()
        option_model(registry.method(slug)).model_validate(options)


def rows(peer: bool) -> list[dict]:
    made = [{"size": "bf16", "model": "dense", "MB": 269.0, "perplexity": 20.0}]
    for group, size, nearest, learned in (("4 bits", 113.0, 28.0, 22.0), ("3 bits", 100.0, 160.0, 24.0)):
        made += [
            {"size": group, "model": "nearest", "MB": size, "perplexity": nearest, "seconds": 9.0, "over its passes": 0.5},
            {"size": group, "model": "flexround", "MB": size * 1.01, "perplexity": learned, "seconds": 90.0, "over its passes": 2.5},
        ]
        made += [{"size": group, "model": comparison.PEER, "MB": size, "perplexity": 25.0, "seconds": 99.0}] if peer else []
    return made


def test_the_peer_is_the_rival_where_it_is_installed():
    claim = comparison._claim(rows(peer=True), 2.0)
    assert claim.measured == pytest.approx(22 / 25) and claim.parts[0].measured == pytest.approx(24 / 25)
    alone = comparison._claim(rows(peer=False), 2.0)
    assert alone.measured == pytest.approx(22 / 28) and alone.parts[0].measured == pytest.approx(24 / 160)
    assert any("make peers" in note for note in alone.notes) and not any("make peers" in note for note in claim.notes)


def test_sizes_and_times_are_held_against_their_targets():
    apart, slowest = comparison._claim(rows(peer=True), 2.0).parts[1:]
    assert apart.measured == pytest.approx(0.01) and apart.met
    assert slowest.measured == 2.5 and slowest.target == 3.0 and slowest.met
