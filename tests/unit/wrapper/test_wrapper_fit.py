"""A wrapper's own look at an LLM before it starts an engine for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.order import StopOutcome
from deployments.machine.memory import MainMemory
from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper import swap
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed
from registry.settings import EnergySettings, WrapperSettings
from tests.support.checkpoint_files import LLAMA, write_checkpoint
from tests.support.fake_cluster import UNTOLD
from tests.support.undying_wrapper import started_wrapper

GIB = 2**30


class CountingHost:
    """An engine host that runs nothing, and counts what was started."""

    started: list[str]
    stopped: int
    warm = True
    cold_reason = None
    asleep: tuple[str, ...] = ()

    def __init__(self, **_: object) -> None:
        self.running = None

    async def prepare(self) -> None:
        pass

    async def start(self, model: str, **_: object) -> None:
        type(self).started.append(model)
        raise EngineStartFailed(model, "it was not too large", permanent=True)

    async def stop_asleep(self) -> None:
        self.asleep = ()

    def give_up(self, llm: object, reason: str) -> None:
        raise AssertionError("no engine runs here")

    async def vacate(self, *, wanted_next: str) -> StopOutcome:
        type(self).stopped += 1
        return StopOutcome()


Make = Callable[..., Awaitable[LLMWrapper]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes a wrapper on a machine with 16 GiB of main memory and GPUs of 24 GiB."""

    async def make(
        *,
        gpus: int = 0,
        gpu_memory_bytes: int | None = 24 * GIB,
        on_machine: int = 1,
        available: int = 16 * GIB,
        free_first: Sequence[int] = (),
        **settings: Any,
    ) -> LLMWrapper:
        free = iter(free_first)
        CountingHost.started, CountingHost.stopped = [], 0
        monkeypatch.setattr(wrapper_module, "EngineHost", CountingHost)
        monkeypatch.setattr(swap, "main_memory", lambda: MainMemory(16 * GIB, next(free, available)))
        monkeypatch.setattr(swap, "gpu_memory_bytes", lambda gpus: gpu_memory_bytes if gpus else None)
        sources = ModelSources(True, (tmp_path / "llms",), tmp_path)
        config = WrapperConfig(
            "a-0", gpus, WrapperSettings(**settings), EnergySettings(), sources, tmp_path, on_machine=on_machine
        )
        return await started_wrapper(config)

    return make


def llm(folder: Path, gib: float) -> LLMSpec:
    """An LLM whose weights take so many GiB, and its KV cache 1 GiB: 1024 tokens of 2 layers, 1 MiB a token."""
    config = {**LLAMA, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 2048}
    path = write_checkpoint(folder / "llms" / f"{gib}", config, {"w": ("BF16", (int(gib * GIB) // 2,))})
    return LLMSpec(str(path), "text-generation")


async def refusal(wrapper: LLMWrapper, spec: LLMSpec) -> EngineStartFailed:
    with pytest.raises(EngineStartFailed) as caught:
        await wrapper.deploy(1, spec, None)
    return caught.value


@pytest.mark.parametrize(
    ("wrapper", "gib", "has"),
    [
        ({}, 14, "this wrapper has 16.0 GiB of main memory, of which 90 % may be used"),
        ({"on_machine": 2}, 6, "this wrapper has 8.0 GiB of main memory"),
        ({"gpus": 1}, 24, "this wrapper has 1 GPU with 24.0 GiB each"),
        ({"gpus": 4}, 96, "this wrapper has 4 GPUs with 24.0 GiB each"),
    ],
)
async def test_an_llm_that_is_too_large_is_not_started(
    make: Make, tmp_path: Path, wrapper: dict[str, int], gib: float, has: str
) -> None:
    """It is refused with the figures, the wrapper is empty, and another machine may be tried."""
    error = await refusal(await make(**wrapper), llm(tmp_path, gib))
    assert f"its weights take {gib:.1f} GiB and the KV cache of 1024 tokens" in error.reason
    assert has in error.reason
    assert not error.permanent
    assert CountingHost.started == []
    assert CountingHost.stopped == 1


@pytest.mark.parametrize(
    ("wrapper", "gib"),
    [
        ({}, 12),
        ({"gpus": 1}, 21),
        ({"gpus": 4}, 80),
        ({"gpus": 1, "gpu_memory_bytes": None}, 1000),
    ],
)
async def test_an_llm_that_may_fit_is_started(make: Make, tmp_path: Path, wrapper: dict[str, int], gib: float) -> None:
    """Also where nobody knows how much memory there is."""
    error = await refusal(await make(**wrapper), llm(tmp_path, gib))
    assert error.reason == "it was not too large"


async def test_what_is_not_known_is_started(make: Make, tmp_path: Path) -> None:
    """The engine finds out, for a checkpoint that can't be read."""
    folder = tmp_path / "llms" / "empty"
    folder.mkdir(parents=True)
    error = await refusal(await make(), LLMSpec(str(folder), "text-generation"))
    assert error.reason == "it was not too large"


async def test_the_configured_kv_cache_is_a_limit(make: Make, tmp_path: Path) -> None:
    """A context that needs more than ``kv_cache_gib`` is refused, however much memory there is."""
    spec = llm(tmp_path, 1)
    assert "not too large" in (await refusal(await make(kv_cache_gib=1), spec)).reason
    longer = LLMSpec(spec.model, "text-generation", engine_args='{"max_model_len":1025}')
    assert "1.0 GiB of it for the KV cache" in (await refusal(await make(kv_cache_gib=1), longer)).reason


@pytest.mark.parametrize(("available_gib", "starts"), [(4.9, True), (4.8, False)])
async def test_others_on_the_machine_keep_a_tenth_of_its_memory(
    make: Make, tmp_path: Path, available_gib: float, starts: bool
) -> None:
    """2 GiB of weights, 1 of KV cache, 0.25 for the processes start where 4.85 of the 16 GiB are free, not below.

    The reason has the figures, and another machine is tried.
    """
    error = await refusal(await make(available=int(available_gib * GIB)), llm(tmp_path, 2))
    assert CountingHost.started == ([llm(tmp_path, 2).model] if starts else [])
    if not starts:
        assert "it needs 3.2 GiB of main memory, but only 4.8 GiB of the machine's 16.0 GiB are free" in error.reason
        assert not error.permanent


async def test_sleeping_llms_give_way_to_one_that_starts(make: Make, tmp_path: Path) -> None:
    """On a machine with GPUs the engine's processes need main memory, too; what sleeps is ended for them."""
    wrapper = await make(gpus=1, free_first=[16 * GIB, GIB], available=4 * GIB)
    host: Any = wrapper._host
    host.asleep = ("org/sleeper",)
    assert (await refusal(wrapper, llm(tmp_path, 2))).reason == "it was not too large"
    assert host.asleep == ()


async def test_an_llm_that_sleeps_needs_no_more_memory(make: Make, tmp_path: Path) -> None:
    """Its weights are in main memory already: it is woken, however little is free."""
    wrapper, spec = await make(gpus=1, available=0), llm(tmp_path, 2)
    host: Any = wrapper._host
    host.asleep = (spec.model,)
    assert (await refusal(wrapper, spec)).reason == "it was not too large"


async def test_a_wrapper_reports_the_memory_of_its_machine(make: Make) -> None:
    """Of the machine as a whole; of its GPUs where it has some."""
    report = await (await make(gpus=2, on_machine=2)).report(UNTOLD)
    assert (report.memory_bytes, report.gpu_memory_bytes) == (16 * GIB, 24 * GIB)
    report = await (await make()).report(UNTOLD)
    assert (report.memory_bytes, report.gpu_memory_bytes) == (16 * GIB, None)
