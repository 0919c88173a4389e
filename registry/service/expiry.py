"""Ends leases that reached their deadline or were not used for too long, and pins that are over."""

from __future__ import annotations

import asyncio

import structlog

from registry.core.events import TimePassed
from registry.core.records import Lease
from registry.errors import WrapperUnreachable
from registry.service.loop import Loop
from registry.service.retention import Retention
from registry.service.tasks import Tasks, guarded
from registry.service.wrapper_reports import WrapperReports
from registry.settings import Settings

log = structlog.get_logger("registry.service.expiry")


class Expiry:
    """Ends the leases and pins that are over, about once a second or more often; starts the daily ``retention``."""

    def __init__(
        self, loop: Loop, reports: WrapperReports, retention: Retention, *, tasks: Tasks, settings: Settings
    ) -> None:
        self._loop = loop
        self._reports = reports
        self._retention = retention
        self._tasks = tasks
        self._period_s = min(settings.watch.period_s, 1.0)
        self._checked: set[str] = set()
        """Requests whose wrapper is being asked whether the lease was used."""

    async def run(self) -> None:
        """Run until the shutdown. Errors are logged and do not end the loop, except StoreUnavailable."""
        while not self._loop.stopping:
            await asyncio.sleep(self._period_s)
            await guarded("leases could not be ended", self._pass_time)

    async def _pass_time(self) -> None:
        now_s = self._loop.now_s()
        self._retention.run_if_due(now_s)
        due = self._loop.allocator.leases_due(now_s)
        for lease in due:
            if lease.deadline_s > now_s and lease.request_id not in self._checked:
                self._checked.add(lease.request_id)
                work = guarded("a lease could not be ended", self._end_unless_used, lease)
                self._tasks.spawn(f"end lease of {lease.request_id}", work)
        if any(lease.deadline_s <= now_s for lease in due) or self._loop.allocator.pins_due(now_s):
            self._loop.apply(TimePassed(asked=()))

    async def _end_unless_used(self, lease: Lease) -> None:
        """Ask the wrapper whether an idle lease was used since the last report; if it was not, end the lease.

        The lease also ends if the wrapper does not answer.
        """
        try:
            report = await self._reports.ask(lease.wrapper_id)
        except WrapperUnreachable as error:
            log.warning(
                "lease expired; the wrapper did not answer the activity check",
                wrapper_id=lease.wrapper_id,
                reason=error.reason,
            )
        else:
            self._reports.record_activity(report, grain=0.0)
        finally:
            self._checked.discard(lease.request_id)
        self._loop.apply(TimePassed(asked=(lease.request_id,)))
