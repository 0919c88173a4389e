"""How long an LLM takes to start and to be swapped: "vllm serve" against a prepared EngineHost, in turn."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import httpx
import psutil

from deployments.engine.host import EngineHost
from deployments.engine.vllm_api import RunningLLM
from deployments.machine import process_tree
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.bench.report import Result, counted, measured
from tests.bench.yardstick import FIRST_PROMPT, LIMIT_S, VllmServe

PART = "engine"
MAX_MODEL_LEN, KV_CACHE_GIB = 512, 0.25
SLEEP_HOST_GIB = 8.0
SETTLED_AFTER = 5
"""Swaps until growth is counted: caches are filled by the first ones."""


async def measure(scratch: Path, rounds: int, swaps: int, gpus: int) -> list[Result]:
    """``rounds`` times: an LLM is started, then swapped for another, by hand and in the host; then ``swaps`` more."""
    llms = [make_tiny_llm(scratch / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    host = EngineHost(gpus=gpus, kv_cache_gib=KV_CACHE_GIB, cache_dir=scratch / "cache", sleep_host_gib=SLEEP_HOST_GIB)
    begun_s = time.monotonic()
    await host.prepare()
    print(f"host prepared in {time.monotonic() - begun_s:.1f} s, warm: {host.warm} {host.cold_reason or ''}")
    took_s: dict[str, list[float]] = defaultdict(list)
    phases_s: dict[str, list[float]] = defaultdict(list)
    try:
        for number in range(1, rounds + 1):
            for name, seconds in (await asyncio.to_thread(by_hand, llms, scratch / "serve-cache")).items():
                took_s[name].append(seconds)
            for name, seconds in (await in_host(host, llms, phases_s)).items():
                took_s[name].append(seconds)
            if gpus:
                for name, seconds in (await asleep_in_host(host, llms)).items():
                    took_s[name].append(seconds)
            print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in took_s.items()))
        growth = await growth_of(host, llms, swaps)
    finally:
        await host.close()
    start_by_hand_s, swap_by_hand_s = (statistics.median(took_s[f"{what} by hand"]) for what in ("start", "swap"))
    return [
        ratio("cold_start_ratio", took_s["start"], start_by_hand_s),
        ratio("swap_ratio", took_s["swap"], swap_by_hand_s),
        measured(PART, "cold_start_s", took_s["start"], "s", baseline=start_by_hand_s),
        measured(PART, "swap_s", took_s["swap"], "s", baseline=swap_by_hand_s),
        measured(PART, "stop_s", took_s["stop"], "s"),
        *(measured(PART, f"cold_start_{phase}_s", values, "s") for phase, values in phases_s.items()),
        *(wakes(took_s, start_by_hand_s, swap_by_hand_s) if gpus else ()),
        *growth,
    ]


def wakes(took_s: dict[str, list[float]], start_by_hand_s: float, swap_by_hand_s: float) -> list[Result]:
    """The results of sleep mode, which only GPUs have."""
    return [
        ratio("wake_ratio", took_s["wake"], start_by_hand_s),
        ratio("wake_swap_ratio", took_s["swap by wake"], swap_by_hand_s),
        measured(PART, "sleep_s", took_s["sleep"], "s"),
        measured(PART, "wake_s", took_s["wake"], "s", baseline=start_by_hand_s),
        measured(PART, "wake_swap_s", took_s["swap by wake"], "s", baseline=swap_by_hand_s),
    ]


def ratio(name: str, took_s: list[float], baseline_s: float) -> Result:
    """How long something took, in parts of what it takes by hand."""
    return measured(PART, name, [seconds / baseline_s for seconds in took_s], "1", baseline=1.0)


def by_hand(llms: list[Path], cache: Path) -> dict[str, float]:
    """Seconds of a start, from the command to /health, and of a swap, from stopping to the other's first token."""
    with VllmServe(llms[0], cache, max_model_len=MAX_MODEL_LEN, kv_cache_gib=KV_CACHE_GIB) as server:
        start_s = server.took_s
        begun_s = time.monotonic()
        server.stop()
    with VllmServe(llms[1], cache, max_model_len=MAX_MODEL_LEN, kv_cache_gib=KV_CACHE_GIB) as server:
        server.first_token(str(llms[1]))
        swap_s = time.monotonic() - begun_s
    return {"start by hand": start_s, "swap by hand": swap_s}


async def in_host(host: EngineHost, llms: list[Path], phases_s: dict[str, list[float]]) -> dict[str, float]:
    """The same in a wrapper's engine host; it is empty before and afterwards."""
    begun_s = time.monotonic()
    running = await start(host, llms[0])
    await healthy(running)
    start_s = time.monotonic() - begun_s
    for phase, seconds in running.phases.items():
        phases_s[phase].append(seconds)
    begun_s = time.monotonic()
    stop_s = (await host.stop()).took_s
    await first_token(await start(host, llms[1]))
    swap_s = time.monotonic() - begun_s
    await host.stop()
    return {"start": start_s, "swap": swap_s, "stop": stop_s}


async def asleep_in_host(host: EngineHost, llms: list[Path]) -> dict[str, float]:
    """The swap from an LLM that runs to one that sleeps, to the first token, and its parts; empty afterwards."""
    first = await start(host, llms[0])
    await host.vacate()
    await start(host, llms[1])
    begun_s = time.monotonic()
    sleep_s = (await host.vacate(wanted_next=str(llms[0]))).took_s
    woken = await start(host, llms[0])
    await first_token(woken)
    swap_s = time.monotonic() - begun_s
    if woken is not first or host.asleep != [str(llms[1])]:
        raise RuntimeError("an LLM that should have slept was stopped; the log says why")
    await host.stop_asleep()
    await host.stop()
    return {"sleep": sleep_s, "wake": woken.started_s, "swap by wake": swap_s}


async def start(host: EngineHost, llm: Path) -> RunningLLM:
    """An LLM in the host."""
    engine_args = {"enforce_eager": True, "max_model_len": MAX_MODEL_LEN}
    return await host.start(str(llm), engine_args=engine_args, timeout_s=LIMIT_S)


async def healthy(running: RunningLLM) -> None:
    """The question that "vllm serve" is asked."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(running.asgi), base_url="http://engine") as http:
        (await http.get("/health")).raise_for_status()


async def first_token(running: RunningLLM) -> None:
    """Have it answer with one token."""
    body = {"model": running.served_model_name, "prompt": FIRST_PROMPT, "max_tokens": 1}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(running.asgi), base_url="http://engine") as http:
        (await http.post("/v1/completions", json=body, timeout=60)).raise_for_status()


async def growth_of(host: EngineHost, llms: list[Path], swaps: int) -> list[Result]:
    """What the host and its processes hold after many swaps, in parts of what they held after the first few."""
    before: dict[str, float] = {}
    for number in range(1, swaps + 1):
        await first_token(await start(host, llms[number % 2]))
        if number == SETTLED_AFTER:
            before = holdings()
        if number < swaps:
            await host.stop()
    after = holdings()
    await host.stop()
    return [
        counted(PART, f"swaps_growth_{name}", after[name] / before[name], "1", of=swaps, baseline=1.0) for name in after
    ]


def holdings() -> dict[str, float]:
    """Processes, threads, open files and memory (PSS, bytes) of this process and all below it."""
    family = [psutil.Process(os.getpid()), *process_tree.descendants(os.getpid())]
    return {
        "processes": len(family),
        "threads": sum(process.num_threads() for process in family),
        "files": sum(process.num_fds() for process in family),
        "memory": sum(process.memory_full_info().pss for process in family),
    }
