"""What clients ask of the service, and what they get: hand-overs, releases, waits, the same request again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from registry.core.events import MachineJoined, NewRequest
from registry.core.records import LLMMemory, WrapperStatus
from registry.errors import (
    EngineStartFailed,
    IdempotencyConflict,
    LLMNeverFits,
    QueueFull,
    UnknownMeasurement,
    UnknownRequest,
    WrapperUnreachable,
)
from registry.service import views
from registry.service.service import Idempotency
from registry.wire.schemas import AcceptedRequest
from registry.wire.words import Priority
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import BIG, LIMIT_S, OTHER, THIRD, TINY, ServiceWorld, config_of

Make = Callable[..., ServiceWorld]


# --- hand-over ---------------------------------------------------------------------------------------------


async def test_llm_is_deployed_and_handed_over(world: ServiceWorld) -> None:
    """A request deploys its LLM and gets an address, which the wrapper accepts before anybody is told of it."""
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
    """Where every wrapper has an LLM, one that nobody uses makes room."""
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


# --- releases ----------------------------------------------------------------------------------------------


async def test_release_ends_the_lease_at_the_wrapper(world: ServiceWorld) -> None:
    """After a release the wrapper refuses the address, and keeps the LLM for whoever comes."""
    request_id = await world.deployed(1)
    world.service.release(request_id)
    assert world.request(request_id).status is Status.RELEASED
    await world.until(lambda: world.wrapper().grant is None)
    assert world.wrapper().ended == [(request_id, "released")]
    assert world.status_of() is WrapperStatus.READY


async def test_second_release_frees_nobody_else(world: ServiceWorld) -> None:
    """Releasing again changes nothing, and never ends the lease of who came after."""
    first = await world.deployed(1)
    world.service.release(first)
    second = await world.deployed(2)
    world.service.release(first)
    await world.looked()
    assert world.request(second).status is Status.DEPLOYED
    assert world.wrapper().grant is not None


async def test_release_cancels_what_waits(world: ServiceWorld) -> None:
    """A release of a queued request takes it out of the queue; one that is deploying stops being waited for."""
    gate = world.cluster.hold("a-0", "deploy")
    (deploying,) = world.ask(1, TINY)
    (queued,) = world.ask(2, OTHER)
    await world.until(lambda: gate.arrived)
    world.service.release(queued)
    world.service.release(deploying)
    assert world.request(queued).status is world.request(deploying).status is Status.CANCELLED
    gate.open()
    await world.until_wrapper(WrapperStatus.READY)
    await world.deployed(3, TINY)
    assert world.wrapper().starts == 1


async def test_unknown_requests(world: ServiceWorld) -> None:
    """An id that was never given is unknown to every call."""
    with pytest.raises(UnknownRequest):
        world.service.release("none")
    with pytest.raises(UnknownRequest):
        await world.service.keep_alive("none")
    with pytest.raises(UnknownRequest):
        await world.service.wait_for_change("none", 1.0)


@pytest.mark.parametrize("misses", [1, 2, 3])
async def test_end_of_a_lease_is_sent_again(world: ServiceWorld, misses: int) -> None:
    """A wrapper that does not answer to the end of a lease is told again."""
    request_id = await world.deployed(1)
    world.cluster.fail("a-0", "unbind", *[WrapperUnreachable("a-0", "no answer")] * misses)
    world.service.release(request_id)
    await world.until(lambda: world.wrapper().grant is None)
    assert world.cluster.calls["a-0", "unbind"] == misses + 1
    assert world.status_of() is WrapperStatus.READY


async def test_end_of_a_lease_that_can_not_be_told(world: ServiceWorld) -> None:
    """A wrapper that can't be told that a lease has ended is restarted: nobody prompts there any more."""
    request_id = await world.deployed(1)
    world.cluster.fail("a-0", "unbind", *[WrapperUnreachable("a-0", "no answer")] * 4)
    world.service.release(request_id)
    await world.until(lambda: world.cluster.calls["a-0", "restart"])
    await world.until_wrapper(WrapperStatus.IDLE)
    assert world.wrapper().grant is None


async def test_release_while_it_is_handed_over(world: ServiceWorld) -> None:
    """A release that comes while the wrapper is being told of the lease leaves no lease there."""
    world.service.release(await world.deployed(1))
    binding = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(2, TINY)
    await world.until(lambda: binding.arrived)
    world.service.release(request_id)
    await world.until(lambda: world.cluster.calls["a-0", "unbind"] == 2)
    binding.open()
    await world.looked()
    assert world.wrapper().grant is None
    assert world.status_of() is WrapperStatus.READY
    assert world.request(request_id).status is Status.CANCELLED


async def test_the_next_lease_ends_the_one_before(world: ServiceWorld) -> None:
    """Where a release hands the LLM on, the wrapper is told once: to take the next lease in place of the last."""
    first = await world.deployed(1)
    (second,) = world.ask(2, TINY)
    world.service.release(first)
    await world.until_status(second, Status.DEPLOYED)
    grant = world.wrapper().grant
    assert grant is not None
    assert grant.request_id == second
    assert world.cluster.calls["a-0", "unbind"] == 0


async def test_a_release_ends_the_lease_before_it_too(world: ServiceWorld) -> None:
    """Who was to take over and is gone in the same moment leaves no lease: not its own, and not the one before."""
    first = await world.deployed(1)
    (second,) = world.ask(2, TINY)
    world.service.release(first)
    world.service.release(second)
    await world.until(lambda: world.wrapper().grant is None)
    assert world.cluster.calls["a-0", "unbind"] == 1


async def test_release_before_the_hand_over_begins(world: ServiceWorld) -> None:
    """A release in the same moment as the grant: the wrapper is told of no lease at all."""
    world.service.release(await world.deployed(1))
    await world.until(lambda: world.wrapper().grant is None)
    binds = world.cluster.calls["a-0", "bind"]
    (request_id,) = world.ask(2, TINY)
    world.service.release(request_id)
    await world.until(lambda: world.cluster.calls["a-0", "unbind"] == 2)
    await world.looked()
    assert world.cluster.calls["a-0", "bind"] == binds
    assert world.request(request_id).status is Status.CANCELLED
    assert world.status_of() is WrapperStatus.READY


# --- time --------------------------------------------------------------------------------------------------


async def test_idle_lease_expires(world: ServiceWorld) -> None:
    """A lease that nobody uses ends at its idle limit; its wrapper refuses the address and serves the next."""
    request_id = await world.deployed(1)
    world.wrapper().idle_for_s = 100.0
    world.clock.now_s += 99.9
    await world.looked()
    assert world.request(request_id).status is Status.DEPLOYED
    world.clock.now_s += 0.1
    await world.until_status(request_id, Status.EXPIRED)
    assert world.request(request_id).reason == "it was not used for 100 s"
    await world.until(lambda: world.wrapper().grant is None)
    assert world.wrapper().ended == [(request_id, "expired")]
    await world.deployed(2)


async def test_use_extends_a_lease(world: ServiceWorld) -> None:
    """Prompts, of which the registry learns by the wrapper's reports, keep a lease, up to its deadline."""
    request_id = await world.deployed(1)
    world.wrapper().idle_for_s = 0.0
    for _ in range(9):
        world.clock.now_s += 99.0
        await world.looked()
        assert world.request(request_id).status is Status.DEPLOYED
    state = views.request_state(world.service, world.request(request_id))
    assert state.expiresAt is not None
    assert state.idleAfter is not None
    world.clock.now_s += 1000 - 9 * 99
    await world.until_status(request_id, Status.EXPIRED)
    assert world.request(request_id).reason == "its lease reached its deadline"


async def test_use_is_written_down_now_and_then(world: ServiceWorld) -> None:
    """Prompts of every second are not a commit each, and still no second of the lease they extend is lost."""
    request_id = await world.deployed(1)
    begun_s = world.clock.now_s
    world.clock.now_s += 4.0
    await world.looked()
    lease = world.service.allocator.lease_of(request_id)
    assert lease is not None
    assert lease.last_active_s == begun_s
    world.wrapper().idle_for_s = 96.5  # last used after 3.5 s, which is not written down
    world.clock.now_s = begun_s + 100.0
    await world.looked()
    assert world.request(request_id).status is Status.DEPLOYED
    world.wrapper().idle_for_s = 100.0
    world.clock.now_s = begun_s + 103.5
    await world.until_status(request_id, Status.EXPIRED)


async def test_prompt_of_the_last_moment_extends(world: ServiceWorld) -> None:
    """Before a lease expires its wrapper is asked: a prompt that no report has told of yet keeps it."""
    request_id = await world.deployed(1)
    await world.looked()
    late = world.cluster.hold("a-0", "report")  # the watching hears nothing from now on …
    await world.until(lambda: late.arrived)
    world.wrapper().idle_for_s = 0.5
    world.clock.now_s += 100.0
    await world.until(lambda: late.arrived >= 2)  # … and this is the question of the last moment
    late.open()
    await world.looked()
    assert world.request(request_id).status is Status.DEPLOYED
    lease = world.service.allocator.lease_of(request_id)
    assert lease is not None
    assert lease.last_active_s >= world.clock.now_s - 0.5


async def test_unreachable_wrapper_keeps_no_lease(world: ServiceWorld) -> None:
    """A lease whose wrapper does not answer at the last moment ends."""
    request_id = await world.deployed(1)
    await world.looked()
    gate = world.cluster.hold("a-0", "report")
    await world.until(lambda: gate.arrived)
    world.clock.now_s += 100.0
    await world.until(lambda: gate.arrived >= 2)
    gate.fail(WrapperUnreachable("a-0", "no answer"))
    await world.until_status(request_id, Status.EXPIRED)


async def test_wrapper_that_hangs_delays_only_its_own_lease(two: ServiceWorld) -> None:
    """Of two leases that are over one is on a wrapper that does not answer: the other ends, and it at its deadline."""
    hangs, other = await two.deployed(1), await two.deployed(2, OTHER)
    assert two.request(hangs).wrapper_id == "a-0"
    gate = two.cluster.hold("a-0", "report")
    await two.until(lambda: gate.arrived)
    two.wrapper("b-0").idle_for_s = 100.0
    two.clock.now_s += 100.0
    await two.until(lambda: gate.arrived >= 2)
    await two.until_status(other, Status.EXPIRED)
    assert two.request(hangs).status is Status.DEPLOYED
    await two.deployed(3, OTHER)

    two.clock.now_s += 900.0
    await two.until_status(hangs, Status.EXPIRED)
    assert gate.arrived == 2  # the question was asked once in all that time
    gate.open()
    await two.looked("a-0")


async def test_keep_alive_extends(world: ServiceWorld) -> None:
    """A keep-alive reaches the wrapper and starts the idle time anew."""
    request_id = await world.deployed(1)
    world.wrapper().idle_for_s = 90.0
    world.clock.now_s += 90.0
    request = await world.service.keep_alive(request_id)
    assert request.status is Status.DEPLOYED
    assert world.wrapper().idle_for_s == 0.0
    lease = world.service.allocator.lease_of(request_id)
    assert lease is not None
    assert lease.ends_s == world.clock.now_s + 100.0


async def test_keep_alive_that_does_not_arrive(world: ServiceWorld) -> None:
    """A keep-alive that the wrapper did not get is an error, and extends nothing."""
    request_id = await world.deployed(1)
    before = world.service.allocator.lease_of(request_id)
    world.cluster.fail("a-0", "touch", WrapperUnreachable("a-0", "no answer"))
    with pytest.raises(WrapperUnreachable):
        await world.service.keep_alive(request_id)
    assert world.service.allocator.lease_of(request_id) == before


async def test_keep_alive_that_comes_too_late(world: ServiceWorld) -> None:
    """A keep-alive of a lease that its wrapper has just ended extends nothing: the registry ends it in its time."""
    request_id = await world.deployed(1)
    before = world.service.allocator.lease_of(request_id)
    world.wrapper().gate.unbind("expired")
    await world.service.keep_alive(request_id)
    assert world.service.allocator.lease_of(request_id) == before
    world.clock.now_s += 100.0
    await world.until_status(request_id, Status.EXPIRED)


async def test_keep_alive_while_an_engine_is_started_again(world: ServiceWorld) -> None:
    """A keep-alive counts though the wrapper, whose process is new, does not know of the lease yet."""
    request_id = await world.deployed(1)
    world.cluster.hold("a-0", "deploy")
    world.cluster.kill_process("a-0")
    await world.until_status(request_id, Status.DEPLOYING)
    world.wrapper().gate.unbind("its process is new")
    world.clock.now_s += 50.0
    await world.service.keep_alive(request_id)
    lease = world.service.allocator.lease_of(request_id)
    assert lease is not None
    assert lease.last_active_s == world.clock.now_s


async def test_keep_alive_of_what_is_not_held(world: ServiceWorld) -> None:
    """A keep-alive of a request without a lease tells how it stands and touches nobody."""
    request_id = await world.deployed(1)
    (waits,) = world.ask(2, OTHER)
    world.service.release(request_id)
    assert (await world.service.keep_alive(request_id)).status is Status.RELEASED
    assert (await world.service.keep_alive(waits)).request_id == waits
    assert world.cluster.calls["a-0", "touch"] == 0


async def test_a_warm_llm_is_ours_in_the_answer(world: ServiceWorld) -> None:
    """The answer to a POST waits for the wrapper that has the LLM, and tells of it; the next of the POST is queued."""
    world.service.release(await world.deployed(1))
    asked = [world.request(request_id) for request_id in world.ask(2, TINY, TINY)]
    async with asyncio.timeout(LIMIT_S):
        first, second = await world.service.granted(asked)
    assert (first.status, second.status) == (Status.DEPLOYED, Status.QUEUED)
    assert world.url(first.request_id) is not None


async def test_a_cold_llm_is_not_waited_for(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the start of an LLM nor a busy wrapper holds the answer to a POST back."""
    monkeypatch.setattr("registry.service.service.GRANT_WAIT_S", 2 * LIMIT_S)
    starts = world.cluster.hold("a-0", "deploy")
    async with asyncio.timeout(LIMIT_S):
        (first,) = await world.service.granted([world.request(request_id) for request_id in world.ask(1, TINY)])
        (waits,) = await world.service.granted([world.request(request_id) for request_id in world.ask(2, TINY)])
    assert (first.status, waits.status) == (Status.DEPLOYING, Status.QUEUED)
    starts.open()


async def test_a_wrapper_that_is_slow_does_not_hold_the_answer(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a POST goes out without the LLM when its wrapper does not take the lease soon."""
    monkeypatch.setattr("registry.service.service.GRANT_WAIT_S", 0.01)
    world.service.release(await world.deployed(1))
    binding = world.cluster.hold("a-0", "bind")
    (request,) = await world.service.granted([world.request(request_id) for request_id in world.ask(2, TINY)])
    assert request.status is Status.DEPLOYING
    binding.open()
    await world.until_status(request.request_id, Status.DEPLOYED)


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
