"""Choice of machine: memory and GPU type, from the request on; whom to refuse and when."""

from __future__ import annotations

import pytest

from registry.core.decision import Limits
from registry.core.events import LeaseReleased, LeaseRequested, MachineJoined, MachineLost, NewRequest
from registry.core.fit import GIB
from registry.core.records import LLMMemory, LLMSpec, Machine
from registry.errors import InvalidField, LLMNeverFits
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene, llm

R = RequestStatus


def takes(gib: int, **more: int) -> LLMMemory:
    return LLMMemory(gib * GIB, **more)


def refusal(scene: Scene, error: type[Exception], *specs: LLMSpec | str, n: int = 1, **asked: object) -> str:
    """The text of a refusal, which has changed nothing."""
    before = scene.allocator.snapshot()
    with pytest.raises(error) as caught:
        scene.ask(n, *specs, **asked)  # type: ignore[arg-type]
    assert scene.allocator.snapshot() == before
    return str(caught.value)


# --- memory ------------------------------------------------------------------------------------------------


def test_an_llm_goes_only_where_its_memory_is() -> None:
    """It waits for the wrapper that is large enough though a smaller one is idle, and holds up nobody meanwhile."""
    scene = Scene()
    scene.machine("small", gpus=1, gib=24)
    scene.machine("large", gpus=1, gib=80)
    scene.ask(1, "A", memory=takes(60))
    assert scene.request("1a").wrapper_id == "large-0"
    scene.ask(2, "B", memory=takes(60))
    assert scene.status("2a") is R.QUEUED
    scene.ask(3, "C", memory=takes(10))
    assert scene.request("3a").wrapper_id == "small-0"
    scene.hand_over("large-0")
    scene.release("1a")
    assert scene.request("2a").wrapper_id == "large-0"


def test_all_gpus_of_a_wrapper_count_unless_fewer_are_asked_for() -> None:
    """Four GPUs of 24 GiB take 90 GiB together, but not 60 GiB on one of them."""
    scene = Scene()
    scene.machine("m", gpus=4, gib=24)
    assert "on 1 GPU" in refusal(scene, LLMNeverFits, "A", memory=takes(60, gpus=1))
    scene.ask(1, "A", memory=takes(90))
    assert scene.request("1a").wrapper_id == "m-0"


def test_main_memory_is_shared_among_the_wrappers_of_a_machine() -> None:
    """Two wrappers on a machine without GPU have half of its memory each."""
    scene = Scene(Limits(wrappers_per_machine=2))
    scene.machine("m", wrappers=2, gib=32)
    assert "has 16.0 GiB of main memory" in refusal(scene, LLMNeverFits, "A", memory=takes(17))
    scene.ask(1, "A", memory=takes(13))
    assert scene.status("1a") is R.DEPLOYING


def test_what_fits_nowhere_is_refused_at_once_with_the_figures() -> None:
    """The refusal names the field, the LLM, what it takes and what there is; nothing of the POST is accepted."""
    scene = Scene()
    scene.machine("m", gpus=1, gib=24)
    small = LLMSpec("org/small", "text-generation")
    told = refusal(scene, LLMNeverFits, small, llm("org/big"), memory=takes(40))
    assert told.startswith("llms[0].model: LLM 'org/small' fits on no machine: its weights take 40.0 GiB, and the")
    assert "1 GPU with 24.0 GiB" in told


def test_as_long_as_memory_is_not_known_nothing_is_refused() -> None:
    """Neither for a machine that has not told yet, nor for an LLM whose checkpoint nobody has seen."""
    scene = Scene()
    scene.machine("m", wrappers=2, gpus=1)
    scene.ask(1, "A", memory=takes(1000))
    assert scene.status("1a") is R.DEPLOYING
    scene.ask(2, "B")
    assert scene.status("2a") is R.DEPLOYING


def test_memory_that_becomes_known_moves_those_who_wait() -> None:
    """Who waits is told that nothing is large enough, and is served when something larger comes."""
    scene = Scene()
    scene.ask(1, "A", memory=takes(60))
    assert scene.allocator.misfit("1a") is None  # no machine is known
    machine = Machine("m", "node-m", "10.0.0.1", gpus=1, gpu_memory_bytes=24 * GIB)
    scene.tell(MachineJoined(machine))
    scene.machine("m2", gpus=1, gib=24)
    assert scene.status("1a") is R.QUEUED
    assert "24.0 GiB each" in (scene.allocator.misfit("1a") or "")
    scene.machine("large", gpus=1, gib=80)
    assert scene.request("1a").wrapper_id == "large-0"
    scene.ask(2, "B", memory=takes(60))
    assert scene.allocator.misfit("2a") is None


def test_who_waits_for_the_others_of_its_measurement_is_told() -> None:
    """An LLM that waits only since another of its measurement fits nowhere is told so, and runs without it."""
    scene = Scene()
    scene.ask(1, "A", memory=takes(10))
    scene.ask(1, "B", memory=takes(60))
    scene.machine("m", gpus=1, gib=24)
    told = "no machine can run both this LLM and the others of measurement 1"
    assert (scene.allocator.misfit("1a"), scene.status("1a")) == (told, R.QUEUED)
    assert "24.0 GiB each" in (scene.allocator.misfit("1b") or "")
    scene.tell(LeaseReleased("1b"))
    assert scene.request("1a").wrapper_id == "m-0"


def test_a_wrapper_that_turns_out_larger_serves_at_once() -> None:
    """What is known of a machine can change while somebody waits for more."""
    scene = Scene()
    scene.ask(1, "A", memory=takes(60))
    scene.machine("m", gpus=1, gib=24)
    scene.tell(MachineJoined(Machine("m", "node-m", "10.0.0.1", gpus=1, gpu_memory_bytes=80 * GIB)))
    assert scene.request("1a").wrapper_id == "m-0"


def test_a_measurement_begins_where_the_largest_of_its_llms_fits() -> None:
    """All LLMs of a measurement run on one machine, so the first goes where the last has room as well."""
    scene = Scene()
    scene.machine("small", gpus=1, gib=24)
    scene.machine("large", gpus=1, gib=80)
    small, large = (NewRequest(f"r{gib}", llm(f"{gib}"), "{}", memory=takes(gib)) for gib in (10, 60))
    scene.tell(LeaseRequested(1, (small, large)))
    assert scene.request("r10").wrapper_id == "large-0"


def test_what_fits_on_a_smaller_machine_leaves_the_larger_one_to_others() -> None:
    """Of idle wrappers with as many GPUs the one with the least memory that is enough is taken."""
    scene = Scene()
    scene.machine("large", gpus=1, gib=80)
    scene.machine("small", gpus=1, gib=24)
    scene.machine("unknown", gpus=2)
    scene.ask(1, "A", memory=takes(10))
    assert scene.request("1a").wrapper_id == "small-0"


def test_llms_that_fit_together_nowhere_are_refused() -> None:
    """One needs many GPUs, the other a large one: no machine does for both, though there is one for each."""
    scene = Scene()
    scene.machine("many", gpus=4, gib=24)
    scene.machine("large", gpus=1, gib=80)
    for n, name in enumerate(("many-0", "large-0")):
        scene.ask(10 + n, llm("busy", 4 if name == "many-0" else 0))
    scene.ask(1, llm("A", 4))
    told = refusal(scene, LLMNeverFits, "B", memory=takes(60, gpus=1))
    assert "and the others of measurement 1; use another measurementId" in told
    scene.ask(2, "B", memory=takes(60, gpus=1))


def test_what_is_too_large_for_the_machine_of_its_measurement_is_refused() -> None:
    """A measurement that is bound to a small machine is told so, though a larger one is there."""
    scene = Scene()
    scene.machine("small", gpus=1, gib=24)
    scene.ask(1, "A")
    scene.machine("large", gpus=1, gib=80)
    told = refusal(scene, LLMNeverFits, "B", memory=takes(60))
    assert "1 GPU with 24.0 GiB each" in told
    assert "bound to machine small; use another measurementId" in told


def test_memory_does_not_make_another_llm() -> None:
    """What is known of an LLM's memory can differ from POST to POST: it is the same engine, and warm."""
    scene = Scene()
    scene.machine("m", gpus=1, gib=80)
    scene.leave_ready("A", "m-0", 1)
    starts = scene.wrapper("m-0").epoch
    scene.ask(2, "A", memory=takes(60))
    assert scene.wrapper("m-0").request_id == "2a"
    assert scene.wrapper("m-0").epoch == starts + 1  # a lease, no deploy


# --- GPU type ----------------------------------------------------------------------------------------------


def test_a_measurement_waits_for_the_gpu_type_that_it_names() -> None:
    """It goes only to machines with such GPUs, by whatever of their names."""
    scene = Scene()
    scene.machine("a", gpus=1, gpu_type="A100")
    scene.machine("h", gpus=1, gpu_type="H100")
    scene.ask(1, "A", gpu_type="NVIDIA H100 80GB HBM3")
    assert scene.request("1a").wrapper_id == "h-0"
    scene.ask(2, "B", gpu_type="h100")
    assert scene.status("2a") is R.QUEUED
    scene.ask(3, "C")
    assert scene.request("3a").wrapper_id == "a-0"


def test_a_gpu_type_that_no_machine_has_is_refused_with_those_there_are() -> None:
    """As long as no machine is known it is accepted."""
    scene = Scene()
    scene.ask(1, "A", gpu_type="B200")
    scene.machine("plain")
    assert "none has a GPU whose type is known" in refusal(scene, InvalidField, "A", n=2, gpu_type="B200")
    scene.machine("h", gpus=1, gpu_type="H100")
    scene.machine("a", gpus=1, gpu_type="A100")
    told = refusal(scene, InvalidField, "A", n=2, gpu_type="B200")
    assert told == "gpuType: no machine here has 'B200'; there are A100, H100"
    assert scene.allocator.misfit("1a") == "no machine here has 'B200'; there are A100, H100"
    scene.machine("b", gpus=1, gpu_type="B200")
    assert scene.request("1a").wrapper_id == "b-0"


def test_memory_is_looked_for_among_machines_of_the_type() -> None:
    """Where only another type is large enough, the LLM fits nowhere."""
    scene = Scene()
    scene.machine("l", gpus=1, gpu_type="L4", gib=24)
    scene.machine("h", gpus=1, gpu_type="H100", gib=80)
    assert "with 24.0 GiB each" in refusal(scene, LLMNeverFits, "A", gpu_type="L4", memory=takes(60))


@pytest.mark.parametrize(
    ("begun", "later", "accepted"),
    [
        ("H100", None, True),
        ("H100", "nvidia h100", True),
        ("nvidia h100", "H100", True),
        ("H100", "A100", False),
        (None, "H100", False),
        (None, None, True),
    ],
)
def test_a_live_measurement_keeps_its_gpu_type(begun: str | None, later: str | None, accepted: bool) -> None:
    """Another type in a later POST is refused by name; none at all, or the same, is not."""
    scene = Scene()
    scene.machine("h", gpus=1, gpu_type="H100")
    scene.machine("a", gpus=1, gpu_type="A100")
    scene.ask(1, "A", gpu_type=begun)
    if accepted:
        scene.ask(1, "B", gpu_type=later)
        assert scene.measurement(1).gpu_type == begun
    else:
        told = refusal(scene, InvalidField, "B", gpu_type=later)
        assert told.startswith("gpuType: measurement 1 began with")


def test_a_finished_measurement_may_begin_anew_on_another_type() -> None:
    """Once nothing of it is left, the type is chosen anew."""
    scene = Scene()
    scene.machine("h", gpus=1, gpu_type="H100")
    scene.machine("a", gpus=1, gpu_type="A100")
    scene.ask(1, "A", gpu_type="H100")
    scene.hand_over("h-0")
    scene.release("1a")
    scene.ask(1, "A", gpu_type="A100")
    assert scene.request("1b").wrapper_id == "a-0"
    assert scene.measurement(1).gpu_type == "A100"


def test_a_displaced_measurement_waits_for_the_type_that_it_names() -> None:
    """Without a machine of the type it does not go on on another, as one that named none would."""
    scene = Scene()
    scene.machine("h", gpus=1, gpu_type="H100")
    scene.ask(1, "A", "B", gpu_type="H100")
    scene.hand_over("h-0")
    scene.machine("a", gpus=1, gpu_type="A100")
    scene.tell(MachineLost("h", "it left"))
    assert scene.status("1b") is R.QUEUED
    scene.machine("h2", gpus=1, gpu_type="H100")
    assert scene.request("1b").wrapper_id == "h2-0"
    assert scene.measurement(1).flags == ("machine_changed",)
