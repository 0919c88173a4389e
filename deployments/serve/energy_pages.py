"""What measurements cost, as the ingress answers it: read from the registry a few windows at a time.

Answers are made here, in threads of the ingress. The registry only reads its database: a thread that computes beside it
takes turns with it every 5 ms, and SQLite wants a turn for each row.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from registry.accounting.report_csv import windows_csv
from registry.core.records import KeptWindow, Measurement, MeasurementKey, Request
from registry.service import views
from registry.store.store import WindowPlace

PAGE = 250
"""Records that the registry reads at once: some 10 ms in which it decides nothing."""

REPORTS_AT_ONCE = 2
"""Reports that are made at the same time; each takes some 2 KB of memory for each of its windows."""

PAGES_AT_ONCE = 4
"""Pages that are made at the same time: each has all of its windows in memory, with their records."""


class EnergyPages:
    """Answers of one ingress around ``call(method, *args)`` of the registry. Every method raises what that raises."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._reports, self._windows = asyncio.Semaphore(REPORTS_AT_ONCE), asyncio.Semaphore(PAGES_AT_ONCE)
        # A thread goes on when its client hangs up, so that turns alone would not keep to REPORTS_AT_ONCE.
        self._threads = ThreadPoolExecutor(REPORTS_AT_ONCE, thread_name_prefix="report")

    async def report(self, key: MeasurementKey) -> str:
        """JSON MeasurementReport, without its windows."""
        async with self._reports:
            measurement, requests = await self._measured(key)
            windows = views.gathered(requests)
            async for _, page in self._pages(key):
                await asyncio.to_thread(windows.add, page)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, views.report_json, measurement, requests, windows)

    async def windows(
        self, key: MeasurementKey, request_id: str | None, after: str | None, limit: int, *, detail: bool
    ) -> str:
        """JSON WindowsPage of at most ``limit`` windows, or of those of one request, with their records if ``detail``.

        ``after`` is the ``next`` of the page before. Raises InvalidField if it is not.
        """
        place = views.place_of(after)
        requests: list[Request] = []
        windows: list[KeptWindow] = []
        async with self._windows:
            async for some, page in self._pages(key, request_id, place, limit):
                requests += some
                windows += page
            return await asyncio.to_thread(
                lambda: views.windows_json(views.windows_page(requests, windows, limit), detail=detail)
            )

    async def csv(self, key: MeasurementKey) -> AsyncIterator[str]:
        """Yield all windows as CSV, in parts: the heading with the first windows, then the others."""
        heading = True
        async for requests, page in self._pages(key):
            yield await asyncio.to_thread(_csv, requests, page, heading=heading)
            heading = False

    async def _measured(self, key: MeasurementKey) -> tuple[Measurement, list[Request]]:
        """A measurement and all its requests."""
        found: list[Request] = []
        while True:
            measurement, page = await self._call("measured", key, found[-1].seq if found else 0, PAGE)
            found += page
            if len(page) < PAGE:
                return measurement, found

    async def _pages(
        self,
        key: MeasurementKey,
        request_id: str | None = None,
        after: WindowPlace | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[tuple[Sequence[Request], Sequence[KeptWindow]]]:
        """Yield pages of ``limit`` (None: all) windows with the requests that they are of; at least one page."""
        while True:
            wanted = PAGE if limit is None else min(PAGE, limit)
            requests, page = await self._call("windows", key, request_id, after, wanted)
            yield requests, page
            limit = None if limit is None else limit - len(page)
            if len(page) < wanted or limit == 0:
                return
            after = WindowPlace(page[-1].window.begun_s, page[-1].window.window_id)


def _csv(requests: Sequence[Request], page: Sequence[KeptWindow], *, heading: bool) -> str:
    return windows_csv(views.windows_page(requests, page, len(page) + 1).windows, heading=heading)
