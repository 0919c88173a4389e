"""What the database keeps of what happened: of everything, and of each request with its causes."""

from __future__ import annotations

import pytest

from registry.errors import EngineStartFailed, UnknownRequest
from registry.service import views
from registry.wire.lease_token import LEASE_TOKEN
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import OTHER, TINY, ServiceWorld


def history(world: ServiceWorld, request_id: str) -> list[tuple[str, str | None]]:
    """What happened to a request, and the status that it had from then on."""
    return [(state.what, state.status) for state in views.event_states(world.service.history(request_id))]


async def test_events_are_kept_in_the_database(world: ServiceWorld) -> None:
    """What happened can be read afterwards, in order, without secrets."""
    request_id = await world.deployed(1)
    world.service.release(request_id)
    kinds = [stored.event.kind for stored in world.store.events()]
    assert kinds[0] == "MachineJoined"
    for kind in ("WrapperAdded", "WrapperStarted", "LeaseRequested", "LLMDeployed", "LeaseBound", "LeaseReleased"):
        assert kind in kinds
    assert LEASE_TOKEN not in repr(world.store.events())


async def test_a_request_knows_its_history(world: ServiceWorld) -> None:
    """From its arrival to its end, every change of a request is there, with the status that followed."""
    request_id = await world.deployed(1)
    world.service.release(request_id)
    world.service.release(request_id)
    assert history(world, request_id) == [
        ("LeaseRequested", "deploying"),
        ("LLMDeployed", "deploying"),
        ("LeaseBound", "deployed"),
        ("LeaseReleased", "released"),
    ]


async def test_an_event_names_what_led_to_it(world: ServiceWorld) -> None:
    """Every answer of a wrapper names the event whose command it answers; what came from outside names none."""
    request_id = await world.deployed(1)
    world.service.release(request_id)
    asked, deployed, bound, released = views.event_states(world.service.history(request_id))
    assert asked.cause is None
    assert deployed.cause == asked.event
    assert bound.cause == deployed.event
    assert released.cause is None
    assert asked.event < deployed.event < bound.event < released.event


async def test_who_is_handed_what_another_released_is_told_so(world: ServiceWorld) -> None:
    """A release that starts the LLM of the next in line is in the history of both, and the cause of what follows."""
    first = await world.deployed(1)
    (second,) = world.ask(2, OTHER)
    world.service.release(first)
    await world.until_status(second, Status.DEPLOYED)
    assert history(world, first)[-1] == ("LeaseReleased", "released")
    queued, granted, deployed, _ = views.event_states(world.service.history(second))
    assert (queued.what, queued.status) == ("LeaseRequested", "queued")
    assert (granted.what, granted.status) == ("LeaseReleased", "deploying")
    released = [row.event_id for row in world.store.events() if row.event.kind == "LeaseReleased"]
    assert deployed.cause in released
    assert first not in repr(views.event_states(world.service.history(second)))


async def test_a_failure_keeps_its_reason(world: ServiceWorld) -> None:
    """Why a start failed is in the history in the engine's words, with the wrapper it failed on."""
    world.cluster.unusable[TINY.model] = EngineStartFailed(TINY.model, "no such layer", permanent=True)
    (request_id,) = world.ask(1, TINY)
    await world.until_status(request_id, Status.FAILED)
    last = views.event_states(world.service.history(request_id))[-1]
    assert (last.what, last.status, last.wrapper) == ("LLMDeployFailed", "failed", "a-0")
    assert last.reason is not None
    assert "no such layer" in last.reason


async def test_a_history_comes_in_pieces(world: ServiceWorld) -> None:
    """Who has read up to an event gets what came after it, and no more at once than asked for."""
    request_id = await world.deployed(1)
    first, *rest = world.service.history(request_id)
    assert world.service.history(request_id, limit=1) == (first,)
    assert world.service.history(request_id, after=first.event_id) == tuple(rest)
    assert world.service.history(request_id, after=rest[-1].event_id) == ()


async def test_what_was_overtaken_says_so(world: ServiceWorld) -> None:
    """A request that let a warm match pass has that in its history."""
    holds = await world.deployed(1)
    (overtaken,) = world.ask(2, OTHER)
    (warm,) = world.ask(3, TINY)
    world.service.release(holds)
    await world.until_status(warm, Status.DEPLOYED)
    details = [stored.event.detail for stored in world.service.history(overtaken)]
    assert '"overtaken": 1' in details[-1]


async def test_an_unknown_request_has_no_history(world: ServiceWorld) -> None:
    """An id that was never seen is told apart from one that nothing has happened to."""
    with pytest.raises(UnknownRequest):
        world.service.history("never")
