"""Leases of the allocator: how they begin, and how they end with time or a release."""

import pytest

from registry.core.commands import BindLease, DeployLLM, UnbindLease
from registry.core.decision import Limits
from registry.core.events import LeaseLapsed, LeaseReleased, LeaseTokenLost, LeaseUsed, LLMDied, TimePassed
from registry.core.records import WrapperStatus
from registry.errors import UnknownRequest
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, handed_over, llm, next_deadline_s

R, W = RequestStatus, WrapperStatus

# --- leases ------------------------------------------------------------------------------------------------


def test_the_lease_begins_with_the_hand_over():
    """Deadline and idle time count from the moment at which the address is given out, not from the wait before."""
    scene = Scene(Limits(lease_max_s=100.0, lease_idle_s=10.0))
    scene.machine()
    scene.ask(1, "A")
    scene.now_s = 2000.0
    scene.runs()
    lease = scene.allocator.lease_of("1a")
    assert lease is not None
    assert (lease.wrapper_id, lease.token_id, lease.granted_s) == ("m-0", "token-1", 2000.0)
    assert scene.status("1a") is R.DEPLOYING
    scene.now_s = 2005.0
    scene.bound()
    lease = scene.allocator.lease_of("1a")
    assert lease is not None
    assert (lease.deadline_s, lease.last_active_s, lease.ends_s) == (2105.0, 2005.0, 2015.0)
    assert next_deadline_s(scene.allocator) == 2015.0
    assert (scene.status("1a"), scene.request("1a").deployed_s) == (R.DEPLOYED, 2005.0)
    assert scene.allocator.lease_by_wrapper("m-0") == lease


def test_a_lease_is_held_while_now_is_before_its_end():
    """The boundary: at its last moment it is held, at its end it is not."""
    scene = handed_over(Limits(lease_idle_s=10.0))
    scene.now_s = 1009.999
    assert scene.tell(TimePassed()).changes.empty
    scene.now_s = 1010.0
    scene.tell(TimePassed())
    assert scene.status("1a") is R.EXPIRED
    assert scene.request("1a").reason == "it was not used for 10 s"
    assert [*scene.effects] == [UnbindLease("m-0", 3, "1a", "expired")]
    assert scene.wrapper().status is W.READY
    assert next_deadline_s(scene.allocator) is None


def test_a_lease_ends_at_its_deadline_however_much_it_is_used():
    """Use extends the idle time, never the deadline."""
    scene = handed_over(Limits(lease_max_s=100.0, lease_idle_s=60.0))
    for at_s in (1050.0, 1099.0):
        scene.now_s = at_s
        scene.tell(LeaseUsed("1a", at_s))
        scene.tell(TimePassed())
        assert scene.status("1a") is R.DEPLOYED
    scene.now_s = 1100.0
    scene.tell(TimePassed())
    assert (scene.status("1a"), scene.request("1a").reason) == (R.EXPIRED, "its lease reached its deadline")


def test_only_the_idle_leases_whose_wrappers_were_asked_end():
    """Of leases that were not used for too long those end that the event names; a deadline waits for nobody."""
    scene = Scene(Limits(lease_max_s=100.0, lease_idle_s=10.0))
    scene.machine(wrappers=3)
    for n in range(3):
        scene.ask(n, "A")
        scene.hand_over(f"m-{n}")
    scene.now_s += 5.0
    scene.tell(LeaseUsed("2a", scene.now_s))
    scene.now_s += 5.0
    assert [lease.request_id for lease in scene.allocator.leases_due(scene.now_s)] == ["0a", "1a"]
    assert scene.tell(TimePassed(asked=())).changes.empty
    scene.tell(TimePassed(asked=("1a", "2a")))
    assert [scene.status(f"{n}a") for n in range(3)] == [R.DEPLOYED, R.EXPIRED, R.DEPLOYED]
    scene.now_s += 90.0
    scene.tell(TimePassed(asked=()))
    assert [scene.status(f"{n}a") for n in range(3)] == [R.EXPIRED] * 3
    assert scene.request("0a").reason == "its lease reached its deadline"


def test_use_moves_the_idle_time_forward_only():
    """Late reports of use don't shorten a lease, and reports from the future don't lengthen it."""
    scene = handed_over()
    scene.now_s = 1100.0
    for at_s, last_active_s in ((1050.0, 1050.0), (1020.0, 1050.0), (5000.0, 1100.0)):
        scene.tell(LeaseUsed("1a", at_s))
        lease = scene.allocator.lease_of("1a")
        assert lease is not None
        assert lease.last_active_s == last_active_s


def test_use_of_what_has_no_lease():
    """An unknown request is an error; one that waits or has ended is not, and nothing changes."""
    scene = handed_over()
    scene.ask(2, "A")
    with pytest.raises(UnknownRequest):
        scene.tell(LeaseUsed("nobody", 0.0))
    assert scene.tell(LeaseUsed("2a", 1000.0)).changes.empty
    scene.release("2a")
    assert scene.tell(LeaseUsed("2a", 1000.0)).changes.empty


def test_all_leases_that_are_due_end_together():
    """One look at the clock ends everything that is over."""
    scene = Scene()
    scene.machine(wrappers=3)
    for n in range(3):
        scene.ask(n, "A")
        scene.hand_over(f"m-{n}")
    scene.now_s += 10_000
    scene.tell(TimePassed())
    assert {scene.status(f"{n}a") for n in range(3)} == {R.EXPIRED}


# --- releasing ---------------------------------------------------------------------------------------------


def test_releasing_frees_the_llm():
    """After the release the token is to be refused and the LLM waits for the next client."""
    scene = handed_over()
    scene.now_s += 5
    scene.release("1a")
    assert [*scene.effects] == [UnbindLease("m-0", 3, "1a", "released")]
    wrapper = scene.wrapper()
    assert (wrapper.status, wrapper.request_id, wrapper.spec) == (W.READY, None, llm("A"))
    assert wrapper.last_used_s == scene.now_s
    assert (scene.status("1a"), scene.request("1a").ended_s) == (R.RELEASED, scene.now_s)
    assert scene.changes.ended_leases == ("1a",)
    assert scene.allocator.lease_of("1a") is scene.allocator.lease_by_wrapper("m-0") is None


def test_releasing_twice_is_no_error_and_hits_nobody_else():
    """A second DELETE changes nothing, although somebody else has the wrapper by then."""
    scene = handed_over()
    scene.ask(2, "A")
    scene.release("1a")
    scene.bound()
    assert scene.status("2a") is R.DEPLOYED
    decision = scene.tell(LeaseReleased("1a"))
    assert decision.changes.empty
    assert not decision.effects
    assert scene.status("2a") is R.DEPLOYED


def test_releasing_what_never_was_is_an_error():
    """An unknown id is told apart."""
    with pytest.raises(UnknownRequest):
        Scene().tell(LeaseReleased("nobody"))


def test_a_queued_request_is_cancelled():
    """DELETE takes a request out of the queue, from the middle of its measurement too."""
    scene = handed_over()
    scene.ask(2, "A", "B", "C")
    scene.release("2b")
    scene.release("2a")
    assert (scene.status("2a"), scene.status("2b")) == (R.CANCELLED, R.CANCELLED)
    scene.release("1a")
    assert scene.status("2c") is R.DEPLOYING


def test_cancelling_while_the_llm_starts_lets_it_start():
    """The wrapper goes on deploying for nobody; the LLM is there for the next who wants it."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.release("1a")
    assert (scene.status("1a"), scene.effects) == (R.CANCELLED, ())
    assert (scene.wrapper().status, scene.wrapper().request_id) == (W.DEPLOYING, None)
    scene.runs()
    assert scene.wrapper().status is W.READY
    assert not scene.effects


def test_cancelling_just_before_the_hand_over_is_no_release():
    """A request whose lease was never handed over is cancelled, and the wrapper told to refuse it."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.runs()
    scene.release("1a")
    assert (scene.status("1a"), scene.effects) == (R.CANCELLED, (UnbindLease("m-0", 3, "1a", "released"),))


def test_a_freed_wrapper_goes_on_to_the_next_in_the_same_decision():
    """A warm LLM is handed over by the event that freed it, with a new token."""
    scene = handed_over()
    scene.ask(2, "A")
    scene.release("1a")
    assert scene.effects == (UnbindLease("m-0", 3, "1a", "released"), BindLease("m-0", 4, "2a"))
    lease = scene.allocator.lease_of("2a")
    assert lease is not None
    assert lease.token_id == "token-2"


def test_a_lease_that_its_wrapper_has_ended_is_ended():
    """It is expired, its wrapper is free, and the next one is served. Said again it changes nothing."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.tell(LeaseLapsed("1b"))
    assert scene.status("1b") is R.QUEUED
    scene.tell(LeaseLapsed("1a"))
    assert (scene.status("1a"), scene.request("1a").reason) == (
        R.EXPIRED,
        "its wrapper ended it: its time was over, or it was not used",
    )
    assert scene.status("1b") is R.DEPLOYING
    assert scene.tell(LeaseLapsed("1a")).changes.empty


def test_a_lease_whose_token_is_lost_fails():
    """Its holder learns why, its wrapper is told to refuse the token, and the next one is served."""
    scene = handed_over()
    scene.ask(1, "B")
    assert scene.tell(LeaseTokenLost("1b", "gone")).changes.empty  # it has no lease
    scene.tell(LeaseTokenLost("1a", "gone"))
    assert (scene.status("1a"), scene.request("1a").reason) == (R.FAILED, "gone")
    assert scene.status("1b") is R.DEPLOYING
    assert UnbindLease("m-0", scene.wrapper().epoch - 1, "1a", "failed") in scene.effects
    assert scene.tell(LeaseTokenLost("1a", "gone")).changes.empty


def test_a_lost_token_that_nobody_has_is_replaced():
    """A request that was not handed over is queued again, and gets its LLM with another token."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.runs()
    lost = scene.allocator.lease_of("1a")
    scene.tell(LeaseTokenLost("1a", "gone"))
    scene.bound()
    lease = scene.allocator.lease_of("1a")
    assert lost is not None
    assert lease is not None
    assert scene.status("1a") is R.DEPLOYED
    assert lease.token_id != lost.token_id


def test_an_engine_death_is_not_confused_with_a_release():
    """A lease whose LLM is being started again can be released; the wrapper is told and starts on for nobody."""
    scene = handed_over()
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.release("1a")
    assert (scene.status("1a"), scene.wrapper().status) == (R.RELEASED, W.DEPLOYING)
    assert scene.effects == (UnbindLease("m-0", 4, "1a", "released"), DeployLLM("m-0", 5, llm("A")))
