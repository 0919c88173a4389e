"""What clients and the clock do: requests, leases, their ends, the registry's own start and end."""

from dataclasses import replace

import pytest

from registry.core.allocator import Allocator, InvariantBroken
from registry.core.commands import BindLease, DeployLLM, StopLLM, UnbindLease
from registry.core.decision import Limits, Snapshot
from registry.core.events import (
    LeaseLapsed,
    LeaseReleased,
    LeaseRequested,
    LeaseTokenLost,
    LeaseUsed,
    LLMDied,
    LLMStopped,
    MachineLost,
    NewRequest,
    ShutdownBegun,
    TimePassed,
    WrapperAdded,
    WrapperFailed,
    WrapperStarted,
)
from registry.core.records import WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, QueueFull, ShuttingDown, UnknownMeasurement, UnknownRequest
from registry.wire.words import Priority, RequestStatus
from tests.support.allocator_scene import Scene, llm, next_deadline_s, stored_token

R, W = RequestStatus, WrapperStatus


def refused(scene: Scene, error: type[Exception], event: LeaseRequested) -> Exception:
    before = scene.allocator.snapshot()
    with pytest.raises(error) as caught:
        scene.allocator.handle(event, scene.now_s)
    assert scene.allocator.snapshot() == before
    assert scene.tell(TimePassed()).changes.empty
    return caught.value


def asked(measurement_id: int, *names: str, model: str = "A", gpus: int = 0, tenant: str = "default") -> LeaseRequested:
    return LeaseRequested(
        measurement_id, tuple(NewRequest(name, llm(model, gpus), "{}") for name in names), tenant=tenant
    )


# --- asking ------------------------------------------------------------------------------------------------


def test_a_request_is_granted_in_the_decision_that_accepts_it():
    """Nobody waits for a loop: with an idle wrapper the deploy is part of the same decision."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", "B")
    assert [*scene.effects] == [DeployLLM("m-0", 1, llm("A"), "1a")]
    assert (scene.status("1a"), scene.status("1b")) == (R.DEPLOYING, R.QUEUED)
    assert scene.request("1a").machine_id == scene.measurement(1).machine_id == "m"


def test_requests_keep_what_the_client_sent():
    """Config and notes come back as they were given, the time is that of the arrival."""
    scene = Scene()
    scene.tell(LeaseRequested(1, (NewRequest("r", llm("A"), '{"x":1}', ("dropped y",)),), "lab", Priority.HIGH))
    request, measurement = scene.request("r"), scene.measurement(1, "lab")
    assert (request.llmconfig, request.notes, request.created_s) == ('{"x":1}', ("dropped y",), scene.now_s)
    assert (measurement.tenant, measurement.priority, measurement.seq) == ("lab", Priority.HIGH, request.seq)


def test_the_queue_is_capped():
    """Over the cap the whole POST is refused and nothing of it is kept."""
    scene = Scene(Limits(max_queued=2))
    scene.ask(1, "A")
    error = refused(scene, QueueFull, asked(2, "x", "y"))
    assert str(error) == "the queue of this registry is full (2 requests); try again when some have been served"
    scene.ask(2, "A")


def test_a_full_queue_says_when_to_come_back():
    """The estimate is the mean time between departures: one each 10 s, so 10 s; and 15 s when 10 more bring none.

    Three left, at 10, 20 and 30 s: (30 - 10) / 2. At 40 s, (40 - 10) / 2. Of two tenants in turn each waits for two.
    """
    scene = Scene(Limits(max_queued=5, max_queued_per_tenant=2))
    for measurement_id in (1, 2):
        scene.ask(measurement_id, "A", tenant="lab")
        scene.ask(measurement_id, "A", tenant="other")

    def retry_after_s(*models: str, tenant: str) -> float | None:
        error = refused(scene, QueueFull, asked(3, *models, tenant=tenant))
        assert isinstance(error, QueueFull)
        return error.retry_after_s

    assert retry_after_s("x", tenant="lab") is None
    for number in range(3):
        scene.now_s += 10
        scene.ask(10 + number, "B", tenant="third")
        scene.release(f"{10 + number}a")
    assert retry_after_s("x", "y", tenant="third") == 10.0
    scene.now_s += 10
    assert retry_after_s("x", "y", tenant="third") == 15.0
    assert retry_after_s("x", tenant="lab") == 30.0


@pytest.mark.parametrize("limits", [Limits(max_queued=3), Limits(max_queued_per_tenant=3)], ids=["all", "tenant"])
def test_more_than_the_cap_can_never_pass(limits: Limits):
    """Four LLMs where three may wait are no matter of time: the field is refused, with both figures."""
    scene = Scene(limits)
    error = refused(scene, InvalidField, asked(1, "a", "b", "c", "d"))
    assert isinstance(error, InvalidField)
    assert (error.field, error.http_status, error.retryable) == ("llms", 422, False)
    assert "4 LLMs are more than the limit of the queue (3)" in str(error)
    scene.tell(asked(1, "a", "b", "c"))


def test_each_tenant_has_a_cap():
    """A tenant at its cap is refused while others are not."""
    scene = Scene(Limits(max_queued_per_tenant=1))
    scene.ask(1, "A", tenant="lab")
    refused(scene, QueueFull, asked(2, "x", tenant="lab"))
    scene.ask(2, "A", tenant="other")


def test_what_is_too_large_for_every_wrapper_is_refused_at_once():
    """An LLM that needs more GPUs than any wrapper has is a clear no, with the figures."""
    scene = Scene()
    scene.machine("small", gpus=1)
    scene.machine("large", gpus=4)
    error = refused(scene, LLMNeverFits, asked(1, "x", model="huge", gpus=8))
    assert "needs 8 GPUs, and the largest wrapper has 4" in str(error)
    scene.ask(1, llm("big", 4))
    assert scene.request("1a").wrapper_id == "large-0"


def test_before_any_wrapper_is_known_everything_is_queued():
    """While the cluster is still coming up, and while all of it is lost, nothing is called impossible."""
    scene = Scene()
    scene.ask(1, llm("huge", 8))
    scene.machine(gpus=1)
    scene.tell(MachineLost("m", "gone"))
    scene.ask(2, llm("huge", 8))
    assert (scene.status("1a"), scene.status("2a")) == (R.QUEUED, R.QUEUED)


def test_a_measurement_begins_on_a_machine_that_is_large_enough_for_all_of_it():
    """All LLMs of a measurement run on one machine, so the first goes where the largest fits."""
    scene = Scene()
    scene.machine("small", gpus=1)
    scene.machine("large", gpus=4)
    scene.ask(1, llm("A", 1), llm("B", 4))
    assert scene.request("1a").wrapper_id == "large-0"


def test_what_is_too_large_for_the_machine_of_its_measurement_is_refused():
    """A measurement that is bound to a machine can't ask for what that machine will never run."""
    scene = Scene()
    scene.machine("small", gpus=1)
    scene.ask(1, llm("A", 1))
    scene.machine("large", gpus=4)
    error = refused(scene, LLMNeverFits, asked(1, "x", model="B", gpus=4))
    assert "the largest wrapper has 1; measurement 1 is bound to machine small" in str(error)


def test_the_largest_wrapper_of_its_machine_is_what_counts():
    """What fits one wrapper of its measurement's machine is accepted, however small the others there are."""
    scene = Scene()
    scene.machine(gpus=1)
    scene.tell(WrapperAdded("m-1", "m", "http://m-1", 2))
    scene.tell(WrapperStarted("m-1"))
    scene.ask(1, "A")
    scene.hand_over()
    scene.ask(1, llm("B", 2))
    assert scene.status("1b") is R.QUEUED


def test_an_id_is_used_once():
    """The same request can't be made twice."""
    scene = Scene()
    scene.ask(1, "A")
    refused(scene, InvariantBroken, asked(2, "1a"))


def test_a_second_post_joins_the_measurement():
    """More LLMs for a live measurement keep its place, its machine and its priority."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", tenant="lab", priority=Priority.HIGH)
    scene.ask(2, "A")
    before = scene.measurement(1, "lab")
    scene.ask(1, "B", tenant="lab")
    assert scene.measurement(1, "lab") == before
    assert [request.request_id for request in scene.allocator.snapshot().requests if request.tenant == "lab"] == [
        "1a",
        "1b",
    ]
    scene.hand_over()
    scene.release("1a")
    assert (scene.status("1b"), scene.status("2a")) == (R.QUEUED, R.DEPLOYING)  # lab had its turn


def test_two_tenants_may_choose_the_same_id():
    """Their measurements have nothing to do with each other: none waits behind the other, each has its own machine."""
    scene = Scene()
    scene.machine("a")
    scene.machine("b")
    scene.ask(1, "A", "B", tenant="lab", priority=Priority.LOW)
    scene.ask(1, "C", tenant="other", priority=Priority.HIGH)
    assert [scene.request(request_id).machine_id for request_id in ("1a", "1b", "1c")] == ["a", None, "b"]
    assert [scene.measurement(1, tenant).tenant for tenant in ("lab", "other")] == ["lab", "other"]
    assert (scene.request("1a").tenant, scene.request("1c").tenant) == ("lab", "other")
    with pytest.raises(UnknownMeasurement):
        scene.allocator.measurement(("default", 1))


@pytest.mark.parametrize("begun", [Priority.HIGH, Priority.NORMAL])
def test_a_live_measurement_keeps_its_priority(begun: Priority):
    """Another priority than it was begun with is refused by name; the same, or none, is not; later it is free again."""
    scene = Scene()
    scene.ask(1, "A", priority=begun)
    before = scene.allocator.snapshot()
    with pytest.raises(InvalidField, match=f"priority.*began with '{begun.value}'"):
        scene.ask(1, "B", priority=Priority.LOW)
    assert scene.allocator.snapshot() == before
    scene.ask(1, "B", priority=begun)
    scene.ask(1, "C")
    assert scene.measurement(1).priority is begun
    for request_id in ("1a", "1b", "1c"):
        scene.release(request_id)
    scene.ask(1, "D", priority=Priority.LOW)
    assert scene.measurement(1).priority is Priority.LOW


def test_a_finished_measurement_begins_anew_at_the_back():
    """An old measurementId is served again: behind those who wait, on any machine, with what was known of it."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    scene.ask(2, "B")
    scene.release("1a")
    first = scene.measurement(1)
    assert first.machine_id is None
    scene.now_s += 100
    scene.ask(3, "C")
    scene.ask(1, "D")
    again = scene.measurement(1)
    assert again.seq > scene.measurement(3).seq
    assert again.created_s == first.created_s


def test_a_finished_measurement_that_goes_on_elsewhere_says_so():
    """Figures of one measurementId from two machines are never silently mixed."""
    scene = Scene(Limits(sticky_s=0))
    scene.machine("a", gpu_type="H100")
    scene.ask(1, "A")
    scene.hand_over("a-0")
    scene.release("1a")
    scene.ask(2, "A")
    scene.machine("b", gpu_type="A100")
    scene.ask(1, "A")
    assert scene.request("1b").machine_id == "b"
    assert scene.measurement(1).flags == ("machine_type_changed",)


# --- positions ---------------------------------------------------------------------------------------------


def test_the_position_counts_who_is_served_before():
    """1 is next; what is served, or has ended, has no position."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", "B")
    scene.ask(2, "A", "B")
    scene.ask(3, "A", priority=Priority.HIGH)
    positions = {r: scene.allocator.queue_position(r) for r in ("1a", "3a", "1b", "2a", "2b", "nobody")}
    assert positions == {"1a": None, "3a": 1, "1b": 2, "2a": 3, "2b": 4, "nobody": None}
    assert scene.allocator.queued_count() == 4


def test_the_position_reckons_with_other_tenants():
    """A tenant of small weight waits for those of others who have their turns before."""
    scene = Scene(Limits(tenant_weights=(("lab", 2.0),)))
    scene.ask(1, *"AAAAAA", tenant="lab")
    scene.ask(2, "B", tenant="guest")
    scene.ask(3, "B", tenant="guest")
    scene.ask(4, "B", tenant="guest")
    assert [scene.allocator.queue_position(f"{n}a") for n in (2, 3, 4)] == [2, 5, 8]
    assert [scene.allocator.queue_position(f"1{c}") for c in "abcdef"] == [1, 3, 4, 6, 7, 9]


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


def handed_over(limits: Limits | None = None) -> Scene:
    """Request 1a has its LLM A on m-0."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    return scene


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


def test_numbers_go_on_above_those_of_what_is_not_in_memory():
    """The next request comes after all that were made before, also those that only the store knows."""
    scene = handed_over()
    scene.allocator.load(scene.allocator.snapshot(), next_seq=77)
    scene.ask(2, "A")
    assert scene.request("2a").seq == 77


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


def test_a_request_behind_its_own_measurement_has_a_position():
    """Its tenant has no turn yet; it is told a place all the same: after those who wait."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.ask(2, "C", tenant="other")
    assert [scene.allocator.queue_position(each) for each in ("1b", "2a")] == [2, 1]


def test_wrappers_are_counted_by_status():
    """Health asks for counts, not for every wrapper."""
    scene = handed_over()
    assert scene.allocator.count_wrappers([W.LEASED]) == 1
    assert scene.allocator.count_wrappers(W) == len(scene.allocator.wrappers())
    assert scene.allocator.count_wrappers([W.LOST, W.OFF]) == 0


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


def test_an_engine_death_is_not_confused_with_a_release():
    """A lease whose LLM is being started again can be released; the wrapper is told and starts on for nobody."""
    scene = handed_over()
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.release("1a")
    assert (scene.status("1a"), scene.wrapper().status) == (R.RELEASED, W.DEPLOYING)
    assert scene.effects == (UnbindLease("m-0", 4, "1a", "released"), DeployLLM("m-0", 5, llm("A")))
