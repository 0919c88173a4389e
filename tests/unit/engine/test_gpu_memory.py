from __future__ import annotations

import asyncio

import pynvml
import pytest
from structlog.testing import capture_logs

from deployments.engine import gpu_memory
from deployments.engine.gpu_memory import TOLERANCE_BYTES, GPUMemory
from deployments.engine.order import StopOutcome
from tests.support.fake_counters import OTHER_UUID, UUID, FakeGPU, FakeNVML, install_nvml

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeGPU, FakeGPU]:
    """Two GPUs, the second of which is ours."""
    both = FakeGPU(OTHER_UUID), FakeGPU(UUID)
    install(monkeypatch, FakeNVML(*both))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    return both


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNVML) -> None:
    install_nvml(monkeypatch, nvml)


async def test_memory_that_stays_is_told(gpus: tuple[FakeGPU, FakeGPU]) -> None:
    """What a GPU of ours holds beyond its base line, when the time is up, is told by its UUID; others' are not ours."""
    memory = GPUMemory(1)
    memory.note()
    for gpu in gpus:
        gpu.used_bytes = 500 * 2**20 + GIB
    excess = await memory.excess(0)
    assert excess == {UUID: GIB}
    problem = StopOutcome(leftover=(7, 8), gpu_excess_bytes=excess).problem
    assert problem == f"engine processes 7, 8 can't be ended; {UUID} holds 1024 MiB too much"
    assert StopOutcome().problem is None


async def test_memory_that_comes_back_is_waited_for(
    gpus: tuple[FakeGPU, FakeGPU], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver takes a moment to free what a process had; that moment is waited for."""
    monkeypatch.setattr(gpu_memory, "_POLL_S", 0)
    memory = GPUMemory(1)
    memory.note()
    gpus[1].used_bytes = 20 * GIB
    waiting = asyncio.create_task(memory.excess(60))
    done, _ = await asyncio.wait({waiting}, timeout=0.01)
    assert not done
    gpus[1].used_bytes = 500 * 2**20 + TOLERANCE_BYTES
    assert await waiting == {}


async def test_base_line_is_the_least_that_was_seen(gpus: tuple[FakeGPU, FakeGPU]) -> None:
    """What another process held at the first start, and gave back, is no excuse later."""
    memory = GPUMemory(1)
    for used_bytes in (30 * GIB, 2 * GIB, 3 * GIB):
        gpus[1].used_bytes = used_bytes
        memory.note()
    assert await memory.excess(0) == {UUID: GIB}


@pytest.mark.parametrize("missing", [None, "nvmlDeviceGetMemoryInfo", "nvmlInit"])
async def test_unknown_is_no_fault(
    gpus: tuple[FakeGPU, FakeGPU],
    monkeypatch: pytest.MonkeyPatch,
    missing: str | None,
) -> None:
    """Where NVML can't say what is in use nothing is held against the GPU, with a warning; without GPUs nor that."""
    memory = GPUMemory(0 if missing is None else 1)
    memory.note()
    gpus[1].used_bytes = 20 * GIB
    if missing == "nvmlInit":
        install(monkeypatch, FakeNVML(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    elif missing is not None:
        gpus[1].used_bytes = None
    with capture_logs() as logs:
        assert await memory.excess(0) == {}
    expected = [] if missing is None else ["the memory of the GPUs is not watched"]
    assert [line["event"] for line in logs] == expected


async def test_what_sleeping_llms_keep_is_no_excess(gpus: tuple[FakeGPU, FakeGPU]) -> None:
    """What sleeping LLMs may keep of a GPU is not held against it; what is beyond that is."""
    memory = GPUMemory(1)
    memory.note()
    gpus[1].used_bytes = 500 * 2**20 + 5 * GIB
    assert await memory.excess(0, 5 * GIB) == {}
    assert await memory.excess(0, 4 * GIB) == {UUID: GIB}


def test_nothing_is_known_before_it_was_read(gpus: tuple[FakeGPU, FakeGPU]) -> None:
    """Without a base line nothing can be said of a GPU; of no GPUs there is nothing to know."""
    assert not GPUMemory(1).known
    assert GPUMemory(0).known
    memory = GPUMemory(1)
    memory.note()
    assert memory.known


def test_room_for_an_engine(gpus: tuple[FakeGPU, FakeGPU], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU lacks memory for an engine when less than its share is free; what is the engine's own counts as free."""
    memory = GPUMemory(1)
    gpus[1].memory_bytes, gpus[1].used_bytes = 80 * GIB, 10 * GIB
    assert not memory.lack(70 / 80)
    assert memory.lack(72 / 80)
    assert not memory.lack(72 / 80, kept_bytes=2 * GIB)
    install(monkeypatch, FakeNVML(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    assert not memory.lack(1.0)
