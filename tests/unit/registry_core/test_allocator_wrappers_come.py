"""Wrappers that come or are created anew: the allocator finds what they run, and what they lost."""

import pytest

from registry.core.commands import BindLease, DeployLLM, StopLLM
from registry.core.decision import Limits
from registry.core.events import LLMDied, LLMStopped, WrapperAdded, WrapperFailed, WrapperStarted
from registry.core.records import WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, deploying, handed_over, llm, ready

R, W = RequestStatus, WrapperStatus
A = llm("A").fingerprint
B = llm("B").fingerprint

# --- wrappers that come ------------------------------------------------------------------------------------


def test_a_new_wrapper_serves_once_it_has_started():
    """It is not given away before it answers."""
    scene = Scene()
    scene.ask(1, "A")
    scene.tell(WrapperAdded("w", "m", "http://w", 2))
    wrapper = scene.wrapper("w")
    assert (wrapper.status, wrapper.url, wrapper.gpus, wrapper.machine_id) == (W.STARTING, "http://w", 2, "m")
    assert scene.status("1a") is R.QUEUED
    scene.tell(WrapperStarted("w", 0))
    assert [*scene.effects] == [DeployLLM("w", 1, llm("A"), "1a")]


@pytest.mark.parametrize("status", [W.STARTING, W.FAILED])
def test_an_old_process_is_emptied_before_it_serves(status):
    """It may be starting an LLM, with the token of a lease that has ended: neither is in its report's ``running``."""
    scene = handed_over(Limits(wrapper_attempts=1))
    scene.tell(WrapperFailed("m-0", "hangs"))
    if status is W.STARTING:
        scene.tell(WrapperAdded("m-0", "m", "http://m-0", 0))
    scene.ask(2, "A")
    assert scene.wrapper().status is status
    scene.tell(WrapperStarted("m-0", 2))
    assert [*scene.effects] == [StopLLM("m-0", 3)]
    scene.tell(LLMStopped("m-0", 3))
    assert [*scene.effects] == [DeployLLM("m-0", 4, llm("A"), "2a")]


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
    ("running", "status", "effect"), [(A, W.READY, None), (None, W.STOPPING, StopLLM), (B, W.STOPPING, StopLLM)]
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
    assert scene.wrapper().status is W.STOPPING


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
