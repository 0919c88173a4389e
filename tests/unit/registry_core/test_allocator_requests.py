"""Requests to the allocator: what is queued, what is refused at once, measurements that go on, positions."""

import pytest

from registry.core.allocator import InvariantBroken
from registry.core.commands import DeployLLM
from registry.core.decision import Limits
from registry.core.events import LeaseRequested, MachineLost, NewRequest, WrapperAdded, WrapperStarted
from registry.core.records import WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, QueueFull, UnknownMeasurement
from registry.wire.words import Priority, RequestStatus
from tests.support.allocator_scene import Scene, asked, handed_over, llm, refused

R, W = RequestStatus, WrapperStatus

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


def test_a_request_behind_its_own_measurement_has_a_position():
    """Its tenant has no turn yet; it is told a place all the same: after those who wait."""
    scene = handed_over()
    scene.ask(1, "B")
    scene.ask(2, "C", tenant="other")
    assert [scene.allocator.queue_position(each) for each in ("1b", "2a")] == [2, 1]
