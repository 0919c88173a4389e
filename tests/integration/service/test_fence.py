"""A wrapper that is cut off from the registry, or the registry from it: whose lease is served, and for how long."""

from __future__ import annotations

from collections.abc import Callable

from registry.core.records import WrapperStatus
from registry.errors import RegistryUnheard, WrapperUnreachable
from registry.wire.words import RequestStatus as Status
from tests.support.fake_cluster import FENCE_S, FakeWrapper
from tests.support.service_world import TINY, ServiceWorld

Make = Callable[..., ServiceWorld]


def serves(wrapper: FakeWrapper) -> str | None:
    """The request whose new prompts a wrapper takes."""
    try:
        wrapper.gate.require_heard()
    except RegistryUnheard:
        return None
    return None if wrapper.grant is None else wrapper.grant.request_id


async def test_a_registry_that_watches_is_heard(world: ServiceWorld) -> None:
    """A lease is served for as long as its registry asks its wrapper how it is."""
    request_id = await world.deployed(1)
    for _ in range(3):  # less than its idle limit
        world.cluster.clock.now_s += FENCE_S - 1
        assert serves(world.wrapper()) == request_id
        await world.looked(times=3)
    assert serves(world.wrapper()) == request_id


async def test_a_lease_outlives_the_silence_of_its_registry(world: ServiceWorld) -> None:
    """With the registry gone prompts are taken until the fence, and again when the next one knows the lease."""
    request_id = await world.deployed(1)
    await world.crash()
    world.cluster.clock.now_s += FENCE_S - 1
    assert serves(world.wrapper()) == request_id
    world.cluster.clock.now_s += 1
    assert serves(world.wrapper()) is None
    await world.start()
    await world.until(lambda: serves(world.wrapper()) == request_id)
    assert world.wrapper().ended == []
    assert world.request(request_id).status is Status.DEPLOYED


async def test_the_first_prompt_after_a_restart_is_taken(world: ServiceWorld) -> None:
    """A lease that a registry hands over before it has looked at any wrapper is open when its client hears of it."""
    world.service.release(await world.deployed(1))
    await world.until(lambda: world.wrapper().grant is None)
    await world.crash()
    gate = world.cluster.hold("cluster", "observe")
    await world.start()
    request_id = await world.deployed(2)
    assert serves(world.wrapper()) == request_id
    gate.open()


async def test_a_lost_machine_that_lives_on_serves_its_old_lease_to_nobody(two: ServiceWorld) -> None:
    """Its lease has failed and its measurement goes on elsewhere: after the fence, and when it is back, it is shut."""
    first, second = two.ask(1, TINY, TINY)
    cut_off = (await two.until_status(first, Status.DEPLOYED)).machine_id
    assert cut_off is not None
    wrapper, machine = two.wrapper(f"{cut_off}-0"), two.cluster.machines.pop(cut_off)
    known = two.service._reports.belief(f"{cut_off}-0")
    two.cluster.hold("cluster", "remove").fail(WrapperUnreachable("cluster", "there is no way to it"))
    await two.until_status(first, Status.FAILED)
    assert (await two.until_status(second, Status.DEPLOYED)).machine_id != cut_off
    assert serves(wrapper) == first  # it can't know
    two.cluster.clock.now_s += FENCE_S
    assert serves(wrapper) is None

    await wrapper.hear(known)  # a report of before, which the cut has held up
    assert serves(wrapper) is None
    two.cluster.machines[cut_off] = machine
    await two.until(lambda: serves(wrapper) is not None or wrapper.ended)
    assert wrapper.ended == [(first, "withdrawn")]
    assert two.wrapper(f"{cut_off}-0") is wrapper
    await wrapper.hear(known)
    assert serves(wrapper) is None
    await two.until(lambda: two.status_of(f"{cut_off}-0") in (WrapperStatus.IDLE, WrapperStatus.READY))


async def test_a_wrapper_that_was_given_up_serves_its_old_lease_to_nobody(world: ServiceWorld) -> None:
    """A wrapper that could be neither reached nor restarted, and answers again, serves nobody unless told to."""
    request_id = await world.deployed(1)
    wrapper = world.wrapper()
    world.cluster.cut_off.add("a-0")
    await world.until_wrapper(WrapperStatus.FAILED)
    assert world.request(request_id).status is Status.FAILED
    world.cluster.clock.now_s += FENCE_S
    assert serves(wrapper) is None
    world.cluster.cut_off.clear()
    await world.until(lambda: serves(wrapper) is not None or wrapper.grant is None)
    assert serves(wrapper) is None
    await world.until_wrapper(WrapperStatus.IDLE)
    assert world.wrapper() is wrapper
    assert serves(world.wrapper()) is None
    await world.deployed(2)
