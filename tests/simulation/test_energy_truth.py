"""Every published figure of the real meter, on simulated machines, against the truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.energy_world.__main__ import FIRST_SEED, Tally
from tests.energy_world.driver import drive
from tests.energy_world.judge import Judge
from tests.energy_world.machine import KINDS
from tests.energy_world.world import EnergyWorld

SEEDS, LONG_SEEDS = range(1_000, 1_010), range(1_010, 1_042)
"""Numbers of random histories in `make test` and in `make test-long`.

In addition, each kind of machine has one history in `make test`, and three in `make test-long`.
"""
LENGTH_S = 90.0
"""Length of each of these histories, seconds. Histories of `python -m tests.energy_world` have 60 to 300 s."""


def judged(tally: Tally) -> None:
    assert not tally.wrong
    assert not tally.too_low()
    error_j, systematic_j, chance_j = tally.bias()
    assert abs(error_j) <= systematic_j + chance_j


@pytest.mark.slow
@pytest.mark.no_cover  # counting lines takes longer than the simulation; other tests cover what it runs
@pytest.mark.timeout(1200)
def test_published_figures_contain_the_truth() -> None:
    """For every kind of window, label and machine, the bounds contain the truth in at least 95 % of cases.

    Bounds of `measured` figures always contain it.

    Prompts and idle time add up to their lease, the wrappers' parts to the machine, and no moment is counted twice.
    """
    contain_the_truth(SEEDS, of_each_kind=1)


@pytest.mark.long
@pytest.mark.no_cover
@pytest.mark.timeout(1200)
def test_more_published_figures_contain_the_truth() -> None:
    """The same, for more histories."""
    contain_the_truth(LONG_SEEDS, of_each_kind=3)


def contain_the_truth(seeds: range, *, of_each_kind: int) -> None:
    tally = Tally()
    for seed in seeds:
        tally.add(seed, horizon_s=LENGTH_S)
    for kind in KINDS:
        for seed in range(of_each_kind):
            tally.add(seed, kind, LENGTH_S)
    judged(tally)
    assert len(tally.equal) > 4 * len(seeds)
    for figure in ("prompt", "idle", "lease", "load", "batch J/token"):
        assert tally.by_figure[figure, "measured"].held >= len(seeds) // 2  # enough figures are known to be checked


def test_counter_that_shows_too_little_measures_nothing(tmp_path: Path) -> None:
    """If a check finds that the GPU's counter shows only 50 to 70 % of the power, no later lease is `measured`.

    These leases are flagged, and their bounds contain the truth.
    """
    with EnergyWorld(3, "low_counter", horizon_s=240.0) as world:
        leases = [finding for finding in Judge(drive(world, tmp_path)).findings if finding.figure == "lease"]
    found = ["counter_disagrees" in lease.flags for lease in leases]
    later = leases[found.index(True) + 1 :]
    assert len(later) >= 3
    assert all("counter_disagrees" in lease.flags and lease.label == "modeled" and lease.holds for lease in later)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_thousand_histories() -> None:
    """The same for 2,000 histories, as in docs/measurements.md."""
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + 2_000):
        tally.add(seed)
    judged(tally)
