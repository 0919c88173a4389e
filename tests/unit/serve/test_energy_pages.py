"""What the ingress makes of energy windows when clients hang up, many ask at once, or the registry is away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any

import pytest
from starlette.types import Message

from deployments.models.sources import ModelSources
from deployments.serve import energy_pages
from deployments.serve.energy_pages import PAGES_AT_ONCE, REPORTS_AT_ONCE, EnergyPages
from deployments.serve.http_app import IngressConfig, build_app
from registry.errors import RegistryUnavailable
from registry.wire.schemas import RequestState
from tests.support.fake_registry import BASE, CREATED, FakeRegistry

KEY = "default", 7


@pytest.fixture
def registry() -> FakeRegistry:
    found = FakeRegistry()
    found.requests["r-1"] = RequestState(
        requestId="r-1",
        llmconfig={},
        status="queued",
        measurementId=7,
        address=None,
        link=f"{BASE}/promptingservice/request/r-1",
        createdAt=CREATED,
    )
    return found


class SlowReports:
    """In place of ``report_json``: takes until ``go``, and counts how many are made at once."""

    def __init__(self) -> None:
        self.go, self.begun, self.most = Event(), Semaphore(0), 0
        self._lock, self._now = Lock(), 0

    def __call__(self, *_about: object) -> str:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.begun.release()
        self.go.wait()
        with self._lock:
            self._now -= 1
        return "{}"


async def test_reports_of_clients_that_hung_up_are_counted(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread does not end with its client: the next reports wait for it."""
    slow = SlowReports()
    monkeypatch.setattr(energy_pages, "report_json", slow)
    pages = EnergyPages(registry.call)
    try:
        hung_up = [asyncio.create_task(pages.report(KEY)) for _ in range(REPORTS_AT_ONCE)]
        for _ in hung_up:
            await asyncio.to_thread(slow.begun.acquire)
        for task in hung_up:
            task.cancel()
        await asyncio.gather(*hung_up, return_exceptions=True)
        others = [asyncio.create_task(pages.report(KEY)) for _ in range(3)]
        for _ in range(50):  # let everything run that can
            await asyncio.to_thread(lambda: None)
        assert slow.most == REPORTS_AT_ONCE
    finally:
        slow.go.set()
    assert await asyncio.gather(*others) == ["{}"] * 3
    assert slow.most == REPORTS_AT_ONCE


async def test_pages_of_windows_have_a_limit(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients ask, few pages are in memory; each client gets its own."""
    monkeypatch.setattr(energy_pages, "PAGE", 5)
    now = most = 0

    async def call(method: str, *args: Any) -> Any:
        nonlocal now, most
        now += args[2] is None  # the first windows of a page
        most = max(most, now)
        await asyncio.sleep(0)
        return await registry.call(method, *args)

    pages = EnergyPages(call)

    async def page() -> str:
        nonlocal now
        found = await pages.windows(KEY, None, None, 20, detail=True)
        now -= 1
        return found

    found = await asyncio.gather(*(page() for _ in range(5 * PAGES_AT_ONCE)))
    assert len(set(found)) == 1
    assert most == PAGES_AT_ONCE


async def test_a_csv_that_ends_early_is_not_whole(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the registry is away after the first part, the answer has no end: the server breaks the connection then."""
    monkeypatch.setattr(energy_pages, "PAGE", 5)
    sent: list[Message] = []

    async def call(method: str, *args: Any) -> Any:
        if args[2] is not None:  # after the first part
            raise RegistryUnavailable("no answer within 30 s")
        return await registry.call(method, *args)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "GET",
        "path": "/measurements/7/report",
        "query_string": b"format=csv",
        "headers": [(b"host", b"127.0.0.1")],
    }
    app = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), call)
    with pytest.raises(RuntimeError, match="response already started"):
        await app(scope, asyncio.Queue[Message]().get, send)
    assert [message.get("status") for message in sent][:1] == [200]
    assert [message["more_body"] for message in sent[1:]] == [True]
    assert sent[1]["body"].count(b"\r\n") == 1 + 5
