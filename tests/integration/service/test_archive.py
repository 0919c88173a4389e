"""What has ended is read from the store, a measurement comes in pages, and nothing holds up the rest for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import event

from registry.core.events import Event, MachineJoined, MachineLost, WrapperAdded
from registry.core.records import WrapperStatus
from registry.errors import UnknownMeasurement
from registry.service import views
from registry.wire.words import RequestStatus
from tests.support.service_world import OTHER, TINY, ServiceWorld

Status = RequestStatus


@pytest.fixture
async def world(make: Callable[..., ServiceWorld]) -> ServiceWorld:
    """One machine; of what has ended nothing stays in memory."""
    world = make()
    world.ended_kept = 0
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)
    return world


def in_memory(world: ServiceWorld) -> set[str]:
    return {request.request_id for request in world.service.allocator.snapshot().requests}


async def test_what_has_ended_is_asked_of_the_store(world: ServiceWorld) -> None:
    """A request that has ended is in memory no more, and every call answers as before."""
    first = await world.deployed(1)
    world.service.release(first)
    (waits,) = world.ask(2, OTHER)
    assert in_memory(world) == {waits}
    assert world.request(first).status is Status.RELEASED
    state = views.request_state(world.service, world.request(first))
    assert (state.status, state.measurementId) == ("released", 1)
    assert (await world.service.keep_alive(first)).status is Status.RELEASED
    assert (await world.service.wait_for_change(first, 60.0)).status is Status.RELEASED
    world.service.release(first)  # idempotent
    assert views.measurement_state(world.service, ("default", 1)).requests[0].requestId == first


async def test_a_measurement_that_goes_on_is_recalled(world: ServiceWorld) -> None:
    """Its flags, its begin, and the machine that it was served on are known again; its numbers go on."""
    first = await world.deployed(1)
    created_s, seq = world.service.archive.measurement(("default", 1)).created_s, world.request(first).seq
    world.service.release(first)
    await world.deployed(2)
    assert not world.service.allocator.knows(("default", 1))
    (again,) = world.ask(1, TINY)
    assert world.service.archive.measurement(("default", 1)).created_s == created_s
    assert world.request(again).seq > seq
    assert in_memory(world) >= {first, again}  # the last one that was served, and the new one


async def test_a_restart_loads_what_is_unfinished(world: ServiceWorld) -> None:
    """Requests that have ended are not loaded, and are known all the same."""
    ended = await world.deployed(1)
    world.service.release(ended)
    stays = await world.deployed(2)
    await world.restart()
    assert in_memory(world) == {stays}
    assert world.request(ended).status is Status.RELEASED
    with pytest.raises(UnknownMeasurement):
        world.service.archive.measurement(("default", 99))


async def test_a_request_can_be_like_one_that_is_in_the_store_alone(world: ServiceWorld) -> None:
    """The earlier request is recalled to compare with it when asking, and once more at the hand-over."""
    world.cluster.provenances["a"] = {"vllm": "0.32.0"}
    model = await world.deployed(1)
    world.service.release(model)
    await world.deployed(2, OTHER)
    busy = in_memory(world)
    (like,) = world.ask(3, TINY, like_request_id=model)
    assert model not in busy
    for request_id in busy:
        world.service.release(request_id)
    assert (await world.until_status(like, Status.DEPLOYED)).like_request_id == model


async def test_a_measurement_comes_in_pages(world: ServiceWorld) -> None:
    """250 LLMs come in pages of 100, in their order, and a page takes as many questions as one of 10."""
    held = await world.deployed(9)
    for _ in range(5):
        world.ask(1, *[OTHER] * 50)
    found, after, asked = [], 0, []
    connection = world.store._connection
    while True:
        statements: list[str] = []
        listener = lambda *args: statements.append(args[2])  # noqa: B023, E731 - called within the loop
        event.listen(connection, "before_cursor_execute", listener)
        page = views.measurement_state(world.service, ("default", 1), after_seq=after)
        event.remove(connection, "before_cursor_execute", listener)
        asked.append(len(statements))
        found += [each.requestId for each in page.requests]
        if page.next is None:
            break
        assert len(page.requests) == 100
        after = page.next
    assert [world.request(each).seq for each in found] == sorted(world.request(each).seq for each in found)
    assert len(set(found)) == 250
    assert max(asked) <= 3
    ten = views.measurement_state(world.service, ("default", 1), limit=10)
    assert [each.requestId for each in ten.requests] == found[:10]
    assert "comes first" in (ten.requests[1].reason or "")
    assert held not in found


async def test_a_lease_that_its_wrapper_has_ended_is_ended(world: ServiceWorld) -> None:
    """A report without the lease, and no command under way: the request is expired, whatever the clock says."""
    request_id = await world.deployed(1)
    world.cluster.clock.now_s += 101  # idle_s of the wrapper's clock; the registry's stands still
    assert "its wrapper ended it" in ((await world.until_status(request_id, Status.EXPIRED)).reason or "")


def _have_come(turns_of: Mapping[type, Sequence[int]], kinds: Sequence[type], count: int) -> bool:
    return all(len(turns_of.get(kind, ())) >= count for kind in kinds)


async def test_a_thousand_machines_hold_nobody_up(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two events of machines that join, come back on other nodes, or go, others have their turn."""
    turn, turns_of = 0, dict[type, list[int]]()

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def noted(event: Event) -> None:
        turns_of.setdefault(type(event), []).append(turn)

    monkeypatch.setattr(world.journal, "deciding", noted)
    beside = asyncio.create_task(others())
    names = [f"m{n}" for n in range(100)]

    def renew(name: str) -> None:
        machine = world.cluster.machines[name]
        world.cluster.machines[name] = replace(machine, node_id=f"new-{machine.node_id}")

    for change, kinds, count in (
        (world.cluster.join, (MachineJoined, WrapperAdded), 100),
        (renew, (MachineJoined, WrapperAdded), 200),
        (world.cluster.leave, (MachineLost,), 200),
    ):
        for name in names:
            change(name)
        await world.until(partial(_have_come, turns_of, kinds, count))
    beside.cancel()
    for kind in (MachineJoined, WrapperAdded, MachineLost):
        turns = turns_of[kind]
        assert len(turns) == len(set(turns)), f"{kind.__name__}: several came in one turn"
