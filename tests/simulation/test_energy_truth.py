"""The real meter, fed with simulated machines: every published figure against the truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.energy_world.__main__ import FIRST_SEED, Tally
from tests.energy_world.driver import drive
from tests.energy_world.judge import Judge
from tests.energy_world.machine import KINDS
from tests.energy_world.world import World

SEEDS = range(1_000, 1_042)
"""Of `make test`; besides, there are three histories for each kind of machine."""
LENGTH_S = 90.0
"""Of each of these. Those of `make test-long` have 60 to 300 s."""


def judged(tally: Tally) -> None:
    assert not tally.wrong
    assert not tally.too_low()
    error_j, systematic_j, chance_j = tally.bias()
    assert abs(error_j) <= systematic_j + chance_j


@pytest.mark.timeout(1200)
def test_published_figures_contain_the_truth() -> None:
    """Intervals of every kind of window, label and machine contain the truth in 95 % of cases; `measured` ones always.

    Prompts and idle time are their lease, the wrappers' parts are the machine, and no moment is counted twice.
    """
    tally = Tally()
    for seed in SEEDS:
        tally.add(seed, horizon_s=LENGTH_S)
    for kind in KINDS:
        for seed in range(3):
            tally.add(seed, kind, LENGTH_S)
    judged(tally)
    assert len(tally.equal) > 200
    for figure in ("prompt", "idle", "lease", "load", "batch J/token"):
        assert tally.by_figure[figure, "measured"].held > 50  # what is never known is never wrong


def test_counter_that_shows_too_little_is_flagged(tmp_path: Path) -> None:
    """No interval can contain the truth if the GPU's counter shows half of the power under load: windows say so."""
    with World(3, "low_counter", horizon_s=240.0) as world:
        judge = Judge(drive(world, tmp_path))
    late = [finding for finding in judge.findings if finding.figure == "lease"][-1:]
    assert [finding.holds for finding in late] == [False]
    assert all("counter_disagrees" in finding.flags for finding in late)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_thousand_histories() -> None:
    """The same for 2,000 histories, as in docs/measurements.md."""
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + 2_000):
        tally.add(seed)
    judged(tally)
