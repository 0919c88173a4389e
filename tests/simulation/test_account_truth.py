"""The registry's accounts of simulated machines: the energy charged to requests, to days and to tenants in a month."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import fsum
from pathlib import Path
from random import Random

import pytest

from registry.accounting.report import Gathered, report_of
from registry.accounting.totals import SPENT, Total, spent_total
from registry.accounting.windows import KeptWindow
from registry.core.records import Measurement
from registry.service.budgets import CHARGED, month_begin_s
from registry.store.store import Store
from tests.energy_world.driver import MEASUREMENT, TENANT, drive
from tests.energy_world.expected import DAY_S
from tests.energy_world.history import History
from tests.energy_world.machine import KINDS, Machine
from tests.energy_world.random_history import random_history
from tests.energy_world.world import EnergyWorld
from tests.support.energy_windows import iso, request

LENGTH_S = 90.0
AUGUST_S = datetime(2026, 8, 1, tzinfo=UTC).timestamp()


def over_the_end_of_july(rng: Random, machine: Machine, *, kind: str) -> History:
    """Return a random history that lasts from July 31 to August 1, so that a day and a month end in its middle."""
    made = random_history(rng, machine, LENGTH_S, calm=kind == "calm")
    return replace(made, epoch_s=AUGUST_S - made.horizon_s / 2)


def of_known(windows: list[KeptWindow]) -> float:
    return fsum(kept.window.total_j or 0.0 for kept in windows)


def joules(costs: Total) -> float:
    return costs.joules.of_known


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_the_accounts_are_those_of_the_windows(kind: str, tmp_path: Path) -> None:
    """Sums by request, by day, by tenant and month, and in the report equal those of the windows, within 1e-6.

    A window belongs to the day and the month in which it ended. An LLM's start without a request is charged to none.
    """
    (tmp_path / "machine").mkdir()
    with EnergyWorld(8, kind, horizon_s=LENGTH_S, history=partial(over_the_end_of_july, kind=kind)) as world:
        run = drive(world, tmp_path / "machine")
    store = Store.open(f"sqlite:///{tmp_path}/registry.db")
    store.keep_windows(run.windows)
    spent = [each for each in run.windows if each.window.kind in SPENT and each.tenant == TENANT]
    days: dict[float, list[KeptWindow]] = defaultdict(list)
    requests: dict[str, list[KeptWindow]] = defaultdict(list)
    for each in spent:
        days[each.window.ended_s // DAY_S * DAY_S].append(each)
        requests[each.window.request_id or ""].append(each)
    assert len(days) >= 2

    def since(at_s: float) -> Total:
        return spent_total(store.costs_of_tenant(TENANT, CHARGED, at_s))

    for day_s, own in days.items():
        of_day = joules(since(day_s)) - joules(since(day_s + DAY_S))
        assert of_day == pytest.approx(of_known(own), rel=1e-6, abs=1e-6)
    assert month_begin_s(AUGUST_S + 1.0) == AUGUST_S
    august = [each for each in spent if each.window.ended_s >= AUGUST_S]
    assert joules(since(AUGUST_S)) == pytest.approx(of_known(august), rel=1e-6)
    assert 0.0 < joules(since(AUGUST_S)) < joules(since(0.0)) == pytest.approx(of_known(spent), rel=1e-6)
    assert since(0.0).joules.count == len(spent)
    costs = store.costs_of_requests(list(requests))
    for request_id, own in requests.items():
        assert joules(spent_total(costs[request_id])) == pytest.approx(of_known(own), rel=1e-6, abs=1e-6)
    assert sum(joules(spent_total(each)) for each in costs.values()) == pytest.approx(of_known(spent), rel=1e-6)
    asked = [request(lease.id, lease.llm, n) for n, lease in enumerate(world.history.leases, 1)]
    gathered = Gathered(asked, iso)
    gathered.add(store.windows((TENANT, MEASUREMENT)))
    report = report_of(Measurement(MEASUREMENT, 1), gathered)
    reported = [each.joules or 0.0 for name, each in report.costs.items() if name != "lease"]
    assert sum(reported) == pytest.approx(of_known(spent), rel=1e-6)
    store.close()
