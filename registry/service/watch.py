"""Watches the wrappers: asks each one for reports, and counts the missing ones."""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

from registry.core.events import WrapperFailed
from registry.core.records import WrapperStatus
from registry.errors import WrapperUnheard, WrapperUnreachable
from registry.service.loop import Loop
from registry.service.tasks import Tasks, guarded
from registry.service.wrapper_reports import ANSWERING, WrapperReports
from registry.settings import WatchSettings

FAILED_RETRY_S = 30.0
"""Interval at which a FAILED wrapper is checked again, seconds."""

_NOT_ASKED = frozenset({WrapperStatus.LOST, WrapperStatus.OFF, WrapperStatus.RESTARTING})
"""Statuses in which a wrapper is not asked for reports."""


class Watch:
    """Watches one wrapper."""

    def __init__(self, wrapper_id: str, loop: Loop, reports: WrapperReports, settings: WatchSettings) -> None:
        self.misses = 0
        """Number of reports in a row that the wrapper did not answer; 0 again once it counts as failed."""
        self._wrapper_id = wrapper_id
        self._loop = loop
        self._reports = reports
        self._settings = settings

    async def run(self) -> None:
        """Watch the wrapper as long as it exists.

        Errors are logged and do not end the loop, except StoreUnavailable.
        """
        problem = f"wrapper {self._wrapper_id} could not be looked after"
        known = self._loop.allocator.wrapper(self._wrapper_id)
        if known is not None and known.status is not WrapperStatus.OFF:
            await guarded(problem, self._follow_start)
        while (wrapper := self._loop.allocator.wrapper(self._wrapper_id)) is not None:
            given_up = wrapper.status is WrapperStatus.FAILED
            await asyncio.sleep(FAILED_RETRY_S if given_up else self._settings.period_s)
            await guarded(problem, self._check)

    async def _follow_start(self) -> None:
        if (event := await self._reports.await_start(self._wrapper_id)) is not None:
            self._loop.apply(event)

    async def _check(self) -> None:
        wrapper = self._loop.allocator.wrapper(self._wrapper_id)
        if wrapper is None or wrapper.status in _NOT_ASKED:
            self.misses = 0
            return
        if wrapper.status is WrapperStatus.STARTING:
            await self._follow_start()
            return
        try:
            report, is_current = await self._reports.fetch(self._wrapper_id)
        except WrapperUnheard:
            return  # not counted: the cause may be the connection and not the wrapper
        except WrapperUnreachable as error:
            self._missed(error.reason)
            return
        self.misses = 0
        self._reports.apply_report(self._wrapper_id, report, is_current=is_current)

    def _missed(self, reason: str) -> None:
        """Count a missing report; ``watch.failures`` in a row mean that the wrapper has failed."""
        self.misses += 1
        wrapper = self._loop.allocator.wrapper(self._wrapper_id)
        if self.misses >= self._settings.failures and wrapper is not None and wrapper.status in ANSWERING:
            self.misses = 0
            self._loop.apply(WrapperFailed(self._wrapper_id, reason))


class Watches:
    """One Watch for each wrapper. Each runs in a task of its own, so a wrapper that hangs delays no other."""

    def __init__(self, loop: Loop, reports: WrapperReports, tasks: Tasks, settings: WatchSettings) -> None:
        self._loop = loop
        self._reports = reports
        self._tasks = tasks
        self._settings = settings
        self._watches: dict[str, tuple[Watch, asyncio.Task[None]]] = {}

    def update(self, present: AbstractSet[str]) -> None:
        """Watch exactly these wrappers. A watch that has ended is replaced."""
        watched = {wrapper_id for wrapper_id, (_, task) in self._watches.items() if not task.done()}
        for wrapper_id in sorted(present - watched):  # sorted, so that simulations are repeatable
            watch = Watch(wrapper_id, self._loop, self._reports, self._settings)
            self._watches[wrapper_id] = watch, self._tasks.spawn(f"watch {wrapper_id}", watch.run())
        for wrapper_id in sorted(self._watches.keys() - present):
            self._watches.pop(wrapper_id)[1].cancel()
            self._reports.forget(wrapper_id)

    def misses_reports(self, wrapper_id: str) -> bool:
        """True when a wrapper has missed its last report. False again once it counts as failed."""
        watch = self._watches.get(wrapper_id)
        return watch is not None and watch[0].misses > 0
