"""Budgets of leases, and what a lease has cost so far."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.energy.counters.probe import Unreadable
from registry.contract.messages import LeaseGrant
from registry.errors import BudgetUsed
from registry.wire.words import WindowKind
from tests.support.meter_bench import LEASE, WATTS, Bench, Make, of_kind


def flags_of(made: Bench) -> Any:
    metered = made.meter.prompt()
    made.passes(0.5)
    metered.end()
    made.passes(0.1)
    return metered.account(usage={"prompt_tokens": 1, "completion_tokens": 1}, answer=None)["flags"]


@pytest.mark.parametrize("limit", [{"max_j": 1000.0}, {"max_g": 1000.0 / 3.6e6 * 360.0 + 10.0 / 1000}])
def test_budget_warns_and_then_refuses(make: Make, limit: dict[str, float]) -> None:
    """Idling uses a budget, too: answers warn from 80 % of it on, and when it is used no prompt is taken."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, **limit))  # type: ignore[arg-type]
    made.passes(3.0)
    made.meter.require_budget()
    assert "budget_nearly_used" not in flags_of(made)
    made.passes(4.5)
    assert "budget_nearly_used" in flags_of(made)
    made.meter.require_budget()
    made.passes(2.0)
    with pytest.raises(BudgetUsed):
        made.meter.require_budget()


def test_larger_budget_is_taken_at_once(make: Make) -> None:
    """The same lease bound again, as a restarted registry does, goes on with its account and its new limits."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=100.0))
    made.passes(2.0)
    with pytest.raises(BudgetUsed):
        made.meter.require_budget()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0))
    made.meter.require_budget()
    use = made.meter.use()
    assert use is not None
    assert use["total_j"] == pytest.approx(200.0)


def test_budget_goes_on_after_a_restart(make: Make) -> None:
    """What a lease used under an earlier process of its wrapper counts, once: the same word again adds nothing."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0, used_j=700.0, used_g=0.5))
    made.passes(2.0)
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0, used_j=900.0, used_g=0.7))
    use = made.meter.use()
    assert use is not None
    assert (use["total_j"], use["before_j"], use["before_g"]) == (pytest.approx(200.0), 700.0, 0.5)
    assert "budget_nearly_used" in use["flags"]
    made.meter.require_budget()
    made.passes(1.05)
    with pytest.raises(BudgetUsed, match="may use 1000"):
        made.meter.require_budget()


def test_budget_that_nobody_can_tell(make: Make) -> None:
    """A budget on a machine without figures is not enforced, and says so."""
    made = make(Unreadable("gpu:x", "no driver", in_boundary=True))
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1.0))
    made.passes(3.0)
    made.meter.require_budget()
    assert "budget_not_enforced" in flags_of(made)
    use = made.meter.use()
    assert use is not None
    assert (use["total_j"], use["max_j"]) == (None, 1.0)
    assert "budget_not_enforced" in use["flags"]


def test_new_budget_is_no_unknown_one(make: Make) -> None:
    """A lease that has just begun has used nothing: it does not count as one of which nobody can tell."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0))
    for _ in range(3):
        use = made.meter.use()
        assert use is not None
        assert "budget_not_enforced" not in use["flags"]
        made.meter.require_budget()
        made.passes(0.05)


async def test_lease_that_comes_back_goes_on(make: Make) -> None:
    """A lease that is bound again while a prompt of it is finished is one lease."""
    made = make()
    made.bind(LEASE)
    metered = made.meter.prompt()
    made.passes(1.0)
    made.bind(None)
    made.bind(LEASE)
    made.end(metered)
    made.passes(1.0)
    made.bind(None)
    [lease] = of_kind(await made.windows(), WindowKind.LEASE)
    assert lease.total_j == pytest.approx(200.0)


async def test_what_a_lease_has_cost_so_far(make: Make) -> None:
    """The status tells what a lease has used, with its idle time, over all that was written down and what was not."""
    made = make()
    assert made.meter.use() is None
    made.bind(LEASE)
    first = made.meter.use()
    assert first is not None
    assert (first["total_j"], first["idle_j"], first["label"]) == (None, None, "unavailable")
    made.passes(310.0)
    await made.windows()
    made.prompt(2.0)
    made.passes(1.0)
    use = made.meter.use()
    assert use is not None
    assert use["total_j"] == pytest.approx(WATTS * 313.2)
    assert use["idle_j"] == pytest.approx(WATTS * 311.2)
    assert use["o_g"] == pytest.approx(WATTS * 313.2 / 3.6e6 * 360.0)
    assert use["m_g"] == pytest.approx(3.6 * 313.2 / 3600)
    json.dumps(use)
