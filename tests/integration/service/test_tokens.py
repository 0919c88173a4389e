"""What the registry knows of leases by their token, and of POSTs whose answer was lost."""

from __future__ import annotations

import pytest

from registry.core.events import NewRequest
from registry.errors import LeaseEnded, NoSuchLease, RequestWithdrawn, UnknownRequest
from registry.service import service, views
from registry.service.service import Idempotency
from registry.wire.words import RequestStatus as Status
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
