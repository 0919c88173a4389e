"""A measurement that goes on stays on its machine: it waits for it, for a while, though others are free."""

from __future__ import annotations

import pytest

from registry.core.decision import Limits
from registry.core.events import MachineDrained, MachineLost, TimePassed
from registry.core.fit import GIB
from registry.core.records import LLMMemory
from registry.errors import LLMNeverFits
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, llm, next_deadline_s

R = RequestStatus


def memory(gib: int) -> LLMMemory:
    return LLMMemory(gib * GIB)


def served_on_a(sticky_s: float = 600.0) -> Scene:
    """Measurement 1 was served on machine a from 1000 to 1010; then b joined, and 2 got a. It is 1020."""
    scene = Scene(Limits(sticky_s=sticky_s))
    scene.machine("a", gib=32)
    scene.ask(1, "A")
    scene.hand_over("a-0")
    scene.now_s = 1010.0
    scene.release("1a")
    scene.now_s = 1020.0
    scene.ask(2, "A")
    scene.machine("b", gib=64)
    scene.hand_over("a-0")
    return scene


def test_it_waits_for_its_machine_beside_a_free_one() -> None:
    """POST, use, DELETE, POST under one id: the second is served on the same machine, when that is free again."""
    scene = served_on_a()
    scene.ask(1, "A")
    assert scene.status("1b") is R.QUEUED
    assert (scene.measurement(1).machine_id, scene.measurement(1).pinned_until_s) == ("a", 1610.0)
    scene.release("2a")
    assert scene.request("1b").machine_id == "a"
    scene.hand_over("a-0")
    assert (scene.measurement(1).flags, scene.measurement(1).pinned_until_s) == ((), None)


def test_many_repetitions_stay_on_one_machine() -> None:
    """Four repetitions, each asked for after the last was given back, on two idle machines: a, a, a, a."""
    scene = Scene()
    scene.machine("a")
    scene.machine("b")
    machines = []
    for n in range(4):
        scene.ask(1, "A")
        request = scene.request(f"1{'abcd'[n]}")
        assert request.wrapper_id is not None
        scene.hand_over(request.wrapper_id)
        machines.append(request.machine_id)
        scene.now_s += 100
        scene.release(request.request_id)
    assert len(set(machines)) == 1


def test_it_waits_no_longer_than_it_should() -> None:
    """600 s after its last LLM was given back (at 1010) it is served elsewhere, at 1610 and not before, and flagged."""
    scene = served_on_a()
    scene.ask(1, "A")
    assert next_deadline_s(scene.allocator) == 1610.0
    scene.now_s = 1609.0
    scene.tell(TimePassed(asked=()))
    assert scene.status("1b") is R.QUEUED
    scene.now_s = 1610.0
    assert scene.allocator.pins_due(scene.now_s) == (("default", 1),)
    scene.tell(TimePassed(asked=()))
    assert scene.request("1b").machine_id == "b"
    assert scene.measurement(1).flags == ("machine_changed",)


def test_later_it_goes_anywhere() -> None:
    """Who comes back after that time does not wait at all."""
    scene = served_on_a()
    scene.now_s = 1610.0
    scene.ask(1, "A")
    assert scene.request("1b").machine_id == "b"
    assert scene.measurement(1).flags == ("machine_changed",)


def test_it_survives_a_restart() -> None:
    """A registry that was restarted between the two, or while the second waits, sends it to the same machine."""
    scene = served_on_a()
    scene.restart()
    scene.ask(1, "A")
    scene.restart()
    assert scene.measurement(1).pinned_until_s == 1610.0
    scene.release("2a")
    assert scene.request("1b").machine_id == "a"


def test_it_does_not_wait_for_what_is_gone() -> None:
    """A machine that is drained, lost, or whose wrapper has failed for good is not waited for: b, with a flag."""
    for event, flags in (
        (MachineDrained("a"), ("machine_changed", "machine_drained")),
        (MachineLost("a", "gone"), ("machine_changed",)),
    ):
        before, meanwhile = served_on_a(), served_on_a()
        before.tell(event)
        before.ask(1, "A")
        meanwhile.ask(1, "A")
        meanwhile.tell(event)
        for scene in (before, meanwhile):
            assert scene.request("1b").machine_id == "b"
            assert (scene.measurement(1).flags, scene.measurement(1).pinned_until_s) == (flags, None)


def test_it_is_not_bound_to_a_machine_that_is_too_small() -> None:
    """A larger LLM than its machine can run is served elsewhere; also where it is added while the first one waits."""
    scene = served_on_a()
    scene.ask(1, "L", memory=memory(40))
    assert scene.request("1b").machine_id == "b"

    scene = served_on_a()
    scene.ask(1, "A")
    scene.ask(1, "B", memory=memory(8))
    assert scene.measurement(1).machine_id == "a"
    scene.ask(1, "L", memory=memory(40))
    assert scene.request("1b").machine_id == "b"
    scene.hand_over("b-0")
    scene.release("1b")
    scene.hand_over("b-0")
    scene.release("1c")
    assert scene.request("1d").machine_id == "b"


def test_it_stays_where_it_was_served_since() -> None:
    """Once it was handed over there again the pin has no end, and what is too large for that machine is refused."""
    scene = served_on_a()
    scene.release("2a")
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    scene.now_s = 3000.0
    scene.tell(TimePassed(asked=()))
    assert scene.measurement(1).machine_id == "a"
    with pytest.raises(LLMNeverFits, match="bound to machine a"):
        scene.ask(1, "L", memory=memory(40))


def test_another_type_of_gpu_is_not_held_up() -> None:
    """Who asks for a type of GPU that its machine has not is not bound to it."""
    scene = Scene()
    scene.machine("a", gpus=1, gpu_type="H100")
    scene.ask(1, llm("A", 1))
    scene.hand_over("a-0")
    scene.release("1a")
    scene.machine("b", gpus=1, gpu_type="A100")
    scene.ask(1, llm("A", 1), gpu_type="A100")
    assert scene.request("1b").machine_id == "b"
    assert scene.measurement(1).flags == ("machine_type_changed",)


def test_it_is_tried_on_its_machine_again() -> None:
    """An LLM whose start fails on one wrapper of its machine is tried on the other one there, not on b."""
    scene = Scene()
    scene.machine("a", wrappers=2)
    scene.ask(1, "A")
    scene.hand_over("a-0")
    scene.release("1a")
    scene.machine("b")
    scene.ask(1, "C")
    first = scene.request("1b").wrapper_id
    assert first in ("a-0", "a-1")
    scene.breaks(first)
    second = scene.request("1b").wrapper_id
    assert {first, second} == {"a-0", "a-1"}


def test_a_pin_that_ends_during_a_start_does_not_end_the_start() -> None:
    """The time is over while its LLM is being started there: it goes on; if that fails it may go elsewhere."""
    scene = served_on_a()
    scene.release("2a")
    scene.ask(1, "C")
    assert scene.request("1b").machine_id == "a"
    scene.now_s = 1610.0
    scene.tell(TimePassed(asked=()))
    assert (scene.measurement(1).machine_id, scene.measurement(1).pinned_until_s) == ("a", None)
    assert scene.status("1b") is R.DEPLOYING
    scene.breaks("a-0")
    assert scene.request("1b").machine_id == "b"


def test_nothing_is_pinned_that_was_never_served() -> None:
    """What was cancelled before it was handed over binds its measurement to nothing."""
    scene = Scene()
    scene.machine("a")
    scene.ask(1, "A")
    scene.release("1a")
    scene.ask(1, "A")
    assert scene.measurement(1).pinned_until_s is None
