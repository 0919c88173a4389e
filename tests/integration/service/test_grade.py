"""Measurement grade, provenance, and requests like an earlier one, over a real database."""

from __future__ import annotations

import pytest

from registry.core.records import WrapperStatus
from registry.errors import InvalidField
from registry.service import views
from registry.wire.schemas import RequestState
from registry.wire.words import Grade, RequestStatus
from tests.support.service_world import OTHER, TINY, ServiceWorld

RAN_ON: dict[str, object] = {"cpu": {"model": "Xeon"}, "versions": {"vllm": "0.32.0"}}


@pytest.fixture(autouse=True)
def _told(world: ServiceWorld) -> None:
    world.cluster.provenances["a"] = RAN_ON
    world.cluster.commits[TINY.model] = "c1"


def state(world: ServiceWorld, request_id: str) -> RequestState:
    return views.request_state(world.service, world.request(request_id))


async def measured(world: ServiceWorld, measurement_id: int = 1, **more: object) -> str:
    """A request of measurement grade that was handed over and given back."""
    (request_id,) = world.ask(measurement_id, TINY, grade=Grade.MEASUREMENT, **more)
    await world.until_status(request_id, RequestStatus.DEPLOYED)
    world.service.release(request_id)
    return request_id


async def test_grade_reaches_the_wrapper(world: ServiceWorld) -> None:
    """The lease that a wrapper is given says its grade; nobody who says nothing gets more than the standard."""
    await world.deployed(1)
    grant = world.wrapper().grant
    assert grant is not None
    assert grant.grade == "standard"
    world.service.release("r1")
    (request_id,) = world.ask(2, TINY, grade=Grade.MEASUREMENT)
    await world.until_status(request_id, RequestStatus.DEPLOYED)
    grant = world.wrapper().grant
    assert grant is not None
    assert grant.grade == "measurement"


async def test_settling_is_a_phase(world: ServiceWorld) -> None:
    """While the machine comes to rest its request is ``deploying``, says so, and is not too long idle for a lease."""
    world.service.release(await world.deployed(1))
    binding = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(2, TINY, grade=Grade.MEASUREMENT)
    await world.until(lambda: binding.arrived)
    world.wrapper().phase = "settling"
    await world.looked()
    settling = state(world, request_id)
    assert (settling.status, settling.phase, settling.url) == ("deploying", "settling", None)
    world.wrapper().phase = None
    await world.looked()
    assert state(world, request_id).phase == "handing over"
    binding.open()
    await world.until_status(request_id, RequestStatus.DEPLOYED)


async def test_provenance_is_kept(world: ServiceWorld) -> None:
    """What a wrapper told at the hand-over is in the request's status, with its place, and after a restart."""
    request_id = await measured(world)
    for _ in range(2):
        told = state(world, request_id)
        assert told.provenance == {**RAN_ON, "machine": "a", "wrapper": "a-0"}
        assert told.grade == "measurement"
        await world.restart()


async def test_a_machine_that_is_not_at_rest_is_flagged(world: ServiceWorld) -> None:
    """At the hand-over, and when something comes in between later; each flag once, and for good."""
    await world.until_wrapper(WrapperStatus.IDLE)
    world.wrapper().hand_overs.bind_flags = ("steadiness_unknown",)
    (request_id,) = world.ask(1, TINY, grade=Grade.MEASUREMENT)
    await world.until_status(request_id, RequestStatus.DEPLOYED)
    assert state(world, request_id).flags == ["steadiness_unknown"]
    world.wrapper().hand_overs.flags = ("contended",)
    await world.until(lambda: len(state(world, request_id).flags) == 2)
    await world.looked()
    assert sum(type(event).__name__ == "LeaseFlagged" for event in world.journal.events) == 1
    world.service.release(request_id)
    await world.looked()
    assert state(world, request_id).flags == ["steadiness_unknown", "contended"]


async def test_the_same_is_had_again(world: ServiceWorld) -> None:
    """After a restart of the registry, too, and though the branch of its model has moved on."""
    first = await measured(world)
    await world.restart()
    world.cluster.commits[TINY.model] = "c2"
    (again,) = world.ask(2, TINY, grade=Grade.MEASUREMENT, like_request_id=first)
    assert world.request(again).spec.revision == "c1"
    await world.until_status(again, RequestStatus.DEPLOYED)
    assert state(world, again).like == first


async def test_another_version_is_not_handed_over(world: ServiceWorld) -> None:
    """The request fails and says what differs; the wrapper is free for whoever is next."""
    first = await measured(world)
    world.cluster.provenances["a"] = {**RAN_ON, "versions": {"vllm": "0.33.0"}}
    (again,) = world.ask(2, TINY, grade=Grade.MEASUREMENT, like_request_id=first)
    failed = await world.until_status(again, RequestStatus.FAILED)
    assert failed.reason == f"it would differ from request {first} (like): versions.vllm: was 0.32.0, is 0.33.0"
    assert state(world, again).url is None
    await world.deployed(3)


async def test_another_llm_is_refused(world: ServiceWorld) -> None:
    """What the POST decides is compared there and then."""
    first = await measured(world)
    with pytest.raises(InvalidField, match=r"like: differs from request r1: grade: .*; llms\[0\].model: was org/tiny"):
        world.ask(2, OTHER, like_request_id=first)
