"""Draining: no new leases on a machine, the rest goes on, and what waits goes elsewhere."""

from __future__ import annotations

import pytest

from registry.core.commands import BindLease, DeployLLM, RestartWrapper
from registry.core.decision import Changes
from registry.core.events import (
    LeaseBound,
    LLMDeployed,
    MachineDrained,
    MachineJoined,
    MachineLost,
    MachineUndrained,
    WrapperAdded,
    WrapperFailed,
    WrapperStarted,
    WrapperSwitchedOff,
)
from registry.core.records import Machine, WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, UnknownMachine
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, llm

R, W = RequestStatus, WrapperStatus


@pytest.fixture
def two() -> Scene:
    """Two machines of one kind, a and b."""
    scene = Scene()
    scene.machine("a", gpus=1, gpu_type="H100")
    scene.machine("b", gpus=1, gpu_type="H100")
    return scene


@pytest.fixture
def scene() -> Scene:
    """One machine, m."""
    scene = Scene()
    scene.machine()
    return scene


def test_drained_machine_gets_no_lease(two: Scene) -> None:
    """Not for an LLM that is warm there, nor on a wrapper that is empty."""
    two.leave_ready("A", "a-0", 1)
    two.tell(MachineDrained("a"))
    two.ask(2, "A")
    two.ask(3, "B")
    assert two.request("2a").machine_id == "b"
    assert two.status("3a") is R.QUEUED


def test_lease_goes_on(scene: Scene) -> None:
    """A lease on a drained machine is served as ever, also when its engine or wrapper dies; then nobody gets it."""
    scene.ask(1, "A", "B")
    scene.hand_over()
    scene.tell(MachineDrained("m"))
    assert not scene.effects
    assert scene.status("1a") is R.DEPLOYED
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert [type(effect) for effect in scene.effects] == [RestartWrapper]
    scene.tell(WrapperStarted("m-0"))
    assert [type(effect) for effect in scene.effects] == [DeployLLM]
    scene.hand_over()
    assert scene.status("1a") is R.DEPLOYED
    scene.release("1a")
    assert scene.status("1b") is R.QUEUED
    assert scene.wrapper().status is W.READY


def test_lease_that_is_being_handed_over_stays(scene: Scene) -> None:
    """A lease is one from the moment that it is made: its wrapper has been told of it."""
    scene.leave_ready("A", "m-0", 1)
    scene.ask(2, "A")
    assert isinstance(scene.effects[-1], BindLease)
    scene.tell(MachineDrained("m"))
    scene.bound()
    assert scene.status("2a") is R.DEPLOYED


def test_start_is_given_up(two: Scene) -> None:
    """Who waited for the start of an LLM there waits elsewhere, at the old place in the line."""
    two.ask(1, "A")
    two.ask(2, "B")
    two.ask(3, "C")
    two.tell(MachineDrained("a"))
    first, _, third = (two.request(f"{n}a") for n in (1, 2, 3))
    assert (first.status, first.reason) == (R.QUEUED, "machine a is being drained")
    assert third.status is R.QUEUED
    two.tell(LLMDeployed("a-0", two.wrapper("a-0").epoch))
    assert two.wrapper("a-0").status is W.READY
    assert two.status("1a") is R.QUEUED
    two.hand_over("b-0")
    two.release("2a")
    assert two.request_on("b-0") == "1a"
    assert two.measurement(1).flags == ()


def test_start_on_a_starting_wrapper_is_given_up(scene: Scene) -> None:
    """The same where the wrapper itself has to come back first."""
    scene.ask(1, "A")
    scene.tell(WrapperFailed("m-0", "no answer"))
    scene.tell(MachineDrained("m"))
    assert scene.status("1a") is R.QUEUED
    assert scene.request_on("m-0") is None


def test_measurement_moves_to_the_same_type(two: Scene) -> None:
    """Its next request goes where its machine's loss would have taken it, and says that it was drained away."""
    two.machine("c", gpus=1, gpu_type="A100")
    two.ask(1, "A", "A")
    two.hand_over("a-0")
    two.ask(2, "B")
    two.hand_over("b-0")
    two.tell(MachineDrained("a"))
    two.release("1a")
    assert two.status("1b") is R.QUEUED, "it waits for the other H100"
    two.release("2a")
    two.hand_over("b-0")
    assert two.request("1b").machine_id == "b"
    assert two.measurement(1).flags == ("machine_changed", "machine_drained")


def test_measurement_moves_to_another_type_at_last(two: Scene) -> None:
    """Where no machine of its type is left, any other will do, and it says so."""
    two.machine("c", gpus=1, gpu_type="A100")
    two.tell(MachineDrained("b"))
    two.ask(1, "A", "A", gpu_type=None)
    two.hand_over(two.request("1a").wrapper_id or "")
    served = two.request("1a").machine_id
    two.tell(MachineDrained(served or ""))
    two.release("1a")
    assert two.request("1b").machine_id == ({"a", "c"} - {served}).pop()
    assert two.measurement(1).flags == ("machine_type_changed", "machine_drained")


def test_measurement_that_named_a_type_waits(two: Scene) -> None:
    """It asked for that type, and gets it when a machine of it is undrained."""
    two.machine("c", gpus=1, gpu_type="A100")
    two.tell(MachineDrained("a"))
    two.tell(MachineDrained("b"))
    two.ask(1, "A", gpu_type="H100")
    assert two.status("1a") is R.QUEUED
    assert two.allocator.fits_only_drained("1a") == ("a", "b")
    two.tell(MachineUndrained("b"))
    assert two.request("1a").machine_id == "b"


def test_measurement_returns_with_its_machine(two: Scene) -> None:
    """A machine that is undrained before anybody moved away keeps its measurements."""
    two.ask(1, "A", "A")
    two.hand_over("a-0")
    two.ask(2, "B")
    two.tell(MachineDrained("a"))
    two.release("1a")
    assert two.status("1b") is R.QUEUED
    two.tell(MachineUndrained("a"))
    assert two.request("1b").machine_id == "a"
    assert two.measurement(1).flags == ()


def test_drain_twice_changes_nothing(scene: Scene) -> None:
    """Nor does undraining what was not drained."""
    scene.tell(MachineUndrained("m"))
    assert scene.changes == Changes()
    scene.tell(MachineDrained("m"))
    assert scene.changes != Changes()
    scene.tell(MachineDrained("m"))
    assert scene.changes == Changes()


@pytest.mark.parametrize("event", [MachineDrained("x"), MachineUndrained("x")])
def test_unknown_machine_is_refused(scene: Scene, event: MachineDrained | MachineUndrained) -> None:
    """The refusal names the machines that there are, as many as one can read."""
    with pytest.raises(UnknownMachine, match=r"no machine has the id 'x'; there are m$"):
        scene.tell(event)
    with pytest.raises(UnknownMachine, match="none has joined yet"):
        Scene().tell(event)
    for n in range(21):
        scene.tell(MachineJoined(Machine(f"n{n:02}", "node", "10.0.0.1")))
    with pytest.raises(UnknownMachine, match=r"n17, n18 and 2 more$"):
        scene.tell(event)


def test_drain_outlives_machine_and_registry(scene: Scene) -> None:
    """Drained stays drained: when the registry dies, when the machine goes and comes back, when Ray says more of it."""
    scene.tell(MachineDrained("m"))
    scene.restart()
    scene.tell(MachineLost("m", "gone"))
    scene.tell(MachineJoined(Machine("m", "node-new", "10.0.0.1", gpus=2)))
    machine = scene.allocator.known_machine("m")
    assert (machine.draining, machine.alive, machine.gpus) == (True, True, 2)


def test_switched_off_wrapper_is_remembered(scene: Scene) -> None:
    """It goes only when nobody holds it and its machine is drained; then late reports change nothing."""
    scene.ask(1, "A")
    scene.hand_over()
    scene.tell(MachineDrained("m"))
    scene.tell(WrapperSwitchedOff("m-0"))
    assert scene.wrapper().status is W.LEASED
    scene.release("1a")
    scene.tell(WrapperSwitchedOff("m-0"))
    scene.tell(WrapperSwitchedOff("gone-0"))
    off = scene.wrapper()
    assert (off.status, off.spec) == (W.OFF, None)
    for event in (WrapperStarted("m-0", off.epoch), WrapperFailed("m-0", "gone"), LeaseBound("m-0", off.epoch)):
        scene.tell(event)
    assert scene.wrapper() == off
    scene.tell(MachineUndrained("m"))
    scene.tell(WrapperSwitchedOff("m-0"))
    scene.tell(WrapperAdded("m-0", "m", "http://m-0"))
    scene.tell(WrapperSwitchedOff("m-0"))
    assert scene.wrapper().status is W.STARTING
    scene.tell(WrapperStarted("m-0"))
    scene.ask(2, "A")
    scene.hand_over()
    assert scene.status("2a") is R.DEPLOYED


def test_home_waits_for_the_undrain() -> None:
    """A wrapper that comes up empty on a drained machine stays so; undrained it gets the LLM meant for it."""
    scene = Scene()
    home = llm("home")
    scene.tell(MachineJoined(Machine("m", "node-m", "10.0.0.1")))
    scene.tell(WrapperAdded("m-0", "m", "http://m-0", 0, home))
    scene.tell(MachineDrained("m"))
    scene.tell(WrapperStarted("m-0"))
    assert not scene.effects
    scene.tell(MachineUndrained("m"))
    assert scene.effects == (DeployLLM("m-0", 1, home),)


def test_what_fits_only_there_is_accepted() -> None:
    """A drained machine comes back: an LLM that fits there alone waits, also while it is off; a larger one can't."""
    scene = Scene()
    scene.machine("small")
    scene.machine("large", gpus=8, gpu_type="H100")
    scene.tell(MachineDrained("large"))
    scene.tell(WrapperSwitchedOff("large-0"))
    scene.ask(1, llm("big", 8))
    scene.ask(2, "A", gpu_type="H100")
    scene.ask(3, "A")
    assert [scene.status(f"{n}a") for n in (1, 2, 3)] == [R.QUEUED, R.QUEUED, R.DEPLOYING]
    assert [scene.allocator.fits_only_drained(f"{n}a") for n in (1, 2)] == [("large",), ("large",)]
    assert scene.allocator.fits_only_drained("3a") == ()
    with pytest.raises(LLMNeverFits):
        scene.ask(4, llm("bigger", 16))
    with pytest.raises(InvalidField):
        scene.ask(5, "A", gpu_type="A100")


def test_pin_to_a_drained_machine_refuses_nothing(two: Scene) -> None:
    """More LLMs of a measurement whose machine is drained need not fit there: it goes on elsewhere."""
    two.machine("c", gpus=4, gpu_type="H100")
    two.ask(1, "A")
    two.hand_over("a-0")
    with pytest.raises(LLMNeverFits):
        two.ask(1, llm("big", 4))
    two.tell(MachineDrained("a"))
    two.ask(1, llm("big", 4))
    two.release("1a")
    assert two.request("1b").machine_id == "c"


def test_request_that_failed_everywhere_else_fails(two: Scene) -> None:
    """The rule of a lost machine: who was tried on all that is left is not kept waiting."""
    two.ask(9, "C")
    two.hand_over("a-0")
    two.ask(1, "A")
    two.breaks("b-0")
    assert two.status("1a") is R.QUEUED
    two.tell(MachineDrained("a"))
    assert (two.status("1a"), two.request("1a").reason) == (R.FAILED, "out of memory")


# --- versions ----------------------------------------------------------------------------------------------


def hand_over(scene: Scene, wrapper_id: str, versions: str | None) -> None:
    """The wrapper does all it was told, and says what it runs on."""
    if scene.wrapper(wrapper_id).status is W.DEPLOYING:
        scene.runs(wrapper_id)
    scene.tell(LeaseBound(wrapper_id, scene.wrapper(wrapper_id).epoch, versions=versions))


def test_other_versions_are_flagged(two: Scene) -> None:
    """A measurement whose next LLM runs on other software says so; software that is not known is no difference."""
    two.ask(1, "A", "A", "A", "A")
    hand_over(two, "a-0", '{"vllm":"1"}')
    assert two.measurement(1).versions == '{"vllm":"1"}'
    two.release("1a")
    hand_over(two, "a-0", None)
    two.release("1b")
    hand_over(two, "a-0", '{"vllm":"1"}')
    assert two.measurement(1).flags == ()
    two.tell(MachineDrained("a"))
    two.release("1c")
    hand_over(two, "b-0", '{"vllm":"2"}')
    assert two.measurement(1).flags == ("machine_changed", "machine_drained", "version_changed")
