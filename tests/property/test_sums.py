"""Every sum over the same energy windows is the same, whoever adds them up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.accounting.totals import SPENT, lease_total, spent_total
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.records import Measurement
from registry.service.budgets import CHARGED
from registry.store.store import Store
from registry.wire.words import WindowKind
from tests.support.energy_windows import BEGUN_S, iso, record, report_of, request

DAY_S = 86_400.0

windows_of_leases = st.lists(
    st.tuples(
        st.sampled_from([*SPENT]),
        st.sampled_from(["r-1", "r-2", "r-3"]),
        st.sampled_from(["process 1", "process 2"]),
        st.sampled_from(["gpu-1", "gpu-2"]),
        st.floats(0.0, 3 * DAY_S),
        st.floats(0.01, 1e6),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path: Path = tmp_path_factory.mktemp("sums")
    opened = Store.open(f"sqlite:///{path}/registry.db")
    yield opened
    opened.close()


def with_leases(windows: list[KeptWindow]) -> list[KeptWindow]:
    """These windows and, as wrappers write it, one of each lease under the process that lived until its end."""
    found = list(windows)
    for request_id in ("r-1", "r-2", "r-3"):
        last = [
            each.window
            for each in windows
            if each.window.request_id == request_id and "process 2-" in each.window.window_id
        ]
        held = [each.total_j for each in last if each.kind in {WindowKind.PROMPT, WindowKind.IDLE}]
        if held:
            joules = sum(each or 0.0 for each in held)
            lease = record(len(found), WindowKind.LEASE, request_id=request_id, joules=joules, process="process 2")
            found.append(KeptWindow(lease, "gpu-1", "ann"))
    return found


@settings(max_examples=60, deadline=None)
@given(windows_of_leases)
def test_all_sums_are_equal(store: Store, drawn: list[tuple[WindowKind, str, str, str, float, float]]) -> None:
    """Prompts + idle = lease, and wrappers, machines, days and requests add up to what the tenant is charged."""
    store.forget(ended_before_s=BEGUN_S * 2, limit=1000)
    kept = []
    for n, (kind, request_id, process, machine, at_s, joules) in enumerate(drawn):
        made: EnergyWindow = record(
            n, kind, request_id=request_id, process=process, begun_s=BEGUN_S + at_s, joules=joules
        )
        kept.append(KeptWindow(made, machine, "ann"))
    kept = with_leases(kept)
    store.keep_windows(kept)

    whole_j = sum(joules for *_, joules in drawn)
    charged = store.costs_of_tenant("ann", CHARGED, 0.0)
    assert spent_total(charged).joules.of_known == pytest.approx(whole_j)
    by_request = [store.costs_of_requests([f"r-{n}"])[f"r-{n}"] for n in (1, 2, 3)]
    assert sum(spent_total(costs).joules.of_known for costs in by_request) == pytest.approx(whole_j)
    ends = [BEGUN_S + day * DAY_S for day in range(5)]
    since = [spent_total(store.costs_of_tenant("ann", CHARGED, at_s)).joules.of_known for at_s in ends]
    days = [since[n] - since[n + 1] for n in range(4)]
    assert sum(days) == pytest.approx(whole_j, abs=1e-6)

    requests = [request(f"r-{n}", f"org/{n}", n) for n in (1, 2, 3)]
    report = report_of(Measurement(7, 1), requests, kept, iso)
    costs = report.costs
    held_j = (costs["active"].joules or 0.0) + (costs["idle"].joules or 0.0)
    assert (costs["lease"].joules or 0.0) == pytest.approx(held_j)
    assert lease_total(charged).joules.of_known == pytest.approx(held_j)
    assert sum(llm.costs["lease"].joules or 0.0 for llm in report.llms) == pytest.approx(held_j)
    rows = [each for each in report.windows if each.adds_up]
    assert sum(each.joules or 0.0 for each in rows) == pytest.approx(whole_j)
    for name in ("machine", "process"):
        groups = {getattr(each, name) for each in rows}
        parts = (sum(each.joules or 0.0 for each in rows if getattr(each, name) == group) for group in groups)
        assert sum(parts) == pytest.approx(whole_j)
