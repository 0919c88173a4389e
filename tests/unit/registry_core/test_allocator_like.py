"""Grades, and requests that must be what an earlier one was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.core.commands import UnbindLease
from registry.core.events import LeaseBound, LeaseFlagged, LLMDied
from registry.core.records import LLMSpec, WrapperStatus
from registry.errors import InvalidField
from registry.wire.words import Grade, RequestStatus, canonical_json
from tests.support.allocator_scene import Scene, llm

GPU = {"uuid": "GPU-1", "name": "H100", "power_limit_w": 700.0}
RAN_ON = {"machine": "m", "gpus": [GPU], "versions": {"vllm": "0.32.0"}}
PROVENANCE = canonical_json(RAN_ON)


@pytest.fixture
def scene() -> Scene:
    """Request 1a was handed over on machine m, and given back."""
    scene = Scene()
    scene.machine("m", gpus=1, gpu_type="H100")
    scene.ask(1, "A", grade=Grade.MEASUREMENT)
    scene.runs()
    bound(scene, PROVENANCE)
    scene.release("1a")
    return scene


def bound(scene: Scene, provenance: str | None, *, revision: str | None = "c1", flags: tuple[str, ...] = ()) -> None:
    epoch = scene.wrapper().epoch
    scene.tell(LeaseBound("m-0", epoch, revision, flags=flags, provenance=provenance))


def refusal(scene: Scene, *specs: LLMSpec | str, like: str = "1a", **more: object) -> str:
    """Why such a request is refused."""
    before = scene.allocator.snapshot()
    with pytest.raises(InvalidField) as error:
        scene.ask(2, *specs, like=like, **more)  # type: ignore[arg-type]
    assert scene.allocator.snapshot() == before
    assert error.value.field == "like"
    return error.value.problem


def test_grade_and_provenance_are_kept(scene: Scene) -> None:
    """Both are the request's, from the POST and from its hand-over on, over a restart too."""
    scene.restart()
    request = scene.request("1a")
    assert (request.grade, request.provenance, request.like_request_id) == (Grade.MEASUREMENT, PROVENANCE, None)


def test_what_was_not_at_rest_is_flagged(scene: Scene) -> None:
    """Flags of a hand-over, and of what comes during the lease, are the measurement's; each once."""
    scene.ask(2, "A")
    scene.runs()
    bound(scene, PROVENANCE, flags=("not_steady", "contended"))
    scene.tell(LeaseFlagged("2a", ("contended",)))
    assert scene.measurement(2).flags == ("not_steady", "contended")


def test_the_same_is_asked_for_and_had(scene: Scene) -> None:
    """The commit and the GPU type of the earlier request are asked for; another machine of the kind will do."""
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    assert scene.request("2a").spec == replace(llm("A"), revision="c1")
    assert scene.measurement(2).gpu_type == "H100"
    scene.restart()
    scene.runs()
    bound(scene, canonical_json({**RAN_ON, "machine": "n", "gpus": [{**GPU, "uuid": "GPU-2"}]}))
    assert scene.status("2a") is RequestStatus.DEPLOYED


def test_something_else_is_not_handed_over(scene: Scene) -> None:
    """What is known only then fails the request, which lists it; the LLM stays, free for others."""
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    scene.runs()
    bound(scene, canonical_json({**RAN_ON, "gpus": [{**GPU, "power_limit_w": 350.0}], "versions": {"vllm": "0.33.0"}}))
    request = scene.request("2a")
    assert request.status is RequestStatus.FAILED
    assert request.reason == (
        "it would differ from request 1a (like): gpus.0.power_limit_w: was 700.0, is 350.0; "
        "versions.vllm: was 0.32.0, is 0.33.0"
    )
    assert [type(effect) for effect in scene.effects] == [UnbindLease]
    assert scene.wrapper().status is WrapperStatus.READY
    assert request.deployed_s is None


def test_a_machine_that_does_not_tell_is_not_like_another(scene: Scene) -> None:
    """Nothing is taken for granted."""
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    scene.runs()
    bound(scene, None)
    assert (
        scene.request("2a").reason == "it would differ from request 1a (like): its hardware and software are not known"
    )


def test_an_engine_that_is_started_again_is_not_compared_again(scene: Scene) -> None:
    """A lease that stands is not ended for a difference: the flags tell that its engine was restarted."""
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    scene.runs()
    bound(scene, PROVENANCE)
    scene.tell(LLMDied("m-0", scene.wrapper().epoch, "killed"))
    scene.runs()
    bound(scene, canonical_json({**RAN_ON, "versions": {"vllm": "0.33.0"}}))
    assert scene.status("2a") is RequestStatus.DEPLOYED
    assert scene.request("2a").provenance == PROVENANCE


def test_what_was_forgotten_meanwhile_is_not_repeated(scene: Scene) -> None:
    """Who waited for so long that nothing is kept of the earlier request fails, and is told."""
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    snapshot = scene.allocator.snapshot()
    rest = tuple(request for request in snapshot.requests if request.request_id != "1a")
    scene.allocator.load(replace(snapshot, requests=rest))
    del scene.memory.requests["1a"]
    scene.runs()
    bound(scene, PROVENANCE)
    assert scene.request("2a").reason == "request 1a, which it must repeat (like), is not known any more"


def test_differences_are_refused_at_once(scene: Scene) -> None:
    """What the POST itself decides differently is named, all of it."""
    told = refusal(scene, "B", llm("A", 1), gpu_type="A100")
    assert told == (
        "differs from request 1a: gpuType: was H100, is A100; grade: was measurement, is standard; "
        "llms[0].model: was A, is B; llms[1].gpus: was 0, is 1"
    )


def test_only_what_was_handed_over_can_be_repeated(scene: Scene) -> None:
    """An id that is not known, and a request that has got nothing yet, can't be compared with."""
    assert refusal(scene, "A", like="9z") == "no request has the id '9z', or its record was deleted"
    scene.ask(3, "A")
    assert "the hardware and software of request 3a are not known" in refusal(scene, "A", like="3a")


def test_without_gpus_no_type_is_asked_for() -> None:
    """A request without a known kind of GPU is compared at the hand-over only."""
    scene = Scene()
    scene.machine("m")
    scene.ask(1, "A")
    scene.runs()
    bound(scene, '{"cpu":"x"}', revision=None)
    scene.release("1a")
    scene.ask(2, "A", like="1a")
    assert (scene.measurement(2).gpu_type, scene.request("2a").spec) == (None, llm("A"))


def test_a_live_measurement_keeps_its_gpu_type(scene: Scene) -> None:
    """What it was begun with stands; whether that is the same is seen at the hand-over."""
    scene.ask(2, "B")
    scene.ask(2, "A", like="1a", grade=Grade.MEASUREMENT)
    assert scene.measurement(2).gpu_type is None
    assert scene.request("2b").like_request_id == "1a"
