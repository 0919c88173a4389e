"""How a request gets its LLM, and what people see of that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from registry.core.events import MachineJoined, NewRequest
from registry.core.records import LLMMemory, WrapperStatus
from registry.errors import (
    EngineStartFailed,
    LLMNeverFits,
    QueueFull,
    UnknownMeasurement,
)
from registry.service import views
from registry.wire.schemas import AcceptedRequest
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import BIG, OTHER, THIRD, TINY, ServiceWorld, config_of

Make = Callable[..., ServiceWorld]


# --- hand-over ---------------------------------------------------------------------------------------------


async def test_llm_is_deployed_and_handed_over(world: ServiceWorld) -> None:
    """A request deploys its LLM and gets an address. The wrapper accepts the address before the client hears of it."""
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    await world.until(lambda: views.request_state(world.service, world.request(request_id)).phase == "loading")
    state = views.request_state(world.service, world.request(request_id))
    assert (state.status, state.url, state.machine) == ("deploying", None, "a")

    binding = world.cluster.hold("a-0", "bind")
    gate.open()
    await world.until(lambda: binding.arrived)
    assert world.request(request_id).status is Status.DEPLOYING
    assert views.request_state(world.service, world.request(request_id)).phase == "handing over"
    assert world.url(request_id) is None
    binding.open()

    await world.until_status(request_id, Status.DEPLOYED)
    grant = world.wrapper().grant
    assert grant is not None
    assert world.url(request_id) == f"http://127.0.0.1:8000/wrappers/a-0/{grant.token}"
    assert (grant.request_id, grant.measurement_id, grant.llmconfig) == (request_id, 1, config_of(TINY))
    assert (grant.ends_in_s, grant.idle_limit_s) == (1000, 100)
    assert world.wrapper().spec == TINY


async def test_the_answer_to_a_post_shows_requests_as_a_poll_does(world: ServiceWorld) -> None:
    """Each request in a POST's answer has the fields that its RequestState has; a lease of now has its url in it."""
    held = await world.deployed(1)
    (waits,) = world.ask(2, OTHER)
    requests = [world.request(held), world.request(waits)]
    answer = views.prompting_answer(world.service, requests)
    states = [views.request_state(world.service, each) for each in requests]
    assert [each.model_dump() for each in answer.requests] == [
        {name: getattr(state, name) for name in AcceptedRequest.model_fields} for state in states
    ]
    assert [each.url for each in answer.requests] == [world.url(held), None]


async def test_warm_llm_is_handed_over_at_once(world: ServiceWorld) -> None:
    """An LLM that runs and is free is handed to the next who wants it, without a start, under a new address."""
    first = await world.deployed(1)
    first_address = world.url(first)
    world.service.release(first)
    second = await world.deployed(2)
    assert world.url(second) not in (None, first_address)
    assert world.url(first) is None
    assert world.wrapper().starts == 1
    # The new lease may have come before the end of the old one was told: then it has ended it.
    assert world.wrapper().ended in ([(first, "released")], [])
    assert world.wrapper().grant is not None


async def test_llms_of_a_measurement_come_one_after_another(two: ServiceWorld) -> None:
    """A measurement has one LLM at a time, in its order, all on one machine, though another is free."""
    first, second = two.ask(1, TINY, OTHER)
    await two.until_status(first, Status.DEPLOYED)
    state = views.request_state(two.service, two.request(second))
    assert (state.status, state.position) == ("queued", 1)
    assert state.reason == f"its measurement's request {first} comes first and is deployed"
    two.service.release(first)
    await two.until_status(second, Status.DEPLOYED)
    assert two.request(second).machine_id == two.request(first).machine_id
    assert views.measurement_state(two.service, ("default", 1)).machine == two.request(first).machine_id


async def test_who_waits_is_told_why(world: ServiceWorld) -> None:
    """A request that waits says what for, and how many come before it."""
    held = await world.deployed(1)
    (waits,) = world.ask(2, OTHER)
    (last,) = world.ask(3, THIRD)
    states = [views.request_state(world.service, world.request(each)) for each in (waits, last)]
    assert [state.position for state in states] == [1, 2]
    assert {state.reason for state in states} == {"every LLM Machine is in use"}
    assert views.health_state(world.service).queued == 2
    world.service.release(held)
    await world.until_status(waits, Status.DEPLOYED)
    (again,) = world.ask(2, TINY)
    assert "comes first" in (views.request_state(world.service, world.request(again)).reason or "")


async def test_who_is_bound_to_a_machine_is_told_so(world: ServiceWorld) -> None:
    """A request that waits for the machine of its measurement says which one that is."""
    first, second = world.ask(1, TINY, OTHER)
    await world.until_status(first, Status.DEPLOYED)
    (warm,) = world.ask(2, TINY)
    world.service.release(first)  # the LLM is warm for the other measurement, which overtakes
    await world.until_status(warm, Status.DEPLOYED)
    reason = views.request_state(world.service, world.request(second)).reason
    assert reason == "its measurement runs on machine a, which is in use"


async def test_what_fits_nowhere_any_more_says_so(world: ServiceWorld) -> None:
    """A request that was accepted before any machine was known tells that none has what it needs."""
    world.cluster.leave("a")
    await world.until(lambda: world.status_of() is WrapperStatus.LOST)
    (waits,) = world.ask(1, TINY, gpu_type="H100")
    assert views.measurement_state(world.service, ("default", 1)).gpuType == "H100"
    world.cluster.join("a")
    await world.until_wrapper(WrapperStatus.IDLE)
    reason = views.request_state(world.service, world.request(waits)).reason
    assert reason == "it fits on no LLM Machine: no machine here has 'H100'; none has a GPU whose type is known"


async def test_free_llm_gives_way(world: ServiceWorld) -> None:
    """If every wrapper has an LLM, an unused LLM is replaced."""
    world.service.release(await world.deployed(1, TINY))
    await world.deployed(2, OTHER)
    assert world.wrapper().spec == OTHER
    assert world.wrapper().starts == 2


async def test_homes_are_deployed_at_start(make: Make) -> None:
    """The configured LLM runs before anyone asks, and whoever does gets it at once."""
    world = make()
    world.homes = {"*": TINY}
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.READY)
    assert [llm.model for llm in views.llm_states(world.service)] == ["org/tiny"]
    await world.deployed(1, TINY)
    assert world.wrapper().starts == 1


async def test_llm_that_fits_nowhere_is_refused(world: ServiceWorld) -> None:
    """What no machine can ever run is refused at once, and nothing of the POST is accepted."""
    with pytest.raises(LLMNeverFits):
        world.ask(1, TINY, BIG)
    with pytest.raises(UnknownMeasurement):
        views.measurement_state(world.service, ("default", 1))


async def test_full_queue_takes_nothing(make: Make) -> None:
    """A POST that would not fit into the queue is refused as a whole."""
    world = make(queue={"max_queued": 2})
    await world.start()
    world.ask(1, TINY)
    with pytest.raises(QueueFull):
        world.ask(2, TINY, OTHER)
    world.ask(2, TINY)
    assert views.health_state(world.service).queued == 2


# --- memory ------------------------------------------------------------------------------------------------


def large(gib: int) -> NewRequest:
    """A request for an LLM that takes so many GiB."""
    return NewRequest(f"large-{gib}", TINY, config_of(TINY), memory=LLMMemory(gib * 2**30, gpus=1))


async def test_wrappers_tell_how_much_memory_their_machine_has(world: ServiceWorld) -> None:
    """From their first report on, once, and over a restart of the registry; it decides what is refused."""
    world.cluster.memory_bytes["a"] = 24 * 2**30
    await world.until(lambda: views.machine_states(world.service)[0].memoryBytes == 24 * 2**30)
    with pytest.raises(LLMNeverFits, match=r"has 24\.0 GiB of main memory"):
        world.service.request(1, [large(25)])
    await world.restart()
    assert views.machine_states(world.service)[0].memoryBytes == 24 * 2**30
    await world.looked(times=3)
    assert not [event for event in world.journal.events if isinstance(event, MachineJoined)]
    del world.cluster.memory_bytes["a"]
    await world.looked(times=3)
    assert views.machine_states(world.service)[0].memoryBytes == 24 * 2**30
    world.service.request(1, [large(21)])
    await world.until_status("large-21", Status.DEPLOYED)


async def test_the_memory_of_gpus_is_told_apart(world: ServiceWorld) -> None:
    """A machine with GPUs tells the memory of each of them."""
    world.cluster.memory_bytes |= {"a": 24 * 2**30, "gpu": 80 * 2**30}
    await world.until(lambda: views.machine_states(world.service)[0].memoryBytes is not None)
    world.cluster.join("gpu", gpus=2)
    await world.until(lambda: views.machine_states(world.service)[-1].gpuMemoryBytes == 80 * 2**30)
    assert views.machine_states(world.service)[-1].memoryBytes is None
    world.service.request(1, [large(60)])
    assert world.request("large-60").machine_id == "gpu"


async def test_what_is_known_of_an_llms_memory_survives(world: ServiceWorld) -> None:
    """A request that waits for a large machine waits for one after a restart, too."""
    world.cluster.memory_bytes["a"] = 24 * 2**30
    world.cluster.join("big", gpus=1)
    world.cluster.memory_bytes["big"] = 80 * 2**30
    await world.until(lambda: all(world.status_of(name) is WrapperStatus.IDLE for name in ("a-0", "big-0")))
    await world.until(lambda: views.machine_states(world.service)[0].memoryBytes is not None)
    world.service.request(1, [large(60)])
    world.service.request(2, [large(61)])
    await world.until_status("large-60", Status.DEPLOYED)
    await world.restart()
    await world.looked()
    assert world.request("large-61").status is Status.QUEUED
    assert world.request("large-61").memory == large(61).memory
    world.service.release("large-60")
    await world.until_status("large-61", Status.DEPLOYED)
    assert world.request("large-61").machine_id == "big"


# --- what an operator sees ---------------------------------------------------------------------------------


async def test_what_is_being_deployed_is_counted(world: ServiceWorld) -> None:
    """A request whose LLM is being started counts as deploying: it waits no more, and uses none yet."""

    def counts() -> tuple[int, int, int]:
        health, (machine,) = views.health_state(world.service), views.machine_states(world.service)
        return health.deploying, machine.leases, health.queued

    gate = world.cluster.hold("a-0", "deploy")
    first, second = world.ask(1, TINY, OTHER)
    await world.until(lambda: gate.arrived)
    assert counts() == (1, 0, 1)
    gate.open()
    await world.until_status(first, Status.DEPLOYED)
    assert counts() == (0, 1, 1)
    world.service.release(second)
    world.service.release(first)
    assert counts() == (0, 0, 0)


async def test_healthy_start_does_not_show_the_last_failure(world: ServiceWorld) -> None:
    """A wrapper says why it is empty after a failed start, and no longer once it starts or runs the next LLM."""

    def shown() -> tuple[str, str | None]:
        (machine,) = views.machine_states(world.service)
        return machine.wrappers[0].status, machine.wrappers[0].reason

    world.cluster.unusable["org/tiny"] = EngineStartFailed("org/tiny", "no such layer", permanent=True)
    (bad,) = world.ask(1, TINY)
    await world.until_status(bad, Status.FAILED)
    status, reason = shown()
    assert status == "idle"
    assert "no such layer" in (reason or "")
    gate = world.cluster.hold("a-0", "deploy")
    (good,) = world.ask(2, OTHER)
    await world.until(lambda: gate.arrived)
    assert shown() == ("deploying", None)
    gate.open()
    await world.until_status(good, Status.DEPLOYED)
    assert shown() == ("leased", None)
