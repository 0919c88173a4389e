"""Polls that wait for a change, and requests that are sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from registry.core.events import NewRequest
from registry.errors import (
    IdempotencyConflict,
    LLMNeverFits,
)
from registry.service import views
from registry.service.service import Idempotency
from registry.wire.words import Priority
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import BIG, LIMIT_S, OTHER, THIRD, TINY, ServiceWorld, config_of

Make = Callable[..., ServiceWorld]


# --- waiting for a change ----------------------------------------------------------------------------------


async def test_wait_returns_on_a_change(world: ServiceWorld) -> None:
    """Whoever waits for a change is told at once when the status changes, all of them."""
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    waits = [asyncio.create_task(world.service.wait_for_change(request_id, 60.0)) for _ in range(3)]
    await world.looked()
    assert not any(wait.done() for wait in waits)
    gate.open()
    async with asyncio.timeout(LIMIT_S):
        answers = await asyncio.gather(*waits)
    assert {answer.status for answer in answers} == {Status.DEPLOYED}
    assert world.service._waiters._by_request == {}


async def test_wait_ends_without_a_change(world: ServiceWorld) -> None:
    """A wait in which nothing happens ends with the state as it is, and leaves nothing behind."""
    await world.deployed(1)
    (request_id,) = world.ask(2, OTHER)
    assert (await world.service.wait_for_change(request_id, 0.01)).status is Status.QUEUED
    assert world.service._waiters._by_request == {}


async def test_wait_is_for_the_status(make: Make) -> None:
    """A change of something else than the status (being overtaken) is no news."""
    world = make(queue={"max_overtakes": 4, "max_overtake_s": 1000})
    world.cluster.join("a")
    await world.start()
    held = await world.deployed(1, TINY)
    (waits,) = world.ask(2, OTHER)
    (warm,) = world.ask(3, TINY)
    wait = asyncio.create_task(world.service.wait_for_change(waits, 60.0))
    await world.looked()
    world.service.release(held)
    await world.until_status(warm, Status.DEPLOYED)
    assert world.request(waits).overtaken == 1
    await world.looked()
    assert not wait.done()
    world.service.release(warm)
    async with asyncio.timeout(LIMIT_S):
        assert (await wait).status is Status.DEPLOYING


async def test_ended_requests_are_answered_at_once(world: ServiceWorld) -> None:
    """Nobody waits for a request that has ended."""
    request_id = await world.deployed(1)
    world.service.release(request_id)
    async with asyncio.timeout(LIMIT_S):
        assert (await world.service.wait_for_change(request_id, 60.0)).status is Status.RELEASED


async def test_deployed_is_what_a_client_waits_for(world: ServiceWorld) -> None:
    """A wait that begins after the hand-over is answered at once: its client has not heard of it yet."""
    request_id = await world.deployed(1)
    async with asyncio.timeout(LIMIT_S):
        assert (await world.service.wait_for_change(request_id, 60.0)).status is Status.DEPLOYED
        assert (await world.service.wait_for_change(request_id, 60.0, Status.DEPLOYING)).status is Status.DEPLOYED
    assert world.service._waiters._by_request == {}


async def test_who_has_seen_a_status_waits_for_another(world: ServiceWorld) -> None:
    """A client that says what it has seen is answered when that is no longer so, also when it was so only before."""
    request_id = await world.deployed(1)
    (queued,) = world.ask(2, OTHER)
    async with asyncio.timeout(LIMIT_S):
        assert (await world.service.wait_for_change(queued, 60.0, Status.DEPLOYING)).status is Status.QUEUED
    wait = asyncio.create_task(world.service.wait_for_change(request_id, 60.0, Status.DEPLOYED))
    await world.looked()
    assert not wait.done()
    world.service.release(request_id)
    async with asyncio.timeout(LIMIT_S):
        assert (await wait).status is Status.RELEASED
        assert (await world.service.wait_for_change(request_id, 60.0, Status.RELEASED)).status is Status.RELEASED


async def test_waiter_that_goes_away_leaves_nothing(world: ServiceWorld) -> None:
    """A client that hangs up while it waits is forgotten; others still hear of the change."""
    held = await world.deployed(1)
    (request_id,) = world.ask(2, OTHER)
    gone = asyncio.create_task(world.service.wait_for_change(request_id, 60.0))
    stays = asyncio.create_task(world.service.wait_for_change(request_id, 60.0))
    await world.looked()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert len(world.service._waiters._by_request[request_id]) == 1
    world.service.release(held)
    async with asyncio.timeout(LIMIT_S):
        assert (await stays).status is Status.DEPLOYING


# --- asking again ------------------------------------------------------------------------------------------


async def test_same_ids_are_the_same_requests(world: ServiceWorld) -> None:
    """A POST that is repeated with the ids it was given, because its answer was lost, makes nothing new."""
    llms = [NewRequest("x1", TINY, config_of(TINY), ("a note",)), NewRequest("x2", OTHER, config_of(OTHER))]
    first = world.service.request(1, llms)
    await world.until_status("x1", Status.DEPLOYED)
    again = world.service.request(1, llms)
    assert [request.request_id for request in again] == ["x1", "x2"]
    assert [request.seq for request in again] == [request.seq for request in first]
    assert len(views.measurement_state(world.service, ("default", 1)).requests) == 2
    assert views.request_state(world.service, again[0]).notes == ["a note"]


async def test_idempotency_key(world: ServiceWorld) -> None:
    """The same key with the same body gives the first answer, also after a restart; with another body a conflict."""
    key = Idempotency("key-1", "hash-1")
    (first,) = world.ask(1, TINY, idempotency=key)
    assert world.ask(1, TINY, idempotency=key) == [first]
    with pytest.raises(IdempotencyConflict):
        world.ask(1, OTHER, idempotency=Idempotency("key-1", "hash-2"))
    assert world.ask(1, TINY, idempotency=key, tenant="another") != [first]
    await world.restart()
    assert world.ask(1, TINY, idempotency=key) == [first]


async def test_refused_post_uses_no_key(world: ServiceWorld) -> None:
    """A POST that was refused can be corrected under the same key."""
    key = Idempotency("key-1", "hash-1")
    with pytest.raises(LLMNeverFits):
        world.ask(1, BIG, idempotency=key)
    assert world.ask(1, TINY, idempotency=Idempotency("key-1", "hash-2"))


async def test_priority_goes_before_arrival(world: ServiceWorld) -> None:
    """A measurement of high priority is served before one that came earlier."""
    held = await world.deployed(1)
    (early,) = world.ask(2, OTHER)
    (high,) = world.ask(3, THIRD, priority=Priority.HIGH)
    world.service.release(held)
    await world.until_status(high, Status.DEPLOYED)
    assert world.request(early).status is Status.QUEUED
