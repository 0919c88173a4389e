"""The ingress's answers about energy; reads the registry's windows in small pages.

The answers are built in threads of the ingress, not of the registry. A computing thread there would
delay the registry's reads: Python switches threads only every 5 ms, and SQLite needs a switch for
each row.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import TypeAdapter

from registry.accounting.report import Gathered, MeasurementReport, report_of
from registry.accounting.report_csv import windows_csv
from registry.accounting.window_report import WindowsPage, window_report
from registry.accounting.windows import KeptWindow
from registry.core.records import Measurement, MeasurementKey, Request
from registry.errors import InvalidField
from registry.service.views import iso
from registry.store.rows import WindowPlace

PAGE = 250
"""Records that the registry reads per call: about 10 ms in which it makes no decision."""

REPORTS_AT_ONCE = 2
"""Reports that are built at the same time; each takes about 2 KB of memory per window."""

PAGES_AT_ONCE = 4
"""Pages that are built at the same time; each holds all its windows, with their records, in memory."""

_PLACE = re.compile(r"[0-9]{1,12}(\.[0-9]{1,20})?")
_REPORT = TypeAdapter(MeasurementReport)
_PAGE = TypeAdapter(WindowsPage)


# D96: reports are made in the ingress
class EnergyPages:
    """The energy answers of one ingress, from ``call(method, *args)`` of the registry.

    All methods also raise the RegistryError that ``call`` raises.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._reports, self._windows = asyncio.Semaphore(REPORTS_AT_ONCE), asyncio.Semaphore(PAGES_AT_ONCE)
        # A thread continues after its client hangs up, so the semaphore alone would allow more than REPORTS_AT_ONCE.
        self._threads = ThreadPoolExecutor(REPORTS_AT_ONCE, thread_name_prefix="report")

    async def report(self, key: MeasurementKey) -> str:
        """Return a JSON MeasurementReport, without its windows."""
        async with self._reports:
            measurement, requests = await self._measured(key)
            windows = Gathered(requests, iso)
            async for _, page in self._pages(key):
                await asyncio.to_thread(windows.add, page)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, report_json, measurement, windows)

    async def windows(
        self, key: MeasurementKey, request_id: str | None, after: str | None, limit: int, *, detail: bool
    ) -> str:
        """Return a JSON WindowsPage of at most ``limit`` windows, of one request if given, with records if ``detail``.

        ``after`` is the ``next`` of the previous page. Raises InvalidField for any other text.
        """
        place = place_of(after)
        requests: list[Request] = []
        windows: list[KeptWindow] = []
        async with self._windows:
            async for some, page in self._pages(key, request_id, place, limit):
                requests += some
                windows += page
            return await asyncio.to_thread(lambda: windows_json(windows_page(requests, windows, limit), detail=detail))

    async def csv(self, key: MeasurementKey) -> AsyncIterator[str]:
        """Yield all windows as CSV, in parts; the first part begins with the header."""
        heading = True
        async for requests, page in self._pages(key):
            yield await asyncio.to_thread(_csv, requests, page, heading=heading)
            heading = False

    async def _measured(self, key: MeasurementKey) -> tuple[Measurement, list[Request]]:
        """Return a measurement and all its requests."""
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
        """Yield pages of windows with their requests, ``limit`` (None: all) windows in total; at least one page."""
        while True:
            wanted = PAGE if limit is None else min(PAGE, limit)
            requests, page = await self._call("windows", key, request_id, after, wanted)
            yield requests, page
            limit = None if limit is None else limit - len(page)
            if len(page) < wanted or limit == 0:
                return
            after = WindowPlace(page[-1].window.begun_s, page[-1].window.window_id)


def report_json(measurement: Measurement, windows: Gathered) -> str:
    """Return a MeasurementReport without its windows, as JSON. Takes some seconds for 50,000 windows."""
    return _REPORT.dump_json(report_of(measurement, windows), exclude={"windows"}).decode()


def place_of(after: str | None) -> WindowPlace | None:
    """Parse the parameter ``after``, which a client took from ``next`` of a page; None for None.

    Raises:
        InvalidField: it is not a value of ``next``.
    """
    if after is None:
        return None
    begun_s, _, window_id = after.partition("_")
    if not _PLACE.fullmatch(begun_s) or not window_id.isprintable():
        raise InvalidField("after", "is not the `next` of a page of windows")
    return WindowPlace(float(begun_s), window_id)


def windows_page(requests: Sequence[Request], windows: Sequence[KeptWindow], limit: int) -> WindowsPage:
    """Return a page of these windows, with their records. ``next`` is set if there are ``limit`` windows."""
    by_id = {request.request_id: request for request in requests}
    told = tuple(window_report(each, by_id.get(each.window.request_id or ""), iso) for each in windows)
    last = windows[-1].window if len(windows) == limit else None
    return WindowsPage(told, None if last is None else f"{last.begun_s!r}_{last.window_id}")


def windows_json(page: WindowsPage, *, detail: bool = False) -> str:
    """Return a WindowsPage as JSON, with the windows' records if ``detail``. Takes some 0.1 s for 1,000 windows."""
    return _PAGE.dump_json(page, exclude=None if detail else {"windows": {"__all__": {"detail"}}}).decode()


def _csv(requests: Sequence[Request], page: Sequence[KeptWindow], *, heading: bool) -> str:
    return windows_csv(windows_page(requests, page, len(page) + 1).windows, heading=heading)
