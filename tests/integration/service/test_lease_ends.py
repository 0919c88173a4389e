"""How leases end: by a release, or because nobody uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from registry.core.records import WrapperStatus
from registry.errors import (
    UnknownRequest,
    WrapperUnreachable,
)
from registry.service import views
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import LIMIT_S, OTHER, TINY, ServiceWorld

Make = Callable[..., ServiceWorld]


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
