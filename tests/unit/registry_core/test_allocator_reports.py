"""What wrappers and machines report: LLMs that start, fail and die; wrappers and machines that come and go."""

from itertools import product

import pytest

from registry.core.commands import BindLease, DeployLLM, RestartWrapper, StopLLM, UnbindLease
from registry.core.decision import Limits
from registry.core.events import (
    LeaseBound,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    MachineJoined,
    MachineLost,
    TimePassed,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
)
from registry.core.records import Machine, WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, llm

R, W = RequestStatus, WrapperStatus
A = llm("A").fingerprint
B = llm("B").fingerprint


def handed_over(limits: Limits | None = None) -> Scene:
    """Request 1a has its LLM A on m-0."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    return scene


def ready(limits: Limits | None = None) -> Scene:
    """m-0 runs A for nobody."""
    scene = handed_over(limits)
    scene.release("1a")
    return scene


def deploying(limits: Limits | None = None) -> Scene:
    """m-0 starts A for request 1a."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    return scene


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


# --- wrappers that come ------------------------------------------------------------------------------------


def test_a_new_wrapper_serves_once_it_has_started():
    """It is not given away before it answers."""
    scene = Scene()
    scene.ask(1, "A")
    scene.tell(WrapperAdded("w", "m", "http://w", 2))
    wrapper = scene.wrapper("w")
    assert (wrapper.status, wrapper.url, wrapper.gpus, wrapper.machine_id) == (W.STARTING, "http://w", 2, "m")
    assert scene.status("1a") is R.QUEUED
    scene.tell(WrapperStarted("w", 7))
    assert [*scene.effects] == [DeployLLM("w", 8, llm("A"), "1a")]


def test_a_wrapper_with_nothing_to_do_gets_its_home_llm():
    """The LLM that the configuration names is deployed after the start, for whoever comes."""
    scene = Scene()
    scene.machine(home=llm("H"))
    assert [*scene.effects] == [DeployLLM("m-0", 1, llm("H"))]
    assert scene.wrapper().request_id is None
    scene.ask(1, "H")
    assert scene.request_on("m-0") == "1a"


def test_those_who_wait_go_before_the_home_llm():
    """A wrapper that somebody waits for does not load its home LLM first."""
    scene = Scene()
    scene.ask(1, "A")
    scene.machine(home=llm("H"))
    assert [*scene.effects] == [DeployLLM("m-0", 1, llm("A"), "1a")]


def test_a_home_llm_that_does_not_fit_is_not_tried():
    """The wrapper stays idle."""
    scene = Scene()
    scene.machine(home=llm("H", 2), gpus=1)
    assert (scene.wrapper().status, scene.effects) == (W.IDLE, ())


def test_a_wrapper_that_runs_something_unknown_is_emptied_first():
    """An LLM that nobody knows of is stopped; then the wrapper serves, or loads its home LLM."""
    scene = Scene()
    scene.machine(home=llm("H"))
    scene.runs()
    scene.tell(WrapperStarted("m-0", 9, B))
    assert [*scene.effects] == [StopLLM("m-0", 10)]
    assert (scene.wrapper().status, scene.wrapper().spec) == (W.STOPPING, None)
    scene.tell(LLMStopped("m-0", 10))
    assert [*scene.effects] == [DeployLLM("m-0", 11, llm("H"))]


@pytest.mark.parametrize(
    ("running", "status", "effect"), [(A, W.READY, None), (None, W.IDLE, None), (B, W.STOPPING, StopLLM)]
)
def test_a_free_llm_is_found_again(running, status, effect):
    """After a restart of the registry a wrapper's LLM is kept if it is the one on record."""
    scene = ready()
    scene.restart()
    scene.tell(WrapperStarted("m-0", scene.wrapper().epoch, running))
    assert scene.wrapper().status is status
    assert [type(e) for e in scene.effects] == ([effect] if effect else [])


def test_the_end_of_a_lease_that_a_wrapper_missed_is_made_up_for():
    """The registry died before it told the wrapper of a release: the wrapper is told again before it is given away."""
    scene = ready()
    scene.restart()
    scene.tell(WrapperStarted("m-0", scene.wrapper().epoch - 1, A))
    assert [*scene.effects] == [DeployLLM("m-0", 4, llm("A"))]
    scene.runs()
    assert scene.wrapper().status is W.READY


def test_the_end_of_a_lease_is_made_up_for_while_its_llm_was_started_again():
    """The same where the lease's LLM was being started again and runs by now."""
    scene = handed_over()
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.release("1a")
    scene.restart()
    scene.tell(WrapperStarted("m-0", 3, A))
    assert scene.effects == (DeployLLM("m-0", 6, llm("A")),)


@pytest.mark.parametrize(("running", "effect"), [(A, BindLease), (None, DeployLLM), (B, DeployLLM)])
def test_a_lease_is_found_again(running, effect):
    """A lease outlives the registry: bound again where its LLM runs, else its LLM is started again."""
    scene = handed_over()
    lease = scene.allocator.lease_of("1a")
    scene.restart()
    scene.tell(WrapperStarted("m-0", 1, running))
    assert [(type(e), e.epoch) for e in scene.effects] == [(effect, 3)]
    assert scene.status("1a") is (R.DEPLOYED if running == A else R.DEPLOYING)
    assert scene.allocator.lease_of("1a") == lease
    scene.hand_over()
    assert scene.status("1a") is R.DEPLOYED


@pytest.mark.parametrize("running", [None, B])
def test_a_lease_that_is_found_without_its_llm_too_often_fails(running):
    """Deaths that nobody reported count as well; what runs instead is stopped."""
    scene = handed_over(Limits(deploy_attempts=1))
    scene.tell(WrapperStarted("m-0", 2, running))
    assert scene.status("1a") is R.FAILED
    assert scene.wrapper().status is (W.STOPPING if running else W.IDLE)


@pytest.mark.parametrize(
    ("running", "status", "effect"),
    [(A, W.LEASED, BindLease), (None, W.DEPLOYING, DeployLLM), (B, W.DEPLOYING, DeployLLM)],
)
def test_a_deploy_is_found_again(running, status, effect):
    """A deploy for a request that the registry has lost sight of is taken as done, or commanded again."""
    scene = deploying()
    scene.restart()
    scene.tell(WrapperStarted("m-0", 1, running))
    assert (scene.wrapper().status, [(type(e), e.epoch) for e in scene.effects]) == (status, [(effect, 2)])
    assert scene.request_on("m-0") == "1a"


@pytest.mark.parametrize(
    ("running", "status", "effect"), [(A, W.READY, None), (None, W.DEPLOYING, DeployLLM), (B, W.STOPPING, StopLLM)]
)
def test_a_deploy_for_nobody_is_found_again(running, status, effect):
    """The same without a request: done, commanded again, or something else to be stopped."""
    scene = deploying()
    scene.release("1a")
    scene.tell(WrapperStarted("m-0", 1, running))
    assert scene.wrapper().status is status
    assert [type(e) for e in scene.effects] == ([effect] if effect else [])


@pytest.mark.parametrize("running", [None, B])
def test_a_stop_is_commanded_again(running):
    """A wrapper that was being emptied is emptied for certain."""
    scene = ready()
    scene.tell(WrapperStarted("m-0", 3, B))
    assert scene.wrapper().status is W.STOPPING
    scene.restart()
    scene.tell(WrapperStarted("m-0", 4, running))
    assert [*scene.effects] == [StopLLM("m-0", 5)]


def test_commands_are_newer_than_anything_the_wrapper_has_seen():
    """A wrapper that knows a later epoch than the record gets a later one still."""
    scene = deploying()
    scene.tell(WrapperStarted("m-0", 40, None))
    assert [*scene.effects] == [DeployLLM("m-0", 41, llm("A"), "1a")]


# --- wrappers that are created anew ------------------------------------------------------------------------


def test_a_wrapper_created_anew_keeps_its_lease():
    """After the whole cluster was restarted the lease's LLM is deployed again and the lease goes on."""
    scene = handed_over()
    lease = scene.allocator.lease_of("1a")
    scene.tell(WrapperAdded("m-0", "m", "http://new", 0))
    assert (scene.wrapper().status, scene.wrapper().url, scene.wrapper().epoch) == (W.STARTING, "http://new", 2)
    assert (scene.status("1a"), scene.request("1a").reason) == (R.DEPLOYING, "wrapper m-0 is created again")
    assert scene.measurement(1).flags == ("engine_restarted",)
    scene.tell(WrapperStarted("m-0"))
    assert [*scene.effects] == [DeployLLM("m-0", 3, llm("A"), "1a")]
    scene.hand_over()
    assert scene.status("1a") is R.DEPLOYED
    assert scene.allocator.lease_of("1a") == lease


def test_a_wrapper_created_anew_keeps_who_waits_for_it():
    """A request that was being deployed there is deployed there once it has started; nothing is flagged."""
    scene = deploying()
    scene.tell(WrapperAdded("m-0", "m", "http://new", 0))
    assert scene.status("1a") is R.DEPLOYING
    scene.tell(WrapperStarted("m-0", 0, A))
    assert [type(e) for e in scene.effects] == [BindLease]
    assert scene.measurement(1).flags == ()


def test_a_wrapper_created_anew_without_a_holder_is_just_new():
    """What it ran before is forgotten."""
    scene = ready()
    scene.tell(WrapperAdded("m-0", "m", "http://new", 0, llm("H")))
    assert (scene.wrapper().status, scene.wrapper().spec, scene.wrapper().home) == (W.STARTING, None, llm("H"))


def test_who_waits_for_a_wrapper_created_anew_can_leave():
    """A release lets go of a wrapper that has not started yet."""
    scene = handed_over()
    scene.tell(WrapperAdded("m-0", "m", "http://new", 0))
    scene.release("1a")
    assert (scene.status("1a"), scene.wrapper().request_id, scene.wrapper().spec) == (R.RELEASED, None, None)


@pytest.mark.parametrize("was_served", [True, False])
def test_a_wrapper_created_anew_too_small_loses_its_request(was_served):
    """With too few GPUs a lease fails and whoever was waiting waits elsewhere."""
    scene = Scene()
    scene.machine(gpus=2)
    scene.ask(1, llm("A", 2))
    if was_served:
        scene.hand_over()
    scene.tell(WrapperAdded("m-0", "m", "http://new", 1))
    assert scene.status("1a") is (R.FAILED if was_served else R.QUEUED)
    assert scene.wrapper().request_id is None


def test_a_wrapper_can_come_back_on_another_machine():
    """The same id elsewhere is another wrapper: its epoch goes on, its request does not."""
    scene = handed_over()
    scene.tell(WrapperAdded("m-0", "n", "http://new", 0))
    assert (scene.wrapper().machine_id, scene.wrapper().epoch) == ("n", 2)
    assert scene.status("1a") is R.FAILED
    assert scene.changes.removed_wrappers == ()


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


def test_an_llm_that_refuses_a_request_fails_it() -> None:
    """The request has failed with the reason, and the LLM is there for others: their arguments may suit it."""
    scene = deploying()
    scene.runs()
    scene.tell(LeaseBound("m-0", scene.wrapper().epoch, refusal="it refuses every prompt of this request: why"))
    request = scene.request("1a")
    assert (request.status, request.reason) == (R.FAILED, "it refuses every prompt of this request: why")
    assert scene.wrapper().status is W.READY
