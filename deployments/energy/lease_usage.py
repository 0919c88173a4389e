"""What the current lease has used so far, and whether its budget allows another prompt."""

from __future__ import annotations

from typing import Any

from deployments.energy.attribution import Flow
from deployments.energy.figures import Energy
from deployments.energy.lease_account import Budget, LeaseAccount
from deployments.energy.sci import Score
from deployments.energy.scorer import Scorer
from deployments.energy.timeline import Stretch, Timeline
from registry.wire.flags import Flag


class LeaseUsage:
    """The usage of the lease that holds the wrapper, since its start in this process. Not thread-safe."""

    def __init__(self, scorer: Scorer, timeline: Timeline[LeaseAccount]) -> None:
        self._scorer = scorer
        self._meter = scorer.meter
        self._timeline = timeline

    def so_far(self) -> dict[str, Any] | None:
        """Return what the lease has used so far, idle time included, and its budget, as JSON; None without a lease.

        ``before_j`` and ``before_g`` are what the lease used before the wrapper was restarted. The
        other amounts do not include them.
        """
        account = self._timeline.holder
        if account is None:
            return None
        energy, found = self._used(account)
        idle = self._idle(account)
        return {
            "total_j": energy.total_j,
            "low_j": energy.low_j,
            "high_j": energy.high_j,
            "idle_j": None if idle is None else self._meter.energy(idle, estimate_short=True).total_j,
            "label": energy.label.value,
            "o_g": None if found is None else found.o_g,
            "m_g": None if found is None else found.m_g,
            "before_j": account.before_j or None,
            "before_g": account.before_g or None,
            "max_j": account.grant.max_j,
            "max_g": account.grant.max_g,
            "flags": sorted({*energy.flags, *self.budget_flags(account)}),
        }

    def require_budget(self) -> None:
        """Raise BudgetUsed if the lease has used up its budget."""
        holder = self._timeline.holder
        if holder is not None and holder.has_budget:
            for budget in self._budgets(holder):
                budget.require()

    def budget_flags(self, account: LeaseAccount | None) -> list[Flag]:
        """Return the flags about the budget for answers of a lease, and note them for its record."""
        if account is None or not account.has_budget:
            return []
        flags = [flag for budget in self._budgets(account) if (flag := budget.flag) is not None]
        account.flags.update(flags)
        return flags

    def _budgets(self, account: LeaseAccount) -> list[Budget]:
        energy, found = self._used(account)
        if found is None:
            return []  # no time has passed, so nothing is used
        used_j = None if energy.total_j is None else account.before_j + energy.total_j
        used_g = None if found.o_g is None or found.m_g is None else account.before_g + found.o_g + found.m_g
        limits = (("J", account.grant.max_j, used_j), ("gCO2eq", account.grant.max_g, used_g))
        return [Budget(unit, limit, used) for unit, limit, used in limits if limit is not None]

    def _used(self, account: LeaseAccount) -> tuple[Energy, Score | None]:
        """Return what a lease in progress has used; no score before any time has passed."""
        now_s = self._meter.mark()
        stretches = [[(stretch.start_s, stretch.end_s)] for stretch in self._unwritten(account)]
        flow = self._scorer.summed(account.flow, [*stretches, self._timeline.open(now_s)[0]])
        if flow is None:
            return self._meter.nothing(), None
        energy = self._meter.energy(flow, estimate_short=True)
        return energy, self._scorer.score(energy, flow.duration_s, account.units, account=account)

    def _idle(self, account: LeaseAccount) -> Flow | None:
        gaps = [stretch.gaps for stretch in self._unwritten(account)]
        return self._scorer.summed(account.idle, [*gaps, self._timeline.open(self._meter.mark())[1]])

    def _unwritten(self, account: LeaseAccount) -> list[Stretch[LeaseAccount]]:
        return [stretch for stretch in self._timeline.closed if stretch.holder is account]
