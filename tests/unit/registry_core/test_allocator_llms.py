"""Reports of LLMs to the allocator: those that start, fail and die; and reports that are out of date."""

from itertools import product

import pytest

from registry.core.commands import BindLease, DeployLLM, UnbindLease
from registry.core.decision import Limits
from registry.core.events import (
    LeaseBound,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    MachineLost,
    TimePassed,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
)
from registry.core.records import WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, deploying, handed_over, llm, ready

R, W = RequestStatus, WrapperStatus

# --- reports that are out of date --------------------------------------------------------------------------


@pytest.mark.parametrize("of_epoch", [0, 1, 2])
def test_reports_that_do_not_match_change_nothing(of_epoch):
    """A report of an older epoch, of another status or of an unknown wrapper is no error and no news."""
    reports = [
        lambda w, e: LLMDeployed(w, e),
        lambda w, e: LLMDeployFailed(w, e, "late"),
        lambda w, e: LLMStopped(w, e),
        lambda w, e: LeaseBound(w, e),
    ]
    late = [*reports, lambda w, e: LLMDied(w, e, "late")]
    scene = handed_over()
    epoch = scene.wrapper().epoch
    assert epoch == 2
    for report, wrapper_id in product(reports if of_epoch == 2 else late, ("m-0", "nowhere")):
        decision = scene.tell(report(wrapper_id, of_epoch))
        assert decision.changes.empty
        assert not decision.effects


def test_reports_about_unknown_wrappers_and_machines_change_nothing():
    """Late news of what was removed is ignored."""
    scene = Scene()
    for event in (
        WrapperStarted("x"),
        WrapperFailed("x", "gone"),
        WrapperRemoved("x"),
        LLMDied("x", 1, "gone"),
        MachineLost("x", "gone"),
    ):
        assert scene.tell(event).changes.empty


# --- LLMs --------------------------------------------------------------------------------------------------


def test_a_deploy_that_fails_is_tried_elsewhere():
    """The request waits again at its old place, unbound, and does not go to the wrapper where it failed."""
    scene = deploying()
    scene.ask(2, "A")
    scene.machine("n")
    scene.hand_over("n-0")
    scene.breaks("m-0")
    request = scene.request("1a")
    assert (request.status, request.failed_on, request.reason) == (R.QUEUED, ("m-0",), "out of memory")
    assert (request.wrapper_id, request.machine_id, request.deploying_s) == (None, None, None)
    assert scene.measurement(1).machine_id is None
    assert (scene.wrapper("m-0").status, scene.wrapper("m-0").failures) == (W.IDLE, 0)
    scene.ask(3, "A")
    assert scene.request_on("m-0") == "3a"
    scene.release("2a")
    assert scene.request_on("n-0") == "1a"
    scene.hand_over("n-0")
    assert (scene.status("1a"), scene.request("1a").reason) == (R.DEPLOYED, None)


def test_a_measurement_that_begins_anew_is_bound_by_what_is_served_this_time():
    """A first LLM that fails leaves its measurement free to begin anywhere, though it was served somewhere before."""
    scene = Scene(Limits(sticky_s=0))
    scene.machine("a")
    scene.leave_ready("A", "a-0", 1)
    scene.machine("b")
    scene.ask(2, "A")
    scene.ask(1, "B")
    scene.breaks("b-0")
    assert scene.measurement(1).machine_id is None
    scene.machine("c")
    assert scene.request_on("c-0") == "1b"


def test_a_deploy_that_fails_for_good_fails_the_request():
    """What would fail everywhere is not tried everywhere."""
    scene = deploying()
    scene.machine("n")
    scene.breaks(permanent=True)
    request = scene.request("1a")
    assert (request.status, request.reason, request.ended_s) == (R.FAILED, "out of memory", scene.now_s)


def test_a_deploy_that_fails_everywhere_fails_the_request():
    """With no wrapper left to try, the client is told the engine's own reason."""
    scene = deploying(Limits(deploy_attempts=9))
    scene.machine("n")
    scene.breaks("m-0")
    assert scene.request_on("n-0") == "1a"
    scene.breaks("n-0")
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "out of memory")


def test_a_deploy_that_fails_too_often_fails_the_request():
    """``deploy_attempts`` wrappers are tried, however many there are."""
    scene = deploying(Limits(deploy_attempts=2))
    scene.machine("n", wrappers=3)
    scene.breaks("m-0")
    scene.breaks(str(scene.request("1a").wrapper_id))
    assert (scene.status("1a"), len(scene.request("1a").failed_on)) == (R.FAILED, 2)


def test_a_failing_llm_holds_up_nobody():
    """Behind a request that fails its measurement and others go on."""
    scene = deploying()
    scene.ask(1, "B")
    scene.ask(2, "C")
    scene.breaks(permanent=True)
    assert scene.request_on("m-0") == "1b"


def test_later_llms_of_a_measurement_are_tried_on_its_machine_only():
    """A measurement that was served on a machine stays there; with no wrapper left on it the request fails."""
    scene = handed_over(Limits(deploy_attempts=9))
    scene.machine("n")
    scene.ask(1, "B")
    scene.release("1a")
    scene.breaks("m-0")
    assert scene.status("1b") is R.FAILED
    assert scene.measurement(1).machine_id is None


def test_a_preload_that_fails_is_not_tried_again():
    """Nobody waits for it: the reason stays visible on the wrapper, which is free."""
    scene = Scene()
    scene.machine(home=llm("H"))
    scene.breaks()
    assert (scene.wrapper().status, scene.wrapper().reason, scene.effects) == (W.IDLE, "out of memory", ())
    scene.tell(TimePassed())
    assert scene.wrapper().status is W.IDLE


def test_an_llm_that_dies_unused_leaves_an_idle_wrapper():
    """Nobody had it; the reason is kept."""
    scene = ready()
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    wrapper = scene.wrapper()
    assert (wrapper.status, wrapper.spec, wrapper.reason, scene.effects) == (W.IDLE, None, "killed", ())


def test_an_llm_that_dies_under_a_lease_is_started_again_for_it():
    """The lease, its token and its deadline stay; the client is told, and the measurement flagged."""
    scene = handed_over()
    before = scene.allocator.lease_of("1a")
    assert before is not None
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    assert [*scene.effects] == [DeployLLM("m-0", 3, llm("A"), "1a")]
    assert (scene.status("1a"), scene.request("1a").reason) == (R.DEPLOYING, "killed")
    assert scene.measurement(1).flags == ("engine_restarted",)
    scene.now_s += 50
    scene.runs()
    assert [*scene.effects] == [BindLease("m-0", 4, "1a")]
    scene.bound()
    after = scene.allocator.lease_of("1a")
    assert after is not None
    assert (after.token_id, after.deadline_s, after.last_active_s) == (before.token_id, before.deadline_s, scene.now_s)
    assert scene.request("1a").deployed_s == 1000.0
    assert (scene.status("1a"), scene.request("1a").reason) == (R.DEPLOYED, None)


@pytest.mark.parametrize(("attempts", "restarted"), [(2, ("engine_restarted",)), (1, ())])
def test_why_an_llm_died_is_a_flag_of_its_measurement(attempts: int, restarted: tuple[str, ...]):
    """Whether it is started again or has failed for good. Where no lease is bound, no measurement is flagged."""
    scene = handed_over(Limits(deploy_attempts=attempts))
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "memory", ("engine_out_of_memory",)))
    assert scene.measurement(1).flags == ("engine_out_of_memory", *restarted)
    unused = ready()
    unused.tell(LLMDied("m-0", unused.wrapper().epoch, "memory", ("engine_out_of_memory",)))
    assert unused.measurement(1).flags == ()


def test_an_llm_that_keeps_dying_fails_its_request():
    """A lease outlives its LLM fewer than ``deploy_attempts`` times; the count survives the registry."""
    scene = handed_over(Limits(deploy_attempts=3))
    for _ in range(2):
        scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
        scene.hand_over()
        scene.restart()
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "killed")
    assert [(effect.how) for effect in scene.effects if isinstance(effect, UnbindLease)] == ["failed"]
    assert scene.wrapper().status is W.IDLE
    assert scene.measurement(1).flags == ("engine_restarted",)


def test_an_llm_that_does_not_come_back_fails_its_request():
    """When the second start for a lease fails, the lease ends; another wrapper would be another address."""
    scene = handed_over()
    scene.machine("n")
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.breaks()
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "out of memory")
    assert [*scene.effects] == [UnbindLease("m-0", 4, "1a", "failed")]
    assert scene.wrapper().status is W.IDLE


def test_a_lease_ends_in_time_while_its_llm_is_started_again():
    """An LLM that is being started again holds no lease beyond its end; the wrapper starts on for nobody."""
    scene = handed_over(Limits(lease_idle_s=10.0))
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.now_s += 10
    scene.tell(TimePassed())
    assert scene.status("1a") is R.EXPIRED
    assert scene.effects == (UnbindLease("m-0", 4, "1a", "expired"), DeployLLM("m-0", 5, llm("A")))
    assert (scene.wrapper().status, scene.wrapper().request_id) == (W.DEPLOYING, None)


def test_an_llm_that_refuses_a_request_fails_it() -> None:
    """The request has failed with the reason, and the LLM is there for others: their arguments may suit it."""
    scene = deploying()
    scene.runs()
    scene.tell(LeaseBound("m-0", scene.wrapper().epoch, refusal="it refuses every prompt of this request: why"))
    request = scene.request("1a")
    assert (request.status, request.reason) == (R.FAILED, "it refuses every prompt of this request: why")
    assert scene.wrapper().status is W.READY
