"""What an LLM is handed over with: the wrapper's account of it, and how two of them differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from deployments.machine.gpus import ReadFailed, gpu_settings
from deployments.wrapper.provenance import cpu_here, gpus_here, provenance
from registry.core.events import LeaseRequested, NewRequest
from registry.core.provenance import PENDING, differences, unlike
from registry.core.records import LLMSpec, Request
from registry.wire.words import Grade, canonical_json
from tests.support.fake_counters import UUID, FakeGPU, FakeNVML, install_nvml

GPU = {
    "uuid": "GPU-1",
    "name": "H100",
    "power_limit_w": 700.0,
    "clocks_mhz": {"sm": 345},
    "max_clocks_mhz": {"sm": 1980},
}
WHOLE: dict[str, Any] = {
    "machine": "a",
    "wrapper": "a-0",
    "cpu": {"model": "Xeon", "logical": 64},
    "gpus": [GPU, GPU],
    "versions": {"vllm": "0.32.0", "nvidia-driver": "610"},
    "model": {"name": "org/m", "revision": "c1", "weights_sha256": "f" * 64},
    "engine_args": {"dtype": "bfloat16", "allowed": ["a", "b"], "hf_overrides": {"rope": 1}},
}
SPEC = LLMSpec("org/m", "text-generation", engine_args='{"dtype":"bfloat16"}')
EARLIER = Request("r1", 1, 1, SPEC, "{}", model_revision="c1")


def told(**changed: Any) -> str:
    return canonical_json({**WHOLE, **changed})


def asked(spec: LLMSpec = SPEC, **more: Any) -> LeaseRequested:
    return LeaseRequested(2, (NewRequest("r2", spec, "{}"),), **more)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"machine": "b", "wrapper": "b-0"}, None),
        ({"gpus": [{**GPU, "uuid": "GPU-2", "clocks_mhz": {"sm": 1980}}, GPU]}, None),
        ({"gpus": [{**GPU, "power_limit_w": 350.0}, GPU]}, "gpus.0.power_limit_w: was 700.0, is 350.0"),
        ({"gpus": [GPU, {**GPU, "name": "A100"}]}, "gpus.1.name: was H100, is A100"),
        ({"gpus": [GPU]}, "gpus.1.name: was H100, is null"),
        ({"gpus": None}, "gpus.0.name: was H100, is null"),
        ({"cpu": {"model": "EPYC", "logical": 64}}, "cpu.model: was Xeon, is EPYC"),
        ({"versions": {"vllm": "0.33.0", "nvidia-driver": "610"}}, "versions.vllm: was 0.32.0, is 0.33.0"),
        ({"model": {**WHOLE["model"], "revision": "c2"}}, "model.revision: was c1, is c2"),
        ({"model": {**WHOLE["model"], "weights_sha256": PENDING}}, "is pending"),
        ({"engine_args": {**WHOLE["engine_args"], "allowed": ["a"]}}, 'allowed: was ["a", "b"], is ["a"]'),
        ({"engine_args": {**WHOLE["engine_args"], "hf_overrides": {"rope": 2}}}, "hf_overrides.rope: was 1, is 2"),
    ],
)
def test_differences_are_those_that_decide_figures(changed: dict[str, Any], difference: str | None) -> None:
    """Software, hardware, model and arguments count; which of several machines of a kind it is, and the moment, not."""
    found = differences(told(), told(**changed))
    assert (difference in "; ".join(found)) if difference is not None else (found == [])


@pytest.mark.parametrize("unknown", [None, PENDING])
def test_weights_that_were_not_known_are_not_compared(unknown: str | None) -> None:
    """A hash that the earlier request never had asks nothing of the later one."""
    was = told(model={**WHOLE["model"], "weights_sha256": unknown})
    assert differences(was, told()) == []
    assert differences(was, told(model={**WHOLE["model"], "weights_sha256": PENDING})) == []


def test_nothing_known_is_like_nothing() -> None:
    """A wrapper that does not tell what it is can't be like another."""
    assert differences(told(), None) == ["its hardware and software are not known"]
    assert len(differences(None, told())) > 5


@pytest.mark.parametrize(
    ("event", "found"),
    [
        (asked(), []),
        (asked(replace(SPEC, revision="c1")), []),
        (asked(replace(SPEC, revision="c2")), ["llms[0].revision: was null, is c2"]),
        (asked(replace(SPEC, model="org/n")), ["llms[0].model: was org/m, is org/n"]),
        (asked(replace(SPEC, engine_args="{}")), ["llms[0].deployment.dtype: was bfloat16, is null"]),
        (asked(gpu_type="NVIDIA H100 80GB HBM3"), []),
        (asked(gpu_type="A100"), ["gpuType: was H100, is A100"]),
    ],
)
def test_what_is_asked_is_compared_at_once(event: LeaseRequested, found: list[str]) -> None:
    """Everything that an llmconfig decides is told before anybody waits; the commit that it had is no difference."""
    assert unlike(EARLIER, "H100", event) == found


def test_a_measurement_is_not_repeated_by_less() -> None:
    """What was measured with the machine at rest is repeated so; the other way round more is done than was."""
    measured = replace(EARLIER, grade=Grade.MEASUREMENT)
    assert unlike(measured, None, asked(gpu_type="H100")) == ["grade: was measurement, is standard"]
    assert unlike(measured, None, asked(grade=Grade.MEASUREMENT)) == []
    assert unlike(EARLIER, None, asked(grade=Grade.MEASUREMENT)) == []


# --- the wrapper's part ------------------------------------------------------------------------------------


def test_gpus_tell_how_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power limit and clocks are those of now; what a GPU does not tell is null, and not made up."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUID)
    gpu = FakeGPU()
    install_nvml(monkeypatch, FakeNVML(gpu))
    assert gpus_here(1) == [
        {
            "uuid": UUID,
            "name": "NVIDIA H100 80GB HBM3",
            "power_limit_w": 700.0,
            "clocks_mhz": {"sm": 345, "memory": 2619},
            "max_clocks_mhz": {"sm": 1980, "memory": 2619},
        }
    ]
    gpu.clocks_mhz, gpu.limit_mw = None, None
    (quiet,) = gpu_settings(UUID)
    assert (quiet["power_limit_w"], quiet["clocks_mhz"]) == (None, {"sm": None, "memory": None})


def test_gpus_without_nvml_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is an empty list; GPUs that nothing is known of are null."""
    install_nvml(monkeypatch, FakeNVML(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUID)
    assert gpus_here(0) == []
    assert gpus_here(1) is None
    with pytest.raises(ReadFailed):
        gpu_settings(UUID)


def test_the_cpu_is_called_what_it_calls_itself(tmp_path: Path) -> None:
    """The first processor's name stands for all; where the kernel gives none it is null."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Xeon: the 2nd\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert cpu_here(cpuinfo)["model"] == "Xeon: the 2nd"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_here(cpuinfo)["model"] is None
    assert cpu_here()["logical"]


def test_a_provenance_is_like_itself() -> None:
    """What the wrapper makes is what the registry compares."""
    made = provenance(
        cpu={"model": None, "logical": 2}, gpus=[], versions={"vllm": "1"}, model="org/m", revision=None,
        weights_sha256=None, engine_args={},
    )  # fmt: skip
    assert differences(canonical_json(made), canonical_json(made)) == []
