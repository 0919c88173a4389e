"""A registry with a real database, machines that fail on command, and a manual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any

from registry.accounting.windows import KeptWindow
from registry.core.events import Event, NewRequest
from registry.core.records import LLMSpec, Request, WrapperStatus
from registry.errors import RegistryError
from registry.service import views
from registry.service.archive import KEPT
from registry.service.lease_tokens import LeaseTokens
from registry.service.loop import Observer
from registry.service.service import Service
from registry.settings import Settings
from registry.store.store import Store
from registry.wire.words import RequestStatus, canonical_json
from tests.support.fake_cluster import FakeCluster, FakeWrapper
from tests.support.fake_counters import ManualClock

TINY = LLMSpec("org/tiny", "text-generation")
OTHER = LLMSpec("org/other", "text-generation")
THIRD = LLMSpec("org/third", "text-generation")
BIG = LLMSpec("org/big", "text-generation", gpus=4)

LIMIT_S = 10.0
"""Time limit of each wait in these tests, seconds. No wait needs a tenth of it."""


def config_of(spec: LLMSpec) -> str:
    return canonical_json({"model": spec.model})


class Journal(Observer):
    """Records the events of a world's service, and wakes the tests that wait for a change."""

    def __init__(self, world: ServiceWorld) -> None:
        self.events: list[Event] = []
        self.statuses: dict[str, list[WrapperStatus]] = {}
        """The statuses of each wrapper so far, in order."""
        self._world = world

    def handled(self, event: Event) -> None:
        self.events.append(event)
        for wrapper in self._world.service.allocator.wrappers():
            had = self.statuses.setdefault(wrapper.wrapper_id, [])
            if had[-1:] != [wrapper.status]:
                had.append(wrapper.status)
        self._world.changed.set()


class ServiceWorld:
    """A registry, its machines and its clock; the registry can be ended and started again."""

    def __init__(self, url: str, logs: list[Any], **settings: Any) -> None:
        self._url = url
        self._logs = logs
        self._numbers = count(1)
        self.changed = asyncio.Event()
        self.settings = Settings.model_validate(
            {
                "watch": {"period_s": 0.002, "failures": 2},
                "wrappers": {"start_timeout_s": 0.05, "stop_timeout_s": 5},
                "leases": {"max_s": 1000, "idle_s": 100},
                **settings,
            }
        )
        self.clock = ManualClock(1_800_000_000.0)
        self.cluster = FakeCluster(self.changed.set)
        self.homes: dict[str, LLMSpec] = {}
        self.fatal: list[RegistryError] = []
        self.energy: list[KeptWindow] = []
        """The energy windows that the service passed to ``on_energy`` when it had stored them."""
        self.expected_problems: list[str] = []
        self.lease_key = b"a key"
        self.ended_kept = KEPT
        """Maximum number of ended measurements that stay in memory."""
        self.service: Service = None  # type: ignore[assignment]  # made by start()
        self.journal = Journal(self)
        """The journal of the registry's current process."""
        self.store: Store = None  # type: ignore[assignment]  # same

    async def start(self) -> None:
        """Start the registry with the state in its database."""
        self.store = Store.open(self._url)
        if self._url.startswith("sqlite"):
            # Power does not fail in a test, so don't wait for the disk.
            driver: Any = self.store._connection.connection.driver_connection
            driver.execute("PRAGMA synchronous = OFF")
        self.journal = Journal(self)
        self.service = Service(
            self.settings,
            self.store,
            self.cluster,
            now_s=self.clock,
            tokens=LeaseTokens(self.lease_key, lambda: f"token-{next(self._numbers)}"),
            homes=self.homes,
            on_fatal=self.fatal.append,
            on_energy=self.energy.append,
            ended_kept=self.ended_kept,
            observer=self.journal,
        )
        await self.service.start()

    async def crash(self) -> None:
        """End the registry's process without a shutdown; wrappers continue."""
        self.service.allocator.check()
        await self.service._tasks.stop()
        self.store.close()

    async def restart(self) -> None:
        """End the registry's process without a shutdown, and start a new one."""
        await self.crash()
        await self.start()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds. It is checked after each change."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def close(self) -> None:
        if not self.fatal:
            self.service.allocator.check()
        await self.service._tasks.stop()
        await self.cluster.close()
        self.store.close()
        problems = [entry for entry in self._logs if entry["log_level"] in ("error", "critical")]
        unexpected = [entry for entry in problems if not any(text in entry["event"] for text in self.expected_problems)]
        assert unexpected == []

    # --- shorthand --------------------------------------------------------------------------------------

    def ask(self, measurement_id: int, *specs: LLMSpec, **more: Any) -> list[str]:
        """Request LLMs; return the ids of the requests."""
        llms = [NewRequest(f"r{next(self._numbers)}", spec, config_of(spec)) for spec in specs]
        return [request.request_id for request in self.service.request(measurement_id, llms, **more)]

    def request(self, request_id: str) -> Request:
        return self.service.known(request_id)

    def wrapper(self, wrapper_id: str = "a-0") -> FakeWrapper:
        return self.cluster.wrappers[wrapper_id]

    def status_of(self, wrapper_id: str = "a-0") -> WrapperStatus | None:
        known = self.service.allocator.wrapper(wrapper_id)
        return None if known is None else known.status

    def url(self, request_id: str) -> str | None:
        return views.request_state(self.service, self.request(request_id)).url

    async def until_status(self, request_id: str, status: RequestStatus) -> Request:
        await self.until(lambda: self.request(request_id).status is status)
        return self.request(request_id)

    async def until_wrapper(self, status: WrapperStatus, wrapper_id: str = "a-0") -> None:
        await self.until(lambda: self.status_of(wrapper_id) is status)

    async def deployed(self, measurement_id: int, spec: LLMSpec = TINY) -> str:
        """Request an LLM and wait until it is handed over."""
        (request_id,) = self.ask(measurement_id, spec)
        await self.until_status(request_id, RequestStatus.DEPLOYED)
        return request_id

    async def looked(self, wrapper_id: str = "a-0", times: int = 2) -> None:
        """Wait until the registry has asked a wrapper for ``times`` more reports."""
        before = self.cluster.calls[wrapper_id, "report"]
        await self.until(lambda: self.cluster.calls[wrapper_id, "report"] >= before + times)
