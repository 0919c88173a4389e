"""Who gets which wrapper: the order of requests, the choice of a wrapper, warm matches, evictions."""

import pytest

from registry.core.commands import BindLease, DeployLLM
from registry.core.decision import Limits
from registry.core.events import LLMDied, MachineLost, TimePassed, WrapperAdded, WrapperStarted
from registry.core.records import WrapperStatus
from registry.wire.words import Priority, RequestStatus
from tests.support.allocator_scene import Scene, llm

R, W = RequestStatus, WrapperStatus


def given(scene: Scene) -> list[str]:
    """The requests that hold a wrapper, in the order of the wrappers."""
    return [w.request_id for w in scene.allocator.wrappers() if w.request_id is not None]


# --- the order of requests ---------------------------------------------------------------------------------


def test_first_come_first_served():
    """Measurements are served in the order in which they arrived."""
    scene = Scene()
    for n in (5, 3, 4):
        scene.ask(n, "A")
    scene.machine(wrappers=2)
    assert given(scene) == ["5a", "3a"]


def test_priority_goes_before_arrival():
    """Inside a tenant high priority is served first and low priority last."""
    scene = Scene()
    scene.ask(1, "A", priority=Priority.LOW)
    scene.ask(2, "A")
    scene.ask(3, "A", priority=Priority.HIGH)
    scene.machine(wrappers=2)
    assert given(scene) == ["3a", "2a"]


def test_tenants_take_turns():
    """A tenant with a thousand requests does not hold up one with a single request."""
    scene = Scene()
    for n in range(1, 6):
        scene.ask(n, "A", tenant="lab")
    scene.ask(6, "A", tenant="guest")
    scene.machine(wrappers=2)
    assert sorted(given(scene)) == ["1a", "6a"]


def test_tenants_are_served_by_weight():
    """Over many grants each tenant gets its share."""
    scene = Scene(Limits(tenant_weights=(("lab", 3.0),)))
    for n in range(12):
        scene.ask(n, "A", tenant="lab")
        scene.ask(100 + n, "A", tenant="guest")
    scene.machine(wrappers=12)
    tenants = [scene.request(r).tenant for r in given(scene)]
    assert (tenants.count("lab"), tenants.count("guest")) == (9, 3)


def test_a_request_that_gets_a_second_wrapper_uses_a_second_turn():
    """Its tenant is then behind those that began to wait when the first wrapper was lost."""
    scene = Scene()
    scene.machine("a", wrappers=2, gpus=1)
    scene.ask(1, "A", tenant="lab")
    scene.ask(2, "A", tenant="guest")
    scene.ask(3, llm("B", 1), tenant="lab")
    scene.machine("b")
    scene.tell(MachineLost("a", "it left"))
    assert given(scene) == ["1a"]
    scene.machine("a", gpus=1)
    assert scene.request_on("a-0") == "2a"


def test_a_measurement_is_served_one_request_at_a_time():
    """The second LLM of a measurement comes only after the first was released, and on the same machine."""
    scene = Scene()
    scene.machine("a")
    scene.machine("b")
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    assert (scene.status("1b"), scene.wrapper("b-0").status) == (R.QUEUED, W.IDLE)
    scene.release("1a")
    assert scene.request("1b").wrapper_id == "a-0"


def test_who_waits_for_a_machine_blocks_nobody():
    """A measurement bound to a busy machine is passed by those who can go elsewhere."""
    scene = Scene()
    scene.machine("a")
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    scene.ask(2, "C")
    scene.release("1a")  # 1b goes on on machine a
    scene.hand_over("a-0")
    scene.ask(1, "D")
    scene.ask(3, "E")
    scene.machine("b")
    assert scene.request("2a").wrapper_id == "b-0"
    assert (scene.status("1c"), scene.status("3a")) == (R.QUEUED, R.QUEUED)


def test_who_is_too_large_blocks_nobody():
    """A request that fits no free wrapper lets smaller ones pass, without being overtaken in the sense of the limit."""
    scene = Scene()
    scene.machine("large", gpus=4)
    scene.ask(1, llm("A", 4))
    scene.ask(2, llm("A", 4))
    scene.machine("small", gpus=1)
    scene.ask(3, llm("B", 1))
    assert scene.request("3a").wrapper_id == "small-0"
    assert scene.request("2a").overtaken == 0


# --- the choice of a wrapper -------------------------------------------------------------------------------


def test_1_a_warm_llm_is_preferred():
    """Where the LLM runs already it is handed over at once, though idle wrappers are there."""
    scene = Scene()
    scene.machine(wrappers=3)
    scene.leave_ready("A", "m-0", 1)
    scene.ask(2, "A")
    assert [type(effect) for effect in scene.effects] == [BindLease]
    assert scene.request_on("m-0") == "2a"


def test_1_prompting_arguments_do_not_matter():
    """Two requests whose specs are equal share a running LLM, whatever else their clients sent."""
    assert llm("A").fingerprint == llm("A").fingerprint != llm("A", 1).fingerprint


def test_2_the_smallest_idle_wrapper_that_fits():
    """Large wrappers are kept for those who need them."""
    scene = Scene()
    for name, gpus in (("large", 8), ("small", 2), ("tiny", 1)):
        scene.machine(name, gpus=gpus)
    scene.ask(1, llm("A", 2))
    assert scene.request_on("small-0") == "1a"


def test_2_of_idle_wrappers_the_least_recently_used():
    """Among equals the one that has rested longest is taken."""
    scene = Scene()
    scene.machine("a")
    scene.leave_ready("A", "a-0", 1)
    scene.tell(LLMDied("a-0", scene.wrapper("a-0").epoch, "killed"))
    scene.machine("b")
    scene.machine("c")
    scene.leave_ready("B", "b-0", 2)
    scene.tell(LLMDied("b-0", scene.wrapper("b-0").epoch, "killed"))
    scene.ask(3, "C")
    scene.ask(4, "C")
    assert (scene.request("3a").wrapper_id, scene.request("4a").wrapper_id) == ("c-0", "a-0")


def test_3_an_llm_that_is_being_started_for_nobody_is_adopted():
    """A deploy whose request was cancelled serves the next who wants that LLM, without a new command."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.release("1a")
    scene.ask(2, "A")
    assert (scene.request_on("m-0"), scene.effects) == ("2a", ())
    scene.hand_over()
    assert scene.status("2a") is R.DEPLOYED


def test_3_an_idle_wrapper_is_better_than_one_that_is_starting_another_llm():
    """What is being started for nobody is left to finish while there is anything else."""
    scene = Scene()
    scene.machine(wrappers=2)
    scene.ask(1, "A")
    scene.release("1a")
    scene.ask(2, "B")
    assert scene.request_on("m-1") == "2a"


def test_4_the_least_recently_used_llm_is_evicted():
    """Without an idle wrapper the LLM that has rested longest has to go."""
    scene = Scene()
    scene.machine(wrappers=2)
    scene.leave_ready("A", "m-0", 1)
    scene.leave_ready("B", "m-1", 2)
    scene.ask(3, "C")
    assert [*scene.effects] == [DeployLLM("m-0", 4, llm("C"), "3a")]


def test_4_an_llm_that_somebody_in_the_queue_wants_is_spared():
    """Of two LLMs the one goes that nobody waits for, though it was used later."""
    scene = Scene()
    scene.machine("a", wrappers=3)
    scene.ask(9, "X", "A")  # wants A afterwards
    scene.hand_over("a-0")
    scene.leave_ready("A", "a-1", 1)
    scene.leave_ready("B", "a-2", 2)
    scene.ask(3, "C")
    assert scene.request_on("a-2") == "3a"


@pytest.mark.parametrize("first_wanted", ["A", "B"])
def test_4_of_llms_that_are_all_wanted_the_one_wanted_last_goes(first_wanted: str):
    """The LLM that a request of higher rank wants next is still there when its turn comes, whichever was used last."""
    scene = Scene()
    scene.machine("a", wrappers=4)
    scene.leave_ready("A", "a-0", 1)
    scene.leave_ready("B", "a-1", 2)
    for measurement_id, wanted in ((8, first_wanted), (9, "AB".replace(first_wanted, ""))):
        scene.ask(measurement_id, f"X{measurement_id}", wanted)
        scene.hand_over(f"a-{measurement_id - 6}")
    scene.ask(10, "C")
    kept = "a-0" if first_wanted == "A" else "a-1"
    assert scene.request_on(kept) is None
    scene.release("8a")
    assert scene.request_on(kept) == "8b"
    assert scene.wrapper(kept).status is W.LEASED


def test_5_a_start_for_nobody_is_cut_short_at_last():
    """Only where nothing else is free a deploy that nobody waits for gives way to another LLM."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.release("1a")
    scene.ask(2, "B")
    assert [*scene.effects] == [DeployLLM("m-0", 2, llm("B"), "2a")]
    assert scene.request_on("m-0") == "2a"


def test_5_evicting_is_better_than_cutting_a_start_short():
    """An LLM that runs for nobody goes before one that is on its way."""
    scene = Scene()
    scene.machine(wrappers=2)
    scene.leave_ready("A", "m-0", 1)
    scene.ask(2, "B")
    scene.release("2a")
    scene.ask(3, "C")
    assert scene.request_on("m-0") == "3a"


@pytest.mark.parametrize("there", ["B", "C"])
def test_choices_hold_on_the_machine_of_a_measurement(there):
    """Bound to a machine, a measurement has the same choices there, and only there."""
    scene = Scene()
    scene.machine("a", wrappers=2)
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    scene.leave_ready(there, "a-1", 2)
    scene.machine("b", home=llm("B"))
    scene.runs("b-0")
    scene.now_s += 1
    scene.release("1a")
    assert scene.request_on("a-1") == "1b"
    assert (scene.wrapper("a-1").status is W.LEASED) == (there == "B")


# --- warm matches that overtake ----------------------------------------------------------------------------


def overtaking(limits: Limits | None = None) -> Scene:
    """A was just used; 2a wants B and is next, 3a wants A and is behind it."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    scene.ask(2, "B")
    scene.ask(3, "A")
    return scene


def test_4a_a_warm_match_may_go_first():
    """Who wants just the LLM that runs goes before one for whom it would be stopped, and that is counted."""
    scene = overtaking()
    scene.release("1a")
    assert (scene.request_on("m-0"), scene.request("2a").overtaken) == ("3a", 1)


def test_4a_nobody_is_overtaken_too_often():
    """At the limit the older request is served, however warm the LLM is for others."""
    scene = overtaking(Limits(max_overtakes=2))
    served = ["1a"]
    for n in (4, 5, 6):
        scene.ask(n, "A")
    for _ in range(3):
        scene.release(served[-1])
        served.append(str(scene.request_on("m-0")))
        scene.hand_over()
    assert served == ["1a", "3a", "4a", "2a"]
    assert scene.request("2a").overtaken == 2


def test_4a_nobody_is_overtaken_for_too_long():
    """A request that has waited for the limit is served next."""
    scene = overtaking(Limits(max_overtake_s=60.0))
    scene.now_s += 60.0
    scene.release("1a")
    assert (scene.request_on("m-0"), scene.request("2a").overtaken) == ("2a", 0)


def test_4a_everybody_who_is_overtaken_must_allow_it():
    """One in the line who may not be overtaken any more is enough; then nobody's count moves."""
    scene = Scene(Limits(max_overtake_s=60.0))
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    scene.ask(2, "B")
    scene.now_s += 60.0
    scene.ask(3, "C", priority=Priority.HIGH)
    scene.ask(4, "A")
    scene.release("1a")
    assert scene.request_on("m-0") == "3a"
    assert scene.request("3a").overtaken == scene.request("2a").overtaken == 0


def test_4a_only_those_who_could_have_had_the_wrapper_are_overtaken():
    """Who waits for another machine, or for a larger one, loses nothing and is not counted."""
    scene = Scene()
    scene.machine("a", gpus=1)
    scene.machine("b", gpus=2)
    scene.ask(1, llm("A", 1))
    scene.hand_over("a-0")
    scene.ask(2, llm("X", 2))
    scene.ask(3, llm("Y", 2))
    scene.ask(4, llm("B", 1))
    scene.ask(5, llm("A", 1))
    scene.release("1a")
    assert scene.request_on("a-0") == "5a"
    assert (scene.request("3a").overtaken, scene.request("4a").overtaken) == (0, 1)


def test_4a_a_warm_match_of_another_tenant_may_go_first():
    """The line is that of all tenants in turn; the tenant who is let in front has had its turn."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", tenant="alpha")
    scene.hand_over()
    scene.ask(2, "B", tenant="beta")
    scene.ask(3, "C", tenant="beta")
    scene.ask(4, "A", tenant="alpha")
    scene.release("1a")
    assert scene.request_on("m-0") == "4a"
    assert (scene.request("2a").overtaken, scene.request("3a").overtaken) == (1, 0)


def test_4a_the_line_is_looked_at_only_so_far():
    """A warm match far down the line is not looked for, so that a decision stays cheap."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    for n in range(2, 19):
        scene.ask(n, f"other {n}")
    scene.ask(19, "A")
    scene.release("1a")
    assert scene.request_on("m-0") == "2a"
    scene.hand_over()
    scene.ask(20, "other 2", priority=Priority.LOW)
    assert scene.request("3a").overtaken == 0


def test_4a_the_line_is_looked_at_in_more_tenants_than_it_is_long():
    """Many tenants make the line no longer."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", tenant="t01")
    scene.hand_over()
    for n in range(2, 30):
        scene.ask(n, f"other {n}", tenant=f"t{n:02}")
    scene.ask(30, "A", tenant="t30")
    scene.release("1a")
    assert scene.request_on("m-0") == "2a"


# --- machines that are gone --------------------------------------------------------------------------------


def moved(*machines: tuple[str, str | None]) -> Scene:
    """Measurement 1 was served on machine ``a`` (H100), waits for its next LLM, and ``a`` is lost."""
    scene = Scene()
    scene.machine("a", gpu_type="H100")
    scene.ask(1, "A", "B")
    scene.hand_over("a-0")
    for n, (name, gpu_type) in enumerate(machines):
        scene.machine(name, gpu_type=gpu_type)
        scene.ask(10 + n, "X")
        scene.hand_over(f"{name}-0")
    scene.tell(MachineLost("a", "it left"))
    assert (scene.status("1a"), scene.status("1b")) == (R.FAILED, R.QUEUED)
    return scene


def test_a_measurement_goes_on_on_a_machine_of_the_same_type():
    """It waits for one with the same GPUs though another type is free, and says that it moved."""
    scene = moved(("b", "A100"), ("c", "H100"))
    scene.release("10a")
    assert scene.status("1b") is R.QUEUED
    scene.release("11a")
    assert scene.request("1b").machine_id == "c"
    assert scene.measurement(1).flags == ("machine_changed",)


def test_a_measurement_goes_on_on_another_type_if_there_is_no_other():
    """Better figures that are flagged than none."""
    scene = moved(("b", "A100"))
    scene.release("10a")
    assert scene.request("1b").machine_id == "b"
    assert scene.measurement(1).flags == ("machine_type_changed",)


def test_a_measurement_goes_back_to_its_machine_if_that_returns_in_time():
    """While nothing else was free the machine came back: no flag."""
    scene = moved(("b", "H100"))
    scene.tell(WrapperAdded("a-0", "a", "http://a-0"))
    scene.release("10a")
    assert scene.status("1b") is R.QUEUED
    scene.tell(WrapperStarted("a-0"))
    assert scene.request("1b").machine_id == "a"
    assert scene.measurement(1).flags == ()


def test_a_type_that_comes_back_binds_again():
    """Who was ready to go anywhere waits for its own type once there is a machine of it."""
    scene = moved(("b", "A100"))
    scene.tell(WrapperAdded("a-0", "a", "http://a-0"))
    scene.tell(MachineLost("a", "again"))
    scene.machine("c", gpu_type="H100")
    assert scene.request("1b").machine_id == "c"
    assert scene.measurement(1).flags == ("machine_changed",)


def test_nothing_happens_by_itself():
    """Without an event that frees something the same decision is not made twice."""
    scene = overtaking()
    scene.release("1a")
    assert scene.tell(TimePassed()).changes.empty


def test_low_priority_is_served_beside_an_endless_stream():
    """After 8 turns of its tenant the oldest request is next, also where the LLM that runs suits those before it."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "H", priority=Priority.HIGH)
    scene.hand_over()
    scene.ask(2, "L", priority=Priority.LOW)
    served = []
    for n in range(3, 14):
        scene.ask(n, "H", priority=Priority.HIGH)
        held = scene.request_on("m-0")
        assert held is not None
        scene.release(held)
        scene.hand_over()
        served.append(scene.request_on("m-0"))
    assert served == [*(f"{n}a" for n in range(3, 11)), "2a", "11a", "12a"]
