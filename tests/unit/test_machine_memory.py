"""How much memory a machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deployments import energy_sources
from deployments.machine_memory import gpu_memory_bytes, main_memory_bytes
from tests.fake_counters import OTHER_UUID, UUID, FakeGPU, FakeNVML, install_nvml

GIB = 2**30


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    """Two GPUs, both ours."""
    smaller = FakeGPU(OTHER_UUID)
    smaller.memory_bytes = 40 * GIB
    fake = FakeNVML(FakeGPU(), smaller)
    install_nvml(monkeypatch, fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{UUID},{OTHER_UUID}")
    return fake


def test_memory_is_that_of_the_smallest_of_our_gpus(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM is spread evenly: what the smallest GPU has is what counts. NVML is given back."""
    assert gpu_memory_bytes(2) == 40 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu_memory_bytes(1) == 80 * GIB
    assert nvml.opened == 0


def test_without_gpu_there_is_none_and_nobody_is_asked(nvml: FakeNVML) -> None:
    """A wrapper without GPU does not see those of its machine."""
    assert gpu_memory_bytes(0) is None


@pytest.mark.parametrize("visible", ["", "GPU-unknown", "7"])
def test_what_nvml_does_not_tell_is_not_known(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    """Not 0: then nothing is refused. NVML is given back all the same."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory_bytes(1) is None
    assert nvml.opened == 0


def test_no_nvml_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver the memory of GPUs is not known."""
    install_nvml(monkeypatch, FakeNVML(init_error=9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUID)
    assert gpu_memory_bytes(1) is None


def test_driver_is_named(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is NVML's, which is given back; without NVML that is said, not guessed."""
    assert energy_sources.driver_version() == "610.43.02"
    assert nvml.opened == 0
    install_nvml(monkeypatch, FakeNVML(init_error=9))
    with pytest.raises(energy_sources.ReadFailed):
        energy_sources.driver_version()


@pytest.mark.parametrize(("limit", "is_limited"), [("1073741824\n", True), ("max\n", False), (None, False)])
def test_main_memory_is_what_we_may_use(tmp_path: Path, limit: str | None, is_limited: bool) -> None:
    """All of the machine's, or what the container is allowed."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    total = psutil.virtual_memory().total
    assert main_memory_bytes(tmp_path / "memory.max") == (GIB if is_limited else total)
