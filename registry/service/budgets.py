"""Compares a tenant's use in a month with its budget."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from registry.accounting.totals import SPENT, Sum, Total
from registry.errors import TenantBudgetUsed
from registry.settings import TenantBudget
from registry.wire.labels import MEASURED
from registry.wire.words import WindowKind

CHARGED = (*SPENT, WindowKind.LEASE)
"""Kinds of windows in a tenant's sum. Lease windows count only for their label: other kinds contain their joules."""

WARN_SHARE = 0.8
"""From this fraction of a budget on, answers contain a warning."""


def month_begin_s(now_s: float) -> float:
    """Return the start of the calendar month (UTC) that contains ``now_s``, UTC seconds."""
    return _month(now_s).timestamp()


# D39: budgets are checked when requests are accepted
def warnings(tenant: str, budget: TenantBudget, used: Total, now_s: float) -> Iterator[str]:
    """Yield warnings about a tenant's budget. ``used``: its use in this month (UTC) so far.

    Windows whose energy or emissions are not known are not included; a warning says how many there are.

    Raises:
        TenantBudgetUsed: the budget is used up.
    """
    grams = Sum(used.o_g.count, min(used.o_g.known, used.m_g.known), used.o_g.of_known + used.m_g.of_known)
    about = "" if used.label in MEASURED else "~"
    for unit, figure, limit in (
        ("J", used.joules, budget.max_joules_per_month),
        ("gCO2eq", grams, budget.max_gco2eq_per_month),
    ):
        if limit is None:
            continue
        spent, whole = f"{about}{figure.of_known:.6g} {unit}", f"{limit:.6g} {unit}"
        if figure.of_known >= limit:
            raise TenantBudgetUsed(tenant, spent, whole, _next_month(now_s).isoformat().replace("+00:00", "Z"))
        if figure.of_known >= WARN_SHARE * limit:
            estimate = " (an estimate)" if about else ""
            yield f"tenant {tenant!r} has used {spent}{estimate} of the {whole} that it may use in this month"
        if figure.known < figure.count:
            hole = f"{figure.count - figure.known} of {figure.count}"
            yield f"{hole} windows of tenant {tenant!r} in this month have no known {unit} and are not counted"


def _month(now_s: float) -> datetime:
    return datetime.fromtimestamp(now_s, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def _next_month(now_s: float) -> datetime:
    month = _month(now_s)
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
