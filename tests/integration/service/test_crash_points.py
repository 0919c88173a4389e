"""The registry killed at every moment of its work: between deciding, committing, acting and being answered.

A scenario is run again and again. In the first run the registry dies at the first moment that there is, in the second
at the second, until a run ends before its moment comes; once more with a second death soon after the first. What must
hold is the same whatever the moment: everything accepted comes to the end that it would have had, no wrapper is held
twice, no address changes, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from registry.contract.messages import HandOver, LeaseGrant, StartedFor, WrapperPlan
from registry.core.decision import Changes
from registry.core.events import NewRequest
from registry.core.records import LLMSpec, WrapperStatus
from registry.errors import EngineStartFailed
from registry.store.rows import AuditRow, EventRow, IdempotencyRow
from registry.wire.words import RequestStatus
from tests.support.fake_cluster import FakeCluster
from tests.support.service_world import OTHER, THIRD, TINY, ServiceWorld, config_of

pytestmark = pytest.mark.no_cover  # counting doubles the time, and other tests reach the same lines
S = RequestStatus
BROKEN = LLMSpec("org/broken", "text-generation")
KINDS = {
    "decided, not committed",
    "committed, nothing done",
    "about to deploy",
    "deploy done, not heard of",
    "about to bind",
    "bind done, not heard of",
    "about to unbind",
    "unbind done, not heard of",
    "answered, not heard of",
}
"""Moments that each scenario must have: one between each pair of decide, commit, effect and answer."""


# D18: the registry dies at every moment
class Killed(asyncio.CancelledError):
    """The process that this happens to is no more: nothing in it may catch it, or do anything afterwards."""


class Plug:
    """Counts the moments at which the registry could die, and lets it die at some of them."""

    def __init__(self, *moments: int) -> None:
        self._left = list(moments)
        self._count = 0
        self.dead = False
        self.deaths: list[str] = []
        self.seen: Counter[str] = Counter()

    def moment(self, name: str) -> None:
        """The registry gets here; perhaps not any further."""
        if self.dead:
            raise Killed
        self._count += 1
        self.seen[name] += 1
        if self._left and self._count == self._left[0]:
            self.dead = True
            self.deaths.append(name)
            self._left.pop(0)
            self._count = 0
            raise Killed

    def again(self) -> None:
        """The registry is started anew; the next moment to die at counts from here."""
        self.dead = False
        self._count = 0


class PluggedCluster(FakeCluster):
    """Commands reach the wrappers, or the registry has died before; their answers come, or it dies before that."""

    def __init__(self, changed: Callable[[], None], plug: Plug) -> None:
        super().__init__(changed)
        self._plug = plug

    @asynccontextmanager
    async def _moments_of(self, name: str) -> AsyncIterator[None]:
        try:
            self._plug.moment(f"about to {name}")
            yield
            self._plug.moment(f"{name} done, not heard of")
        finally:
            self.changed()

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        async with self._moments_of("deploy"):
            await super().deploy(wrapper_id, epoch, spec, grant, started_for)

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        async with self._moments_of("stop"):
            await super().stop(wrapper_id, epoch)

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        async with self._moments_of("bind"):
            return await super().bind(wrapper_id, epoch, grant)

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        async with self._moments_of("unbind"):
            await super().unbind(wrapper_id, epoch, request_id, how)

    async def restart(self, wrapper_id: str) -> None:
        async with self._moments_of("restart"):
            await super().restart(wrapper_id)

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        async with self._moments_of("create"):
            await super().create(wrappers)

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        async with self._moments_of("remove"):
            await super().remove(wrapper_ids)


class PluggedWorld(ServiceWorld):
    """A world whose registry can die in the middle of a commit, too, and is started again by who notices."""

    def __init__(self, url: str, plug: Plug) -> None:
        super().__init__(url, [])
        self.plug = plug
        self.cluster = PluggedCluster(self.changed.set, plug)
        self.addresses: dict[str, str] = {}

    async def start(self) -> None:
        await super().start()
        commit = self.store.commit

        def plugged(
            changes: Changes,
            *,
            events: Sequence[EventRow] = (),
            idempotency: IdempotencyRow | None = None,
            audit: AuditRow | None = None,
        ) -> int | None:
            self.plug.moment("decided, not committed")
            number = commit(changes, events=events, idempotency=idempotency, audit=audit)
            self.plug.moment("committed, nothing done")
            return number

        self.store.commit = plugged  # type: ignore[method-assign]

    async def revive(self) -> None:
        """What Ray does with an actor that has died. Wrappers have gone on meanwhile."""
        await self.crash()
        self.plug.again()
        await self.start()

    # --- what a client does, whatever happens to the registry -------------------------------------------

    async def insist(self, call: Callable[[], object]) -> None:
        """A call of a client that repeats it until it hears an answer."""
        while True:
            try:
                call()
                self.plug.moment("answered, not heard of")
            except Killed:
                await self.revive()
            else:
                return

    async def release(self, request_id: str) -> None:
        """Give an LLM back, or cancel a request."""
        await self.insist(lambda: self.service.release(request_id))

    async def come_to(self, request_id: str, status: RequestStatus) -> None:
        """Poll until a request has this status."""
        await self.come(lambda: self._is(request_id, status))

    async def come(self, condition: Callable[[], bool]) -> None:
        """Wait for something, though the registry may die meanwhile."""
        while True:
            await self.until(lambda: self.plug.dead or condition())
            if not self.plug.dead:
                return
            await self.revive()

    def _is(self, request_id: str, status: RequestStatus) -> bool:
        self.look()
        return self.request(request_id).status is status

    def look(self) -> None:
        """What every client can see must be right at any time."""
        snapshot = self.service.allocator.snapshot()
        deployed = [r for r in snapshot.requests if r.status is S.DEPLOYED]
        held = [request.wrapper_id for request in deployed]
        assert len(held) == len(set(held)), f"held twice: {held}"
        for request in deployed:
            address = self.url(request.request_id)
            assert address is not None
            assert self.addresses.setdefault(request.request_id, address) == address, "its address has changed"
        assert len(set(self.addresses.values())) == len(self.addresses), "one address for two"


Scenario = Callable[[PluggedWorld], Awaitable[dict[str, RequestStatus]]]


def ask(world: PluggedWorld, measurement_id: int, **specs: LLMSpec) -> Callable[[], object]:
    """A POST whose ids the client's side has chosen, so that it may be repeated."""
    llms = [NewRequest(request_id, spec, config_of(spec)) for request_id, spec in specs.items()]
    return lambda: world.service.request(measurement_id, llms)


async def a_busy_day(world: PluggedWorld) -> dict[str, RequestStatus]:
    """One machine and more wishes than it can fulfil: a cold start, a swap, a warm grant, a cancellation, an expiry."""
    world.cluster.join("a")
    await world.insist(ask(world, 1, first=TINY, second=OTHER))
    await world.insist(ask(world, 2, third=OTHER))
    await world.insist(ask(world, 3, never=THIRD))
    await world.come_to("first", S.DEPLOYED)
    await world.release("first")
    await world.come_to("second", S.DEPLOYED)
    await world.release("never")
    await world.release("second")
    await world.come_to("third", S.DEPLOYED)
    world.wrapper().idle_for_s = 1000.0
    world.clock.now_s += 101.0
    await world.come_to("third", S.EXPIRED)
    return {"first": S.RELEASED, "second": S.RELEASED, "third": S.EXPIRED, "never": S.CANCELLED}


async def a_bad_day(world: PluggedWorld) -> dict[str, RequestStatus]:
    """Two machines: an LLM that starts nowhere, an engine and then a wrapper that die under a lease, a machine too."""
    world.cluster.join("a")
    world.cluster.join("b")
    world.cluster.unusable[BROKEN.model] = EngineStartFailed(BROKEN.model, "no such layer")
    await world.insist(ask(world, 1, broken=BROKEN))
    await world.come_to("broken", S.FAILED)
    await world.insist(ask(world, 2, held=TINY, next=TINY))
    await world.come_to("held", S.DEPLOYED)
    machine_id = world.request("held").machine_id
    assert machine_id is not None
    world.cluster.kill_engine(f"{machine_id}-0")
    await world.come(lambda: world.wrapper(f"{machine_id}-0").runs)
    await world.come_to("held", S.DEPLOYED)
    await world.release("held")
    await world.come_to("next", S.DEPLOYED)
    world.cluster.kill_process(f"{machine_id}-0")
    await world.come(lambda: world.wrapper(f"{machine_id}-0").runs)
    await world.come_to("next", S.DEPLOYED)
    world.cluster.leave(machine_id)
    await world.come_to("next", S.FAILED)
    await world.insist(ask(world, 3, last=OTHER))
    await world.come_to("last", S.DEPLOYED)
    await world.release("last")
    return {"broken": S.FAILED, "held": S.RELEASED, "next": S.FAILED, "last": S.RELEASED}


async def a_night(world: PluggedWorld) -> dict[str, RequestStatus]:
    """The registry is shut down, or dies on the way, and is started again: who waited still does, in their order."""
    world.cluster.join("a")
    await world.insist(ask(world, 1, held=TINY))
    await world.come_to("held", S.DEPLOYED)
    await world.insist(ask(world, 2, waits=OTHER))
    await world.insist(ask(world, 3, later=THIRD))
    shutdown = asyncio.create_task(world.service.shutdown())
    shutdown.add_done_callback(lambda _: world.changed.set())
    await world.until(lambda: shutdown.done() or world.plug.dead)
    shutdown.cancel()
    await asyncio.wait({shutdown})
    await world.revive()
    expired = world.request("held").status is S.EXPIRED
    if not expired:  # it died before that was written
        await world.release("held")
    for request_id in ("waits", "later"):
        await world.come_to(request_id, S.DEPLOYED)
        if request_id == "waits":
            assert world.request("later").status is S.QUEUED
        await world.release(request_id)
    return {"held": S.EXPIRED if expired else S.RELEASED, "waits": S.RELEASED, "later": S.RELEASED}


async def a_day_of_maintenance(world: PluggedWorld) -> dict[str, RequestStatus]:
    """A machine is drained under a lease, goes off and comes back; its measurement moves to another machine."""
    world.cluster.join("a")
    await world.insist(ask(world, 1, first=TINY, second=TINY))
    await world.come_to("first", S.DEPLOYED)
    await world.insist(lambda: world.service.drain("a"))
    await world.release("first")
    await world.come(lambda: world.service.is_off("a"))
    assert "a-0" not in world.cluster.wrappers
    world.cluster.join("b")
    await world.come_to("second", S.DEPLOYED)
    assert world.service.allocator.measurement(("default", 1)).flags == ("machine_changed", "machine_drained")
    await world.insist(lambda: world.service.undrain("a"))
    await world.come(lambda: world.status_of("a-0") is WrapperStatus.IDLE)
    await world.release("second")
    return {"first": S.RELEASED, "second": S.RELEASED}


async def lived_through(scenario: Scenario, database: Path, plug: Plug) -> None:
    """Run a scenario to its end, and judge it."""
    world = PluggedWorld(f"sqlite:///{database}", plug)
    await world.start()
    try:
        ends = await scenario(world)
        for request_id, status in ends.items():
            await world.come_to(request_id, status)
        await world.come(lambda: _at_rest(world))
        assert {request_id: world.request(request_id).status for request_id in ends} == ends
        assert world.service.allocator.snapshot().leases == ()
        world.service.allocator.check()
        kept = world.store.load()
        assert {request.request_id: request.status for request in kept.requests} == ends
    finally:
        await world.close()


def _at_rest(world: PluggedWorld) -> bool:
    """Every wrapper whose machine is there is free, knows of no lease, and runs what the registry believes."""
    for wrapper in world.service.allocator.wrappers():
        if wrapper.status is WrapperStatus.LOST:
            continue
        real = world.wrapper(wrapper.wrapper_id)
        runs = real.spec if real.runs else None
        if wrapper.status not in (WrapperStatus.IDLE, WrapperStatus.READY) or real.grant or runs != wrapper.spec:
            return False
    return True


SCENARIOS = (a_busy_day, a_bad_day, a_night, a_day_of_maintenance)
AGAIN = pytest.mark.parametrize("second", [1, 4], ids=["again at once", "again soon"])


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_every_moment_is_a_good_one_to_die(scenario: Scenario, tmp_path: Path, empty_database: Path) -> None:
    """Whenever the registry is killed, what was accepted is served, once, and nothing is left behind."""
    assert await killed_at(scenario, tmp_path, empty_database) >= KINDS


@pytest.mark.parametrize("scenario", SCENARIOS)
@AGAIN
async def test_some_moments_and_soon_after(
    scenario: Scenario, second: int, tmp_path: Path, empty_database: Path
) -> None:
    """The same, if the registry is killed once more while it starts again; at every twelfth moment."""
    await killed_at(scenario, tmp_path, empty_database, second=second, step=12)


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
@AGAIN
async def test_every_moment_and_soon_after(
    scenario: Scenario, second: int, tmp_path: Path, empty_database: Path
) -> None:
    """The same at every moment."""
    assert await killed_at(scenario, tmp_path, empty_database, second=second) >= KINDS


async def killed_at(
    scenario: Scenario, tmp_path: Path, empty_database: Path, *, second: int | None = None, step: int = 1
) -> set[str]:
    """Run a scenario for each moment, or for every ``step``-th of them; return the kinds of the first deaths."""
    seen = Counter[str]()
    for moment in count(1, step):
        plug = Plug(moment, *([] if second is None else [second]))
        database = tmp_path / f"{moment}.db"
        shutil.copy(empty_database, database)
        try:
            await lived_through(scenario, database, plug)
        except BaseException as error:
            error.add_note(f"killed at moment {moment}: {', then '.join(plug.deaths)}")
            raise
        seen += Counter(plug.deaths[:1])
        if not plug.deaths:
            break
    return set(seen)


def test_a_plug_is_pulled_once_and_for_all() -> None:
    """After its death a registry does nothing more: the test would not notice what it goes on with otherwise."""
    plug = Plug(2)
    plug.moment("first")
    for _ in range(2):
        with pytest.raises(Killed):
            plug.moment("second")
    plug.again()
    plug.moment("third")
    assert plug.deaths == ["second"]
    assert plug.seen == Counter(first=1, second=1, third=1)
