"""Stores the energy windows that wrappers have measured, once each, and checks the budgets of tenants.

Its only influence on allocation: a request whose tenant has used up its budget is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from registry.accounting.totals import Total, spent_total, sum_of, total_of
from registry.accounting.windows import KeptWindow
from registry.contract.messages import Moment, WrapperReport
from registry.contract.windows import EnergyWindow
from registry.core.allocator import Allocator
from registry.core.records import MeasurementKey
from registry.service.archive import Archive
from registry.service.budgets import CHARGED, month_begin_s, warnings
from registry.settings import TenantBudget
from registry.store.rows import WindowPlace
from registry.store.store import Store
from registry.wire.words import WindowKind

REMEMBERED_COSTS = 10_000
"""Maximum number of requests whose costs are cached."""


class Accounts:
    """The energy windows of a registry. ``keep`` is called in ``Loop.fail_stop``, so a failed commit ends the process.

    ``budgets``: by tenant. ``now_s`` returns UTC seconds. ``on_kept`` is called once for each window that is stored.
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
        """By tenant with a budget: cost of the windows that ended at ``_used_since_s`` (UTC s) or later."""
        self._used_since_s = 0.0

    # --- windows ----------------------------------------------------------------------------------------

    def keep(self, wrapper_id: str, report: WrapperReport) -> None:
        """Store the energy windows of a report; they are durable when this returns.

        Windows already stored stay unchanged.

        Raises:
            StoreUnavailable: as for ``Store.commit``: nothing was stored, or everything.
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
        """Return the number of the last stored window of a wrapper's process.

        0: none since the registry's start. The wrapper then sends all windows that it still has.
        """
        process, number = self._kept.get(wrapper_id, (None, 0))
        return number if as_of is not None and as_of.process == process else 0

    def _row(self, wrapper_id: str, window: EnergyWindow) -> KeptWindow:
        """Add to a window what only the registry knows: its machine, and the tenant that it is charged to."""
        wrapper = self._allocator.wrapper(wrapper_id)
        return KeptWindow(
            window,
            machine_id=None if wrapper is None else wrapper.machine_id,
            tenant=None if window.request_id is None else self._tenant_of(window.request_id),
        )

    def _tenant_of(self, request_id: str) -> str | None:
        request = self._archive.find_request(request_id)
        return None if request is None else request.tenant  # None: the request was deleted meanwhile

    def page(
        self, key: MeasurementKey, *, request_id: str | None, after: WindowPlace | None, limit: int
    ) -> tuple[KeptWindow, ...]:
        """Return the first ``limit`` windows after a place, of a measurement or of one of its requests.

        Sorted by start time. A window may be stored after later ones were read; the next pages then lack it.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        return self._store.windows(key, request_id=request_id, after=after, limit=limit)

    def costs(self, request_id: str) -> Mapping[WindowKind, Total]:
        """Return the cost of one request so far, as ``costs_of`` does."""
        return self.costs_of([request_id])[request_id]

    def costs_of(self, request_ids: Sequence[str]) -> dict[str, Mapping[WindowKind, Total]]:
        """Return the cost of each of these requests so far, by kind of window.

        The costs of the last REMEMBERED_COSTS requests are cached, and updated when windows arrive.

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

    # D97: a tenant's use in a month is summed in memory
    def _add_used(self, row: KeptWindow) -> None:
        used = self._used.get(row.tenant or "")
        if used is not None and row.window.kind in CHARGED and row.window.ended_s >= self._used_since_s:
            _add(used, row.window)

    def used(self, request_id: str) -> tuple[float, float]:
        """Return the known use of a request's lease so far, (J, gCO2eq): prompts and idle time.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        costs = self.costs(request_id)
        known = total_of(costs[kind] for kind in (WindowKind.PROMPT, WindowKind.IDLE) if kind in costs)
        return known.joules.of_known, known.o_g.of_known + known.m_g.of_known

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop cached costs of requests that were deleted from the database."""
        for request_id in request_ids:
            self._costs.pop(request_id, None)

    # --- budgets ----------------------------------------------------------------------------------------

    def notes(self, tenant: str) -> tuple[str, ...]:
        """Return the budget warnings for new requests of a tenant, empty if there are none.

        Raises:
            TenantBudgetUsed: the budget is used up for this month.
            StoreUnavailable: the database does not answer.
        """
        if tenant not in self._budgets:
            return ()
        now_s = self._now_s()
        return tuple(warnings(tenant, self._budgets[tenant], spent_total(self.used_in_month(tenant)), now_s))

    def used_in_month(self, tenant: str) -> Mapping[WindowKind, Total]:
        """Return the cost, by kind, of a tenant's windows that ended in this calendar month (UTC).

        Summed in the database once per month and tenant, and after a restart; then updated as windows arrive. If there
        are budgets, ``keep_days`` is long enough that no window is deleted within its month.

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
