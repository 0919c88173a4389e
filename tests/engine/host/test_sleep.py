"""LLMs that sleep, on a real vLLM. On the CPU it frees no memory, and only stops to take prompts."""

import asyncio
import os
import signal
from pathlib import Path
from unittest.mock import ANY

import pytest

from deployments.engine.host import EngineHost
from deployments.engine.order import Order, StopOutcome
from deployments.engine.phases import Phase
from deployments.engine.vllm_api import RunningLLM
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.engine.calls import FAST, complete, still_running
from tests.engine.host.started import start, swap

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


async def test_sleep_mode_is_for_gpus(llms: Path, tmp_path: Path) -> None:
    """Only an engine on a GPU is made to sleep, and only where LLMs may."""
    order = Order(str(llms / "a"), "a", None, {}, "text-generation")
    made = {
        (gpus, gib): EngineHost(gpus=gpus, cache_dir=tmp_path, sleep_host_gib=gib)
        ._vllm.arguments(order)
        .enable_sleep_mode
        for gpus in (0, 1)
        for gib in (0, 64)
    }
    assert made == {(0, 0): False, (0, 64): False, (1, 0): False, (1, 64): True}


@pytest.mark.usefixtures("sleeping")
async def test_sleep_and_wake(host: EngineHost, llms: Path) -> None:
    """An LLM that sleeps lives on beside another, and wakes as itself, without having been started again."""
    told: list[Phase] = []
    a = await start(host, llms / "a")
    answer = await complete(a)
    assert await host.vacate() == StopOutcome(took_s=ANY)
    assert (host.running, host.asleep) == (None, [str(llms / "a")])
    b = await start(host, llms / "b")
    assert (await complete(b))["choices"] != answer["choices"]
    await host.vacate(wanted_next=str(llms / "a"))
    assert host.asleep == [str(llms / "a"), str(llms / "b")]
    assert await start(host, llms / "a", on_phase=told.append) is a
    assert told == [Phase.WAKING, Phase.WARMING_UP, Phase.READY]
    assert list(a.phases) == ["waking", "warming_up"]
    assert host.asleep == [str(llms / "b")]
    assert (await complete(a))["choices"] == answer["choices"]
    await host.stop()
    assert host.asleep == [str(llms / "b")]
    assert still_running((*a.pids, *b.pids)) == set(b.pids)


@pytest.mark.usefixtures("sleeping")
async def test_another_llm_does_not_wake(host: EngineHost, tmp_path: Path) -> None:
    """An LLM whose weights or arguments have changed since it went to sleep is started anew."""
    model = make_tiny_llm(tmp_path / "changing", seed=3)
    first = await start(host, model)
    await host.vacate()
    second = await start(host, model, engine_args=FAST | {"max_model_len": 256})
    assert second is not first
    await host.stop()
    make_tiny_llm(model, seed=4)
    third = await start(host, model)
    assert third is not first
    assert await complete(third)


@pytest.mark.usefixtures("sleeping")
async def test_killed_in_its_sleep(host: EngineHost, llms: Path) -> None:
    """An LLM that dies in its sleep is forgotten with all its processes; the one that runs takes no notice."""
    a = await start(host, llms / "a")
    await host.vacate()
    b = await start(host, llms / "b")
    os.kill(a.pids[0], signal.SIGKILL)
    async with asyncio.timeout(2):
        await a.died.wait()
    await asyncio.gather(*host._dead_sleepers)
    assert host.asleep == []
    assert still_running(a.pids) == set()
    assert not b.died.is_set()
    assert await complete(b)
    assert await complete(await swap(host, llms / "a"))


@pytest.mark.usefixtures("sleeping")
async def test_wakes_and_does_not_answer(host: EngineHost, llms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM that has woken and fails to answer once is started anew."""
    a = await start(host, llms / "a")
    await host.vacate()
    warm_up = RunningLLM.warm_up

    async def fails(llm: RunningLLM) -> None:
        if llm is a:
            raise RuntimeError("illegal address")
        await warm_up(llm)

    monkeypatch.setattr(RunningLLM, "warm_up", fails)
    again = await start(host, llms / "a")
    assert still_running(a.pids) == set()
    assert await complete(again)


@pytest.mark.usefixtures("sleeping")
async def test_dead_llm_does_not_sleep(host: EngineHost, llms: Path) -> None:
    """An LLM that has died is stopped, whoever wanted it to sleep."""
    a = await start(host, llms / "a")
    os.kill(a.pids[-1], signal.SIGKILL)
    await a.died.wait()
    await host.vacate()
    assert host.asleep == []
    assert still_running(a.pids) == set()
