"""What the registry knows of leases by their token, and of POSTs whose answer was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from registry.core.events import NewRequest
from registry.errors import LeaseEnded, NoSuchLease, RequestWithdrawn, UnknownRequest
from registry.service import service, views
from registry.service.service import Idempotency
from registry.store.rows import AuditRow
from registry.wire.lease_token import LEASE_TOKEN
from registry.wire.words import RequestStatus as Status
from tests.support.database_contents import contents_of
from tests.support.service_world import OTHER, TINY, ServiceWorld, config_of


def token_of(world: ServiceWorld, request_id: str) -> str:
    url = world.url(request_id)
    assert url is not None
    return url.rpartition("/")[2]


def new_request(request_id: str) -> NewRequest:
    return NewRequest(request_id, TINY, config_of(TINY))


async def test_lease_is_found_by_its_token(world: ServiceWorld) -> None:
    """A lease's token leads to its request, also after a restart; one that was made up leads nowhere."""
    request_id = await world.deployed(1)
    token = token_of(world, request_id)
    assert world.service.leased_with(token) == request_id
    await world.restart()
    assert world.service.leased_with(token) == request_id
    with pytest.raises(NoSuchLease):
        world.service.leased_with("made-up")


async def test_token_of_an_ended_lease_is_known_as_such(world: ServiceWorld) -> None:
    """After the end of a lease its token says how it ended, also when it was never used."""
    released = await world.deployed(1)
    token = token_of(world, released)
    world.service.release(released)
    with pytest.raises(LeaseEnded, match="released"):
        world.service.leased_with(token)


@pytest.fixture
async def on_each_database(database_url: str, logs: list[Any]) -> AsyncIterator[ServiceWorld]:
    """A registry with one machine; the test runs once on each kind of database."""
    world = ServiceWorld(database_url, logs)
    world.cluster.join("a")
    await world.start()
    yield world
    await world.close()


async def test_no_token_is_in_the_database(on_each_database: ServiceWorld, database_url: str) -> None:
    """Not while a lease runs, not after a restart of the registry or the engine, and not after the release."""
    world = on_each_database
    audit = AuditRow("POST", "/promptingservice/request", 201)
    (request_id,) = world.ask(1, TINY, audit=audit, idempotency=Idempotency("key-1", "hash-1"))
    await world.until_status(request_id, Status.DEPLOYED)
    token, lease = token_of(world, request_id).encode(), world.service.allocator.lease_of(request_id)
    assert lease is not None
    secret = token.removeprefix(LEASE_TOKEN.encode())
    held = contents_of(database_url)
    assert lease.token_sha256.encode() in held
    assert secret not in held
    world.cluster.kill_engine("a-0")
    await world.until(lambda: world.wrapper().starts == 2)
    await world.until_status(request_id, Status.DEPLOYED)
    await world.restart()
    await world.service.keep_alive(request_id)
    assert token_of(world, request_id).encode() == token
    assert secret not in contents_of(database_url)
    world.service.release(request_id, audit=replace(audit, method="DELETE", subject=request_id))
    await world.until(lambda: world.wrapper().grant is None)
    released = contents_of(database_url)
    assert b"LeaseReleased" in released
    assert secret not in released
    assert LEASE_TOKEN.encode() not in released
    await world.crash()
    assert secret not in contents_of(database_url)  # SQLite has merged its log into the file
    await world.start()


async def test_a_restarted_registry_answers_the_same_address(world: ServiceWorld) -> None:
    """The holder sees no difference, and the wrapper accepts the token that it is given."""
    request_id = await world.deployed(1)
    before = views.request_state(world.service, world.request(request_id))
    assert before.url is not None
    await world.restart()
    assert views.request_state(world.service, world.request(request_id)) == before
    await world.looked()
    assert world.wrapper().gate.check(token_of(world, request_id)).request_id == request_id
    assert world.request(request_id).status is Status.DEPLOYED


async def test_a_lease_fails_if_the_key_of_its_token_is_lost(world: ServiceWorld) -> None:
    """Its request says why, its wrapper refuses the token, and the next request gets the LLM with a new token."""
    request_id = await world.deployed(1)
    token = token_of(world, request_id)
    await world.crash()
    world.lease_key = b"another key"
    await world.start()
    assert world.url(request_id) is None
    ended = await world.until_status(request_id, Status.FAILED)
    assert ended.reason is not None
    assert "the token of its lease can't be made again" in ended.reason
    assert views.event_states(world.service.history(request_id))[-1].what == "LeaseTokenLost"
    with pytest.raises(LeaseEnded, match="failed"):
        world.service.leased_with(token)
    await world.until(lambda: world.wrapper().grant is None)
    with pytest.raises(LeaseEnded, match="failed"):
        world.wrapper().gate.check(token)
    after = await world.deployed(2)
    assert world.wrapper().starts == 1
    assert world.service.leased_with(token_of(world, after)) == after


async def test_nothing_is_granted_on_a_machine_that_is_lost_with_the_key(world: ServiceWorld) -> None:
    """After a crash of the whole cluster, who waited is served on a machine that is there, without a failure before."""
    held = await world.deployed(1)
    (waits,) = world.ask(2, TINY)
    await world.crash()
    world.cluster.leave("a")
    world.lease_key = b"another key"
    await world.start()
    await world.until_status(held, Status.FAILED)
    assert world.request(waits).status is Status.QUEUED
    world.cluster.join("b")
    await world.until_status(waits, Status.DEPLOYED)
    assert world.request(waits).failed_on == ()
    assert {row.machine_id for row in world.service.allocator.snapshot().requests if row.request_id == waits} == {"b"}


async def test_a_lease_that_was_not_handed_over_gets_another_token(world: ServiceWorld) -> None:
    """Nobody has the lost token yet, so the request is served all the same."""
    binding = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: binding.arrived)
    await world.crash()
    binding.open()
    world.lease_key = b"another key"
    await world.start()
    await world.until_status(request_id, Status.DEPLOYED)
    await world.until(lambda: world.wrapper().grant is not None)
    assert world.wrapper().gate.check(token_of(world, request_id)).request_id == request_id


async def test_address_has_token_and_host(world: ServiceWorld) -> None:
    """A deployed request has its url, and the same lease's address: an authority, with the token as userinfo."""
    request_id = await world.deployed(1)
    state = views.request_state(world.service, world.request(request_id))
    assert state.address == f"lease:{token_of(world, request_id)}@127.0.0.1"
    assert state.url == views.lease_url(world.service, request_id)
    assert state.notes == []
    world.service.release(request_id)
    state = views.request_state(world.service, world.request(request_id))
    assert (state.url, state.address) == (None, None)


async def test_withdrawn_requests_end(world: ServiceWorld) -> None:
    """What was accepted without an answer ends, whether it holds a machine or waits; again is no difference."""
    ids = world.ask(1, TINY, OTHER)
    await world.until_status(ids[0], Status.DEPLOYED)
    for _ in range(2):
        world.service.withdraw(ids, tenant="default", key=None)
    assert [world.request(request_id).status for request_id in ids] == [Status.RELEASED, Status.CANCELLED]


async def test_a_post_that_arrives_after_its_withdrawal_is_refused(world: ServiceWorld) -> None:
    """Ray does not keep the order of an async actor's calls: the late POST takes no machine, and no key."""
    key = Idempotency("key-1", "hash-1")
    late = new_request("late")
    world.service.withdraw([late.request_id], tenant="default", key="key-1")
    (again,) = world.ask(1, TINY, idempotency=key)
    with pytest.raises(RequestWithdrawn):
        world.service.request(1, [late], idempotency=key)
    with pytest.raises(UnknownRequest):
        world.service.known(late.request_id)
    world.service.withdraw([again], tenant="default", key="key-1")
    assert world.request(again).status.ended  # the refused POST was no second answer


async def test_only_the_latest_withdrawals_are_remembered(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was withdrawn and never came takes a bounded amount of memory."""
    monkeypatch.setattr(service, "REMEMBERED_WITHDRAWALS", 2)
    requests = [new_request(request_id) for request_id in ("a", "b", "c")]
    for request in requests:
        world.service.withdraw([request.request_id], tenant="default", key=None)
    world.service.request(1, [requests[0]])
    for request in requests[1:]:
        with pytest.raises(RequestWithdrawn):
            world.service.request(1, [request])


async def test_key_of_a_withdrawn_request_makes_a_new_one(world: ServiceWorld) -> None:
    """A client that repeats its POST after the withdrawal gets requests of its own, not the cancelled ones."""
    key = Idempotency("key-1", "hash-1")
    (first,) = world.ask(1, TINY, idempotency=key)
    world.service.withdraw([first], tenant="default", key="key-1")
    (second,) = world.ask(1, TINY, idempotency=key)
    assert second != first
    assert world.ask(1, TINY, idempotency=key) == [second]


async def test_request_that_was_asked_for_again_is_not_withdrawn(world: ServiceWorld) -> None:
    """When the client's repeated POST comes before the withdrawal, it holds these requests: they stay."""
    key = Idempotency("key-1", "hash-1")
    (first,) = world.ask(1, TINY, idempotency=key)
    assert world.ask(1, TINY, idempotency=key) == [first]
    world.service.withdraw([first], tenant="default", key="key-1")
    assert not world.request(first).status.ended
    assert world.ask(1, TINY, idempotency=key) == [first]
