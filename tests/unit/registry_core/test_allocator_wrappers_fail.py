"""Wrappers that fail, and wrappers and machines that go."""

import pytest

from registry.core.commands import DeployLLM, RestartWrapper
from registry.core.decision import Limits
from registry.core.events import (
    LLMDied,
    LLMStopped,
    MachineJoined,
    MachineLost,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
)
from registry.core.records import Machine, WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, deploying, handed_over, llm, ready

R, W = RequestStatus, WrapperStatus
A = llm("A").fingerprint

# --- wrappers that fail ------------------------------------------------------------------------------------


def test_a_failing_wrapper_is_restarted_a_few_times():
    """Then it is given up, visibly; and it is back when it answers again."""
    scene = ready(Limits(wrapper_attempts=3))
    for failures in (1, 2):
        scene.tell(WrapperFailed("m-0", "no answer"))
        assert (scene.wrapper().status, scene.wrapper().failures) == (W.RESTARTING, failures)
        assert [*scene.effects] == [RestartWrapper("m-0", 3 + failures)]
        assert scene.wrapper().spec is None
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert (scene.wrapper().status, scene.wrapper().reason, scene.effects) == (W.FAILED, "no answer", ())
    assert scene.tell(WrapperFailed("m-0", "still no answer")).changes.empty
    scene.tell(WrapperStarted("m-0"))
    assert scene.wrapper().status is W.IDLE
    scene.ask(2, "A")
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert scene.wrapper().status is W.FAILED  # nothing has worked in between


@pytest.mark.parametrize("works", ["runs", "bound"])
def test_success_forgets_failures(works):
    """Failures are counted in a row: an LLM that runs, or a lease that is bound, ends the row."""
    scene = deploying()
    if works == "bound":
        scene.runs()
    scene.tell(WrapperFailed("m-0", "no answer"))
    scene.tell(WrapperStarted("m-0", 0, A))
    if works == "bound":
        scene.bound()
    assert (scene.wrapper().failures, scene.wrapper().reason) == (0, None)


def test_a_lease_outlives_a_restart_of_its_wrapper():
    """Its LLM is deployed again and the same lease bound again."""
    scene = handed_over()
    lease = scene.allocator.lease_of("1a")
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.DEPLOYING, "wrapper m-0 is restarted: no answer")
    scene.tell(WrapperStarted("m-0"))
    assert [type(e) for e in scene.effects] == [DeployLLM]
    scene.hand_over()
    assert scene.allocator.lease_of("1a") == lease
    assert scene.measurement(1).flags == ("engine_restarted",)


def test_a_lease_whose_wrapper_keeps_failing_ends():
    """A wrapper that crashes whenever it serves a lease fails the request, and starts again for others."""
    scene = handed_over(Limits(deploy_attempts=2))
    scene.tell(WrapperFailed("m-0", "crashed"))
    scene.tell(WrapperStarted("m-0"))
    scene.hand_over()
    scene.tell(WrapperFailed("m-0", "crashed"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "wrapper m-0 is restarted: crashed")
    assert (scene.wrapper().status, scene.wrapper().request_id) == (W.RESTARTING, None)


def test_a_wrapper_that_is_given_up_fails_its_lease():
    """The holder is told why."""
    scene = handed_over(Limits(wrapper_attempts=1))
    scene.machine("n")
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "wrapper m-0 was given up: no answer")
    assert scene.effects == ()


def test_a_wrapper_that_is_given_up_sends_who_waits_elsewhere():
    """A request that was not handed over is tried on another wrapper, also when its lease was made already."""
    scene = deploying(Limits(wrapper_attempts=1))
    scene.runs()
    scene.machine("n")
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert (scene.status("1a"), scene.request("1a").wrapper_id) == (R.DEPLOYING, "n-0")
    assert scene.allocator.lease_of("1a") is None


def test_a_wrapper_that_is_given_up_and_was_the_only_one_fails_who_waits():
    """With nowhere else to go the request fails with the reason."""
    scene = deploying(Limits(wrapper_attempts=1))
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "wrapper m-0 was given up: no answer")


def test_a_measurement_leaves_a_machine_whose_wrapper_is_given_up():
    """Its machine serves nobody any more, so it goes on elsewhere and says so."""
    scene = handed_over(Limits(wrapper_attempts=1))
    scene.ask(1, "B")
    scene.machine("n")
    scene.tell(WrapperFailed("m-0", "no answer"))
    assert scene.request("1b").wrapper_id == "n-0"
    assert scene.measurement(1).flags == ("machine_changed",)


# --- wrappers and machines that go -------------------------------------------------------------------------


@pytest.mark.parametrize("event", [WrapperRemoved("m-0"), MachineLost("m", "it left the Ray cluster")])
def test_what_was_handed_over_fails_with_its_wrapper(event):
    """Whoever prompts an LLM on a machine that is gone is told so."""
    scene = handed_over()
    scene.tell(event)
    assert scene.status("1a") is R.FAILED
    assert scene.allocator.lease_of("1a") is None
    if isinstance(event, MachineLost):
        assert scene.request("1a").reason == "machine m was lost: it left the Ray cluster"
        machine = scene.allocator.machine("m")
        assert machine is not None
        assert not machine.alive
        assert (scene.wrapper().status, scene.wrapper().spec) == (W.LOST, None)
        assert scene.tell(event).changes.empty
    else:
        assert scene.request("1a").reason == "wrapper m-0 was removed"
        assert scene.changes.removed_wrappers == ("m-0",)
        assert scene.allocator.wrapper("m-0") is None


@pytest.mark.parametrize("event", [WrapperRemoved("m-0"), MachineLost("m", "it left the Ray cluster")])
@pytest.mark.parametrize("leased", [True, False])
def test_what_was_not_handed_over_waits_again(event, leased):
    """A request loses nothing with a wrapper that it did not have yet."""
    scene = deploying()
    if leased:
        scene.runs()
    scene.tell(event)
    assert (scene.status("1a"), scene.allocator.lease_of("1a")) == (R.QUEUED, None)
    scene.machine("n")
    assert scene.request("1a").wrapper_id == "n-0"
    assert scene.measurement(1).flags == ()


def test_a_lease_that_waits_for_its_llm_fails_with_the_machine():
    """Once handed over, a request is not silently moved, also while its LLM is started again."""
    scene = handed_over()
    scene.tell(LLMDied("m-0", 2, "killed"))
    scene.tell(MachineLost("m", "gone"))
    assert scene.status("1a") is R.FAILED


def test_a_lost_machine_serves_again_once_its_wrapper_answers():
    """A report that was under way when the machine was lost does not bring it back; the machine itself does."""
    scene = ready()
    machine = scene.allocator.machine("m")
    assert machine is not None
    scene.tell(MachineLost("m", "gone"))
    assert scene.tell(WrapperStarted("m-0", 3)).changes.empty
    assert scene.tell(WrapperFailed("m-0", "gone")).changes.empty
    scene.ask(2, "A")
    scene.tell(MachineJoined(machine))
    assert (scene.wrapper().status, scene.status("2a")) == (W.LOST, R.QUEUED)
    scene.tell(WrapperStarted("m-0", 3))
    scene.tell(LLMStopped("m-0", scene.wrapper().epoch))
    assert scene.status("2a") is R.DEPLOYING


def test_a_wrapper_of_a_machine_nobody_told_of_serves():
    """The machine's record may come later."""
    scene = Scene()
    scene.tell(WrapperAdded("w", "m", "http://w"))
    scene.tell(MachineLost("m", "gone"))
    assert scene.wrapper("w").status is W.LOST
    scene.tell(WrapperStarted("w"))
    assert scene.wrapper("w").status is W.IDLE


def test_what_is_known_of_a_machine_can_change():
    """A machine's GPU type found out later counts from then on; the same news again is no news."""
    scene = Scene()
    scene.machine("a")
    scene.machine("b", gpu_type="H100")
    known = Machine("a", "node-a", "10.0.0.1", gpu_type="H100")
    scene.tell(MachineJoined(known))
    assert scene.tell(MachineJoined(known)).changes.empty
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    scene.tell(MachineLost("a", "gone"))
    assert scene.measurement(1).flags == ("machine_changed",)


@pytest.mark.parametrize("event", [WrapperRemoved("n-0"), MachineLost("n", "gone")])
def test_a_request_fails_when_the_last_wrapper_it_could_try_is_gone(event):
    """An LLM that failed on all wrappers that are left would wait for ever."""
    scene = deploying()
    scene.machine("n")
    scene.ask(2, "B")
    scene.hand_over("n-0")
    scene.breaks("m-0")
    assert scene.status("1a") is R.QUEUED
    scene.tell(event)
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "out of memory")


def test_a_request_waits_while_everything_is_lost():
    """What failed somewhere waits until the cluster is back, and fails if it comes back without a wrapper to try."""
    scene = deploying()
    scene.machine("n")
    scene.ask(2, "B")
    scene.hand_over("n-0")
    scene.breaks("m-0")
    scene.tell(WrapperRemoved("m-0"))
    scene.tell(MachineLost("n", "gone"))
    assert scene.status("1a") is R.QUEUED
    scene.machine("m")
    assert scene.status("1a") is R.FAILED
