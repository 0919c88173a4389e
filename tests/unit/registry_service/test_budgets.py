"""Budgets of tenants: warned of, then refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from deployments.error_answers import registry_error
from registry.accounting.totals import Sum, Total, sum_of
from registry.errors import TenantBudgetUsed
from registry.service.budgets import month_begin_s, warnings
from registry.settings import Settings, TenantBudget

NOW_S = datetime(2026, 12, 15, 12, tzinfo=UTC).timestamp()
BUDGET = TenantBudget(max_joules_per_month=1000, max_gco2eq_per_month=10)


def used(joules: float | None, grams: float | None = 0.0, label: str = "measured") -> Total:
    return Total(sum_of([joules, 1.0]), sum_of([grams, 0.0]), sum_of([grams, 0.0]), label)


def told(total: Total, budget: TenantBudget = BUDGET) -> list[str]:
    return list(warnings("ann", budget, total, NOW_S))


def test_nothing_to_say_below_four_fifths() -> None:
    """Up to 80 % nothing is told, also of a tenant that has used nothing yet."""
    assert told(used(798.9)) == []
    assert told(Total()) == []
    assert told(used(1e9, 1e9), TenantBudget()) == []


def test_warned_above_four_fifths() -> None:
    """From 80 % on an answer says how much is used, and whether that is an estimate."""
    assert told(used(799.0)) == ["tenant 'ann' has used 800 J of the 1000 J that it may use in this month"]
    (note,) = told(used(900.0, label="modeled"))
    assert "~901 J (an estimate)" in note
    (note,) = told(used(1.0, 4.5))
    assert "9 gCO2eq of the 10 gCO2eq" in note


def test_refused_when_used_up() -> None:
    """A budget that is used up refuses, with 429, until when, and no Retry-After that would mislead."""
    with pytest.raises(TenantBudgetUsed, match=r"'ann' has used 1000 J of the 1000 J .* from 2027-01-01T00:00:00Z"):
        told(used(999.0))
    with pytest.raises(TenantBudgetUsed, match="gCO2eq"):
        told(used(1.0, 5.0))
    answer = registry_error(TenantBudgetUsed("ann", "1000 J", "1000 J", "2027-01-01T00:00:00Z"))
    assert answer.status_code == 429
    assert "retry-after" not in answer.headers
    assert b'"tenant_budget_used"' in answer.body


def test_what_is_not_known_is_told() -> None:
    """A window without a figure counts for nothing, and an answer says that there is one."""
    assert told(used(None)) == ["1 of 2 windows of tenant 'ann' in this month have no known J and are not counted"]
    half = Total(Sum(1, 1, 1.0), Sum(1, 1, 1.0), Sum(1, 0, 0.0), "measured")
    assert told(half) == ["1 of 1 windows of tenant 'ann' in this month have no known gCO2eq and are not counted"]


def test_the_month_is_utc() -> None:
    """A budget begins anew at midnight UTC of the first day."""
    assert datetime.fromtimestamp(month_begin_s(NOW_S), UTC) == datetime(2026, 12, 1, tzinfo=UTC)
    assert month_begin_s(month_begin_s(NOW_S)) == month_begin_s(NOW_S)


def test_a_month_must_be_kept() -> None:
    """Budgets by month with windows that are forgotten sooner are refused."""
    tenants = {"ann": {"max_joules_per_month": 1}}
    with pytest.raises(ValueError, match="keep_days must be at least 31"):
        Settings.model_validate({"keep_days": 30, "budgets": {"tenants": tenants}})
    assert Settings.model_validate({"keep_days": 31, "budgets": {"tenants": tenants}}).budgets.tenants
