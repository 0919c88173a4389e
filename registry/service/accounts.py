"""What was used, by whom: the windows that wrappers have measured, written down once each, and the budgets of tenants.

Nothing here decides who gets an LLM, but for the refusal of a request whose tenant has used up its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from registry.accounting.totals import Total, spent_total, sum_of, total_of
from registry.contract.messages import Moment, WrapperReport
from registry.core.allocator import Allocator
from registry.core.records import EnergyWindow, KeptWindow, MeasurementKey, WindowKind
from registry.service.archive import Archive
from registry.service.budgets import CHARGED, month_begin_s, warnings
from registry.settings import TenantBudget
from registry.store.store import Store, WindowPlace

REMEMBERED_COSTS = 10_000
"""Requests whose costs are remembered: those that are asked for often."""


class Accounts:
    """The energy windows of a registry. Used by its service alone, which ends the process when a commit fails.

    ``budgets`` are by tenant; ``now_s`` gives UTC seconds. ``on_kept`` is told of each window once, when it is kept.
    """

    def __init__(
        self,
        store: Store,
        allocator: Allocator,
        archive: Archive,
        *,
        budgets: Mapping[str, TenantBudget],
        now_s: Callable[[], float],
        on_kept: Callable[[KeptWindow], None],
    ) -> None:
        self._store = store
        self._allocator = allocator
        self._archive = archive
        self._budgets = budgets
        self._now_s = now_s
        self._on_kept = on_kept
        self._kept: dict[str, tuple[str, int]] = {}
        self._costs: dict[str, dict[WindowKind, Total]] = {}
        self._used: dict[str, dict[WindowKind, Total]] = {}
        """By tenant with a budget: what the windows that ended in or after the month of ``_used_since_s`` cost."""
        self._used_since_s = 0.0

    # --- windows ----------------------------------------------------------------------------------------

    def keep(self, wrapper_id: str, report: WrapperReport) -> None:
        """Write down what a wrapper has measured, durable when this returns. What is there already stays as it is.

        Raises:
            StoreUnavailable: nothing was written.
        """
        if not report.windows or report.moment is None:
            return
        rows = [self._row(wrapper_id, window) for window in report.windows]
        new = self._store.keep_windows(rows)
        for row in rows:
            if row.window.window_id in new:
                self._add_cost(row.window)
                self._add_used(row)
                self._on_kept(row)
        newest = report.windows[-1].number
        self._kept[wrapper_id] = report.moment.process, max(newest, self.kept(wrapper_id, report.moment))

    def kept(self, wrapper_id: str, as_of: Moment | None) -> int:
        """The number of the last window that is written down of a wrapper's process, as far as this registry knows.

        0: none, or this registry was restarted since. The wrapper then sends again what it has not heard to be kept.
        """
        process, number = self._kept.get(wrapper_id, (None, 0))
        return number if as_of is not None and as_of.process == process else 0

    def _row(self, wrapper_id: str, window: EnergyWindow) -> KeptWindow:
        """A window with what only the registry knows: the machine that it is of, and the tenant that pays."""
        wrapper = self._allocator.wrapper(wrapper_id)
        return KeptWindow(
            window,
            machine_id=None if wrapper is None else wrapper.machine_id,
            tenant=None if window.request_id is None else self._tenant_of(window.request_id),
        )

    def _tenant_of(self, request_id: str) -> str | None:
        request = self._archive.find_request(request_id)
        return None if request is None else request.tenant  # None: forgotten meanwhile

    def page(
        self, key: MeasurementKey, *, request_id: str | None, after: WindowPlace | None, limit: int
    ) -> tuple[KeptWindow, ...]:
        """Return at most ``limit`` windows of a measurement, or of one of its requests, that come after a place.

        In the order in which they began: a window that is written down later may come before that place.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        return self._store.windows(key, request_id=request_id, after=after, limit=limit)

    def costs(self, request_id: str) -> Mapping[WindowKind, Total]:
        """What a request has cost so far, by kind of window. As for ``costs_of``."""
        return self.costs_of([request_id])[request_id]

    def costs_of(self, request_ids: Sequence[str]) -> dict[str, Mapping[WindowKind, Total]]:
        """What each of these requests has cost so far, by kind of window.

        Remembered for the last REMEMBERED_COSTS of them, and added to as windows come.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if unknown := [request_id for request_id in request_ids if request_id not in self._costs]:
            self._costs.update(self._store.costs_of_requests(unknown))
        found: dict[str, Mapping[WindowKind, Total]] = {each: self._costs[each] for each in request_ids}
        while len(self._costs) > REMEMBERED_COSTS:
            del self._costs[next(iter(self._costs))]
        return found

    def _add_cost(self, window: EnergyWindow) -> None:
        costs = self._costs.get(window.request_id or "")
        if costs is not None:
            _add(costs, window)

    def _add_used(self, row: KeptWindow) -> None:
        used = self._used.get(row.tenant or "")
        if used is not None and row.window.kind in CHARGED and row.window.ended_s >= self._used_since_s:
            _add(used, row.window)

    def used(self, request_id: str) -> tuple[float, float]:
        """What the lease of a request is known to have used so far, J and gCO2eq: its prompts, and its idle time.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        costs = self.costs(request_id)
        known = total_of(costs[kind] for kind in (WindowKind.PROMPT, WindowKind.IDLE) if kind in costs)
        return known.joules.of_known, known.o_g.of_known + known.m_g.of_known

    def forget(self, request_ids: Iterable[str]) -> None:
        """The database has forgotten these requests."""
        for request_id in request_ids:
            self._costs.pop(request_id, None)

    # --- budgets ----------------------------------------------------------------------------------------

    def notes(self, tenant: str) -> tuple[str, ...]:
        """What is to be told of the budget that new requests of a tenant count for.

        Raises:
            TenantBudgetUsed: it is used up for this month.
            StoreUnavailable: the database does not answer.
        """
        if tenant not in self._budgets:
            return ()
        now_s = self._now_s()
        return tuple(warnings(tenant, self._budgets[tenant], spent_total(self.used_in_month(tenant)), now_s))

    def used_in_month(self, tenant: str) -> Mapping[WindowKind, Total]:
        """What the windows that count for a tenant, and ended in this calendar month (UTC), cost, by kind.

        Summed up in the database once a month and tenant, and again after a restart; else added to as windows come.
        Where there are budgets, windows are not forgotten within a month (``keep_days``).

        Raises:
            StoreUnavailable: the database does not answer.
        """
        begin_s = month_begin_s(self._now_s())
        if begin_s != self._used_since_s:
            self._used.clear()
            self._used_since_s = begin_s
        if tenant not in self._used:
            self._used[tenant] = self._store.costs_of_tenant(tenant, CHARGED, begin_s)
        return self._used[tenant]


def _add(costs: dict[WindowKind, Total], window: EnergyWindow) -> None:
    figures = sum_of([window.total_j]), sum_of([window.o_g]), sum_of([window.m_g])
    costs[window.kind] = total_of((costs.get(window.kind, Total()), Total(*figures, window.label)))
