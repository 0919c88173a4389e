"""How much memory a machine has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from deployments.machine import gpus
from deployments.machine.memory import MainMemory, gpu_memory_bytes, main_memory
from tests.support.fake_counters import OTHER_UUID, UUID, FakeGPU, FakeNVML, install_nvml

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
    assert gpus.driver_version() == "610.43.02"
    assert nvml.opened == 0
    install_nvml(monkeypatch, FakeNVML(init_error=9))
    with pytest.raises(gpus.ReadFailed):
        gpus.driver_version()


MACHINE = MainMemory(16 * GIB, 10 * GIB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Main memory of 16 GiB, of which 10 are left."""
    memory = SimpleNamespace(total=MACHINE.total_bytes, available=MACHINE.available_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder: Path, limit: str, used: int, reclaimable: int, *, version: int = 2) -> None:
    """A control group's files."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    field = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n{field} {reclaimable}\n")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("limit", "used_gib", "expected"),
    [
        ("max", 5, MACHINE),
        (str(4 * GIB), 3, MainMemory(4 * GIB, 2 * GIB)),  # 3 GiB used, 1 of them for files that can be read again
        (str(4 * GIB), 6, MainMemory(4 * GIB, 0)),
        (str(12 * GIB), 1, MainMemory(12 * GIB, 10 * GIB)),  # the machine has less left than the group may take
        (str(2**63 - 4096), 5, MACHINE),  # how version 1 says that there is no limit
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_main_memory_is_what_we_may_use(
    tmp_path: Path, version: int, limit: str, used_gib: int, expected: MainMemory
) -> None:
    """All of the machine's, or what the container is allowed and has not used yet."""
    root = tmp_path if version == 2 else tmp_path / "memory"
    group(root, limit, used_gib * GIB, GIB, version=version)
    own = tmp_path / "own"
    own.write_text("0::/\n" if version == 2 else "7:cpu:/x\n4:memory:/\n0::/\n")
    assert main_memory(tmp_path, own) == expected


@pytest.mark.usefixtures("machine")
def test_the_tightest_group_around_us_counts(tmp_path: Path) -> None:
    """A group above ours may allow less, or have less left; one that is not mounted here limits nothing."""
    group(tmp_path / "a", str(8 * GIB), 7 * GIB, 0)
    group(tmp_path / "a" / "b", str(9 * GIB), GIB, 0)
    own = tmp_path / "own"
    own.write_text("0::/a/b/c\n")
    assert main_memory(tmp_path, own) == MainMemory(8 * GIB, GIB)
    own.write_text("0::/elsewhere\n")
    assert main_memory(tmp_path, own) == MACHINE
