"""Machines that an operator drains: what is used goes on, then the wrappers go, and come back when he says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from registry.core.records import WrapperStatus
from registry.errors import UnknownMachine, WrapperUnreachable
from registry.service import views
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import BIG, OTHER, TINY, ServiceWorld

Make = Callable[..., ServiceWorld]


def drain_of(world: ServiceWorld, machine_id: str = "a") -> tuple[str | None, int]:
    """How far the draining of a machine is, as /machines tells: the word, and how many leases are left."""
    state = views.machine_state(world.service, machine_id)
    return state.drain, state.leases


async def off(world: ServiceWorld, machine_id: str = "a") -> None:
    """Wait until a machine is drained."""
    await world.until(lambda: drain_of(world, machine_id) == ("drained", 0))


async def test_empty_machine_is_off_at_once(world: ServiceWorld) -> None:
    """Nobody uses it: its wrapper is removed, and nothing is created again."""
    world.service.drain("a")
    await off(world)
    assert world.cluster.wrappers == {}
    assert world.status_of() is WrapperStatus.OFF
    looks = world.cluster.calls["cluster", "observe"]
    await world.until(lambda: world.cluster.calls["cluster", "observe"] > looks + 3)
    assert world.cluster.removed == ["a-0"]
    assert drain_of(world) == ("drained", 0)


async def test_lease_is_waited_for(world: ServiceWorld) -> None:
    """The LLM stays with who has it, to the end; then its wrapper goes, and who waits is told why."""
    held = await world.deployed(1)
    world.service.drain("a")
    (waits,) = world.ask(2, OTHER)
    await world.looked(times=4)
    assert drain_of(world) == ("draining", 1)
    assert world.request(held).status is Status.DEPLOYED
    reason = views.request_state(world.service, world.request(waits)).reason
    assert reason == "every LLM Machine that it fits on is drained: a"
    world.service.release(held)
    await off(world)
    assert world.request(waits).status is Status.QUEUED


async def test_undrain_brings_everything_back(make: Make) -> None:
    """Its wrapper, the LLM that the configuration names for it, and who waits is served."""
    world = make()
    world.homes = {"a": TINY}
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.READY)
    world.service.drain("a")
    await off(world)
    world.service.undrain("a")
    await world.until_wrapper(WrapperStatus.READY)
    assert world.wrapper().spec == TINY
    assert drain_of(world) == (None, 0)
    world.service.drain("a")
    await off(world)
    (waits,) = world.ask(1, OTHER)
    world.service.undrain("a")
    await world.until_status(waits, Status.DEPLOYED)


async def test_measurement_goes_on_elsewhere(two: ServiceWorld) -> None:
    """The next LLM of a measurement that was begun there comes from another machine, and says so."""
    first, second = two.ask(1, TINY, TINY)
    await two.until_status(first, Status.DEPLOYED)
    begun_on = two.request(first).machine_id
    assert begun_on is not None
    two.service.drain(begun_on)
    two.service.release(first)
    await two.until_status(second, Status.DEPLOYED)
    assert two.request(second).machine_id != begun_on
    assert views.request_state(two.service, two.request(second)).flags == ["machine_changed", "machine_drained"]


async def test_start_moves_elsewhere(two: ServiceWorld) -> None:
    """Who waits for the start of an LLM there gets it from another machine."""
    gate = two.cluster.hold("a-0", "deploy")
    (request_id,) = two.ask(1, TINY)
    await two.until(lambda: gate.arrived)
    two.service.drain("a")
    await two.until_status(request_id, Status.DEPLOYED)
    assert two.request(request_id).machine_id == "b"
    await off(two)
    gate.open()


async def test_draining_outlives_the_registry(world: ServiceWorld) -> None:
    """A registry that is killed, or shut down, and started again drains on, and finds what is off."""
    held = await world.deployed(1)
    world.service.drain("a")
    await world.restart()
    await world.looked()
    assert drain_of(world) == ("draining", 1)
    world.service.release(held)
    await off(world)
    await world.restart()
    assert drain_of(world) == ("draining", 0), "it has not looked yet"
    await off(world)
    await world.service.shutdown()
    await world.start()
    await off(world)
    assert world.cluster.calls["cluster", "create"] == 1


async def test_draining_outlives_the_machine(world: ServiceWorld) -> None:
    """A machine that leaves and comes back stays drained, without a wrapper, until it is undrained."""
    held = await world.deployed(1)
    world.service.drain("a")
    world.cluster.leave("a")
    await world.until_status(held, Status.FAILED)
    await off(world)
    world.cluster.join("a")
    world.cluster.machines["a"] = replace(world.cluster.machines["a"], node_id="node-new", zone="z", region="r")
    await world.until(lambda: views.machine_state(world.service, "a").alive)
    await off(world)
    assert world.status_of() is WrapperStatus.OFF
    assert world.cluster.calls["cluster", "create"] == 1
    state = views.machine_state(world.service, "a")
    assert (state.zone, state.region) == ("z", "r")
    world.service.undrain("a")
    await world.deployed(2)


async def test_removal_holds_up_nothing(two: ServiceWorld) -> None:
    """While a wrapper is being removed, other machines are looked after, and it is not taken on again."""
    removing = two.cluster.hold("cluster", "remove")
    two.service.drain("a")
    await two.until(lambda: removing.arrived)
    assert drain_of(two) == ("draining", 0)
    two.cluster.join("c")
    await two.until_wrapper(WrapperStatus.IDLE, "c-0")
    two.service.undrain("a")
    looks = two.cluster.calls["cluster", "observe"]
    await two.until(lambda: two.cluster.calls["cluster", "observe"] > looks + 3)
    assert two.status_of("a-0") is WrapperStatus.OFF, "not taken on again while it is being removed"
    removing.open()
    await two.until_wrapper(WrapperStatus.IDLE, "a-0")
    assert two.cluster.removed == ["a-0"]


async def test_wrapper_that_can_not_be_removed_is_tried_again(world: ServiceWorld, logs: list[Any]) -> None:
    """Serve does not answer, or not in time: the machine is not drained until its wrapper is really gone."""
    world.expected_problems = ["wrappers could not be switched off"]
    world.cluster.fail("cluster", "remove", TimeoutError("late"), WrapperUnreachable("cluster", "away"))
    world.service.drain("a")
    await off(world)
    assert world.cluster.removed == ["a-0"]
    assert len([entry for entry in logs if entry["event"] == "wrappers could not be switched off"]) == 2


async def test_prompts_of_an_expired_lease_are_finished(world: ServiceWorld) -> None:
    """A wrapper that still answers prompts is not taken from under them; one that does not answer at all is removed."""
    world.wrapper().in_flight = 1
    world.service.drain("a")
    asked = world.cluster.calls["a-0", "report"]
    await world.until(lambda: world.cluster.calls["a-0", "report"] > asked + 4)
    assert world.cluster.removed == []
    world.cluster.fail("a-0", "report", *[WrapperUnreachable("a-0", "hangs")] * 50)
    await off(world)


async def test_drained_wrapper_is_not_looked_for(world: ServiceWorld) -> None:
    """What is off is not asked how it is, not by a registry that was started again either."""
    world.service.drain("a")
    await off(world)
    await world.restart()
    await off(world)
    asked, looks = world.cluster.calls["a-0", "report"], world.cluster.calls["cluster", "observe"]
    await world.until(lambda: world.cluster.calls["cluster", "observe"] > looks + 5)
    assert world.cluster.calls["a-0", "report"] == asked


async def test_drain_of_an_unknown_machine(world: ServiceWorld) -> None:
    """It is refused with the machines that there are, and changes nothing."""
    for call in (world.service.drain, world.service.undrain, world.service.is_off):
        with pytest.raises(UnknownMachine, match="there are a"):
            call("b")
    with pytest.raises(UnknownMachine):
        views.machine_state(world.service, "b")


async def test_what_fits_only_on_a_drained_machine_waits(make: Make) -> None:
    """It is accepted, told why it waits, and served when the machine is undrained."""
    world = make()
    world.cluster.join("a")
    world.cluster.join("big", gpus=4)
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE, "big-0")
    world.service.drain("big")
    await off(world, "big")
    (request_id,) = world.ask(1, BIG)
    reason = views.request_state(world.service, world.request(request_id)).reason
    assert reason == "every LLM Machine that it fits on is drained: big"
    world.service.undrain("big")
    await world.until_status(request_id, Status.DEPLOYED)


# --- how machines are --------------------------------------------------------------------------------------


async def test_health_of_a_machine(make: Make) -> None:
    """Not known while it starts; well while its wrappers answer; not well when one does not, or the machine is gone."""
    never = {"period_s": 0.002, "failures": 1000}
    world = make(watch=never, wrappers={"start_timeout_s": 0.05, "stop_timeout_s": 5, "fence_s": 10_000})
    world.cluster.join("a")
    starting = world.cluster.hold("a-0", "report")
    await world.start()
    await world.until(lambda: starting.arrived)

    def state() -> tuple[bool | None, str | None]:
        machine = views.machine_state(world.service, "a")
        return machine.healthy, machine.lastHeardAt

    assert state() == (None, None)
    starting.open()
    await world.until(lambda: state() == (True, "2027-01-15T08:00:00.000Z"))
    world.clock.now_s += 60.0
    world.cluster.fail("a-0", "report", *[WrapperUnreachable("a-0", "hangs")] * 50)
    await world.until(lambda: state()[0] is False)
    await world.until(lambda: state() == (True, "2027-01-15T08:01:00.000Z"))
    world.cluster.leave("a")
    await world.until(lambda: not views.machine_state(world.service, "a").alive)
    assert state()[0] is False


async def test_other_versions_are_told(two: ServiceWorld) -> None:
    """Machines that don't run the same software say so, and a measurement that moves between them is flagged."""
    two.cluster.versions = {"a": {"vllm": "0.31.0", "ray": "2"}, "b": {"vllm": "0.32.0", "ray": "2"}}
    await two.until(lambda: all(machine.differs for machine in views.machine_states(two.service)))
    by_machine = {machine.machine: machine for machine in views.machine_states(two.service)}
    assert by_machine["a"].differs == ["vllm 0.31.0, elsewhere 0.32.0"]
    first, second = two.ask(1, TINY, TINY)
    await two.until_status(first, Status.DEPLOYED)
    begun_on = two.request(first).machine_id
    assert begun_on is not None
    assert views.measurement_state(two.service, ("default", 1)).versions == two.cluster.versions[begun_on]
    two.service.drain(begun_on)
    two.service.release(first)
    await two.until_status(second, Status.DEPLOYED)
    flags = views.measurement_state(two.service, ("default", 1)).flags
    assert flags == ["machine_changed", "machine_drained", "version_changed"]
