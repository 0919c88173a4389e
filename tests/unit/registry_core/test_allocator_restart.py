"""The registry's end and next start, and what the allocator knows of the past."""

from dataclasses import replace

import pytest

from registry.core.allocator import Allocator
from registry.core.commands import StopLLM, UnbindLease
from registry.core.decision import Snapshot
from registry.core.events import LLMStopped, ShutdownBegun, TimePassed, WrapperAdded, WrapperFailed, WrapperStarted
from registry.core.records import WrapperStatus
from registry.errors import ShuttingDown, UnknownMeasurement, UnknownRequest
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, asked, deploying, handed_over, llm, refused, stored_token

R, W = RequestStatus, WrapperStatus

# --- the end and the next start ----------------------------------------------------------------------------


def test_shutting_down_ends_leases_and_keeps_the_queue():
    """Leases end, every LLM is stopped, what waits stays for the next start, and nothing new is taken."""
    scene = Scene()
    scene.machine("a", wrappers=4)
    scene.machine("b")
    scene.leave_ready("A", "a-0", 1)
    scene.ask(2, "B")
    scene.hand_over("a-1")
    scene.ask(3, "C")
    scene.ask(4, "D")
    scene.runs("a-3")  # leased, not yet handed over
    scene.ask(5, "E")
    scene.hand_over("b-0")
    scene.ask(6, "F")
    scene.hand_over("a-0")
    scene.ask(7, "G")
    scene.tell(WrapperFailed("a-0", "no answer"))
    scene.tell(ShutdownBegun())
    assert {n: scene.status(f"{n}a") for n in range(2, 8)} == {
        2: R.EXPIRED,
        3: R.QUEUED,
        4: R.QUEUED,
        5: R.EXPIRED,
        6: R.EXPIRED,
        7: R.QUEUED,
    }
    assert scene.request("2a").reason == "the registry was shut down"
    unbound = [effect for effect in scene.effects if isinstance(effect, UnbindLease)]
    assert {(effect.request_id, effect.how) for effect in unbound} == {(f"{n}a", "shutdown") for n in (2, 4, 5)}
    stopped = {effect.wrapper_id for effect in scene.effects if isinstance(effect, StopLLM)}
    assert stopped == {"a-1", "a-2", "a-3", "b-0"}
    assert scene.wrapper("a-0").status is W.RESTARTING
    refused(scene, ShuttingDown, asked(8, "x"))


def test_while_shutting_down_nothing_is_granted_or_restarted():
    """A wrapper that is emptied, comes up or fails during the shutdown gets nothing to do."""
    scene = Scene()
    scene.machine("a", wrappers=2, home=llm("H"))
    scene.ask(1, "A")
    scene.tell(ShutdownBegun())
    for wrapper_id in ("a-0", "a-1"):
        scene.tell(WrapperStarted(wrapper_id, scene.wrapper(wrapper_id).epoch))
    assert {wrapper.status for wrapper in scene.allocator.wrappers()} == {W.STOPPING}
    scene.tell(WrapperFailed("a-0", "no answer"))
    assert (scene.wrapper("a-0").status, scene.effects) == (W.FAILED, ())
    scene.tell(WrapperAdded("a-0", "a", "http://new"))
    scene.tell(WrapperStarted("a-0"))
    assert (scene.wrapper("a-0").status, scene.effects) == (W.IDLE, ())
    assert scene.status("1a") is R.QUEUED
    assert not scene.tell(ShutdownBegun()).effects


def test_a_restart_knows_everything_and_does_nothing_by_itself():
    """What was written is what is known afterwards; the first event goes on where it stopped."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.ask(2, "C")
    before = scene.allocator.snapshot()
    scene.restart()
    assert scene.allocator.snapshot() == before
    assert scene.tell(TimePassed()).changes.empty
    scene.release("1a")
    assert scene.status("1b") is R.DEPLOYING


def test_what_has_ended_can_be_dropped_and_recalled():
    """A measurement that is over leaves memory whole, and comes back with the request that it was last served with."""
    scene = handed_over()
    scene.release("1a")
    measurement, request, key = scene.measurement(1), scene.request("1a"), ("default", 1)
    assert scene.allocator.is_over(key)
    scene.allocator.drop_measurement(key)
    scene.allocator.check()
    assert (scene.allocator.knows(key), scene.allocator.is_over(key)) == (False, False)
    with pytest.raises(UnknownRequest):
        scene.request("1a")
    assert scene.allocator.drop_request("1a") is None
    scene.allocator.recall(measurement, [request])
    scene.allocator.recall(measurement, [request])  # idempotent
    scene.allocator.check()
    assert (scene.measurement(1), scene.request("1a")) == (measurement, request)
    scene.ask(1, "A")
    assert scene.measurement(1).created_s == measurement.created_s


def test_a_dropped_request_is_no_longer_the_last_one_that_was_served():
    """Without it nothing is known of the machine that its measurement ran on."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.release("1a")
    assert scene.allocator.drop_request("1a") is not None
    scene.allocator.check()
    assert scene.status("1b") is R.DEPLOYING


def test_an_earlier_request_that_is_dropped_leaves_what_was_served_last():
    """The machine that the measurement ran on is still known from its last request."""
    scene = handed_over()
    scene.release("1a")
    scene.ask(1, "B")
    scene.runs()
    scene.hand_over()
    assert scene.allocator.drop_request("1a") is not None
    scene.allocator.check()
    assert scene.status("1b") is R.DEPLOYED


def test_numbers_go_on_above_those_of_what_is_not_in_memory():
    """The next request comes after all that were made before, also those that only the store knows."""
    scene = handed_over()
    scene.allocator.load(scene.allocator.snapshot(), next_seq=77)
    scene.ask(2, "A")
    assert scene.request("2a").seq == 77


def test_wrappers_are_counted_by_status():
    """Health asks for counts, not for every wrapper."""
    scene = handed_over()
    assert scene.allocator.count_wrappers([W.LEASED]) == 1
    assert scene.allocator.count_wrappers(W) == len(scene.allocator.wrappers())
    assert scene.allocator.count_wrappers([W.LOST, W.OFF]) == 0
    assert [wrapper.wrapper_id for wrapper in scene.allocator.wrappers_on("m")] == ["m-0"]


def test_requests_without_a_lease_are_counted_as_deploying():
    """One that starts counts until it is handed over; the head of its measurement is that request until it ends."""
    scene = deploying()
    head = scene.allocator.head(("default", 1))
    assert scene.allocator.deploying_count() == 1
    assert head is not None
    assert head.request_id == "1a"
    scene.runs()
    scene.hand_over()
    assert scene.allocator.deploying_count() == 0
    scene.release("1a")
    assert scene.allocator.head(("default", 1)) is None


def test_a_restart_grants_what_could_be_granted():
    """The first event after a start serves those who wait, also those bound to a machine."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.release("1a")
    scene.tell(ShutdownBegun())
    scene.restart()
    assert scene.wrapper().status is W.STOPPING
    scene.tell(WrapperStarted("m-0", scene.wrapper().epoch))
    scene.tell(LLMStopped("m-0", scene.wrapper().epoch))
    assert scene.status("1b") is R.DEPLOYING


def test_a_snapshot_in_which_somebody_waits_for_a_free_wrapper_is_put_right():
    """``load`` takes any snapshot; whoever waits in vain in it is served with the next event."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.release("1a")
    snapshot = scene.allocator.snapshot()
    waiting = Snapshot(
        machines=snapshot.machines,
        wrappers=tuple(replace(w, status=W.IDLE, spec=None, request_id=None) for w in snapshot.wrappers),
        measurements=snapshot.measurements,
        requests=tuple(
            replace(r, status=R.QUEUED, wrapper_id=None, machine_id=None) if r.request_id == "1b" else r
            for r in snapshot.requests
        ),
    )
    allocator = Allocator(scene.limits, lambda: stored_token("t"))
    allocator.load(waiting)
    decision = allocator.handle(TimePassed(), scene.now_s)
    assert [effect.wrapper_id for effect in decision.effects] == ["m-0"]
    allocator.check()


# --- reading -----------------------------------------------------------------------------------------------


def test_reads_of_what_is_not_there():
    """Unknown requests and measurements raise, unknown wrappers, machines and leases are None."""
    allocator = Scene().allocator
    with pytest.raises(UnknownRequest):
        allocator.request("x")
    with pytest.raises(UnknownMeasurement):
        allocator.measurement(("default", 1))
    assert allocator.wrapper("x") is None
    assert allocator.machine("x") is None
    assert allocator.lease_of("x") is None
    assert allocator.lease_by_wrapper("x") is None
    assert not allocator.wrappers()
    assert not allocator.machines()


def test_reads_of_what_is_there():
    """Machines and wrappers are found by id and listed."""
    scene = handed_over()
    machine = scene.allocator.machine("m")
    assert scene.allocator.machines() == (machine,)
    assert scene.allocator.wrappers() == (scene.wrapper("m-0"),)
