"""What the energy account is worth and what it costs: errors of windows, the poller, the prompt path.

``python -m tests.bench.energy``. Streams are synthetic, with the ticks, jitter and wraps of real counters: their true
energy is known. Counters are files of a fake tree and a fake NVML: reading real ones costs what their driver does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import httpx

from deployments.energy.counters import nvml as gpu_counters
from deployments.energy.counters.probe import CPUModelSource, GPUCounter, PowercapZone, Source
from deployments.energy.figures import CPUModel
from deployments.energy.flights import Flight
from deployments.energy.meter import Meter
from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.vllm_api import RunningLLM
from deployments.machine import gpus as gpu_info
from deployments.machine.cpu_time import CPUTimeTree
from deployments.tokens import Tokens
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.prompt_gate import PromptGate
from registry.contract.messages import LeaseGrant
from registry.settings import EnergySettings
from tests.bench.report import OUTPUT, Result, counted, measured, publish
from tests.support.fake_counters import (
    FakeCounter,
    FakeGPU,
    FakeNVML,
    ManualClock,
    PowerCurve,
    Ticks,
    set_energy,
    write_zone,
)
from tests.support.fake_engine import USAGE, FakeEngine

PART = "energy"
TARGETS = {
    "window_error_within_resolution": ">= 0.999",
    "meter_cpu_share": "< 0.01",
    "prompt_overhead_p50_ms": "<= 0.1",
}
START_S = 1000.0
STREAM_S = 30.0
WINDOWS_A_STREAM = 500
LIMIT_W = 700.0
MODEL = CPUModel(0.74, 3.5, 0.37, 1.85, 1.75, 8.75, "bench")
ACCOUNT = {
    "allow_estimates": True,
    "grid": {"gco2eq_per_kwh": 360.0, "source": "bench", "date": "2026-01-01"},
    "embodied": {"g_per_hour": 37.5, "low_g_per_hour": 16.7, "high_g_per_hour": 49.0, "source": "bench"},
    "cpu_model": {
        "idle_w_per_cpu": 0.74, "busy_w_per_cpu": 3.5,
        "idle_low_w_per_cpu": 0.37, "idle_high_w_per_cpu": 1.85,
        "busy_low_w_per_cpu": 1.75, "busy_high_w_per_cpu": 8.75, "source": "bench"
    },
}  # fmt: skip


# --- errors of windows -------------------------------------------------------------------------------------


def nvml_like(chance: random.Random, curve: PowerCurve, _: Path) -> tuple[Source, Callable[[float], None]]:
    """A counter that ticks every 50 to 100 ms."""
    period_s = chance.uniform(0.05, 0.1)
    ticks_s = [START_S - period_s]
    while ticks_s[-1] < START_S + STREAM_S + 1:
        ticks_s.append(ticks_s[-1] + min(max(chance.gauss(period_s, 0.005), 0.04), 0.12))
    ticks = Ticks(curve.joules, ticks_s, 1e-3)
    return FakeCounter(ticks, name="gpu:x", max_age_s=None, step=1e-3, limit_w=LIMIT_W), lambda now_s: None


def powercap_like(chance: random.Random, curve: PowerCurve, folder: Path) -> tuple[Source, Callable[[float], None]]:
    """A zone that ticks every ms and wraps every few seconds."""
    range_uj = chance.randint(1_000_000_000, 3_000_000_000)
    zone = write_zone(folder, "intel-rapl:0", "package-0", range_uj=range_uj, limits_uw=[int(LIMIT_W * 1e6)])
    first_uj = chance.randrange(range_uj)

    def show(now_s: float) -> None:
        tick_s = START_S + int((now_s - START_S) * 1000) / 1000
        set_energy(zone, (first_uj + int(curve.joules(tick_s) * 1e6)) % range_uj)

    show(START_S)
    return PowercapZone("package-0", zone), show


def window_errors(windows: int) -> list[Result]:
    """How many random windows are told with an error within their own resolution, and how large their errors are."""
    known = within = unknown = 0
    relative: list[float] = []
    for seed in range(windows // WINDOWS_A_STREAM):
        chance = random.Random(seed)
        curve = PowerCurve(START_S, [(chance.uniform(0.02, 3.0), chance.uniform(60, LIMIT_W)) for _ in range(30)])
        with tempfile.TemporaryDirectory() as folder:
            kind = powercap_like if seed % 2 else nvml_like
            source, show = kind(chance, curve, Path(folder))
            clock = ManualClock(START_S)
            meter = Meter([source], clock=clock)
            while clock.now_s < START_S + STREAM_S:
                show(clock.now_s)
                meter.poll_once()
                clock.now_s += 0.05 + chance.expovariate(1 / 0.005)
        for _ in range(WINDOWS_A_STREAM):
            start_s, end_s = sorted(START_S + chance.uniform(0.5, STREAM_S - 0.5) for _ in range(2))
            energy = meter.window(start_s, max(end_s, start_s + 1e-6))
            if energy.total_j is None or energy.resolution_j is None:
                unknown += 1
                continue
            true_j = curve.joules(end_s) - curve.joules(start_s)
            error_j = abs(energy.total_j - true_j)
            known += 1
            within += error_j <= energy.resolution_j + 1e-9
            if end_s - start_s >= 2:
                relative.append(error_j / true_j)
    return [
        counted(PART, "window_error_within_resolution", within / known, "share", of=known),
        counted(PART, "window_unavailable", unknown / windows, "share", of=windows),
        measured(PART, "window_error_2s_and_more", relative, "share"),
    ]


# --- the poller --------------------------------------------------------------------------------------------


def counters(folder: Path) -> list[Source]:
    """A GPU and two zones."""
    gpu = FakeGPU()
    nvml = FakeNVML(gpu)
    for module in (gpu_counters, gpu_info):
        vars(module)["pynvml"] = nvml
    nvml.nvmlInit()
    return [
        GPUCounter(gpu.uuid, gpu, CPUTimeTree(os.getpid())),
        PowercapZone("package-0", write_zone(folder, "intel-rapl:0", "package-0")),
        PowercapZone("dram-0", write_zone(folder, "intel-rapl:0:0", "dram-0")),
    ]


def cpu_share(sources: Sequence[Source], seconds: float) -> float:
    """Of one core, what polling takes."""
    meter = Meter(sources)
    meter.start()
    wall_s, cpu_s = time.monotonic(), time.process_time()
    time.sleep(seconds)
    used = (time.process_time() - cpu_s) / (time.monotonic() - wall_s)
    meter.stop()
    return used


def polling(rounds: int, seconds: float) -> list[Result]:
    """CPU time of the polling thread, with hardware counters and with the model of a machine that has none."""
    with tempfile.TemporaryDirectory() as folder:
        real = [cpu_share(counters(Path(folder) / str(number)), seconds) for number in range(rounds)]
    model = [cpu_share([CPUModelSource(MODEL, CPUTimeTree(os.getpid()), cpus=2)], seconds) for _ in range(rounds)]
    return [
        measured(PART, "meter_cpu_share", real, "cores"),
        measured(PART, "meter_cpu_share_of_the_model", model, "cores"),
    ]


# --- the prompt path ---------------------------------------------------------------------------------------


class NoMeter:
    """A meter that measures nothing, and gives every prompt the account of another one: answers are as long."""

    counts_words = False

    def __init__(self, account: dict[str, Any], brief: dict[str, Any]) -> None:
        self._account, self._brief = account, brief

    def prompt(self, endpoint: str = "", *, warmup: bool = False, **_: object) -> UnmeteredPrompt:
        return UnmeteredPrompt(Flight(0.0, endpoint=endpoint, warmup=warmup), self._account, self._brief)

    def require_budget(self) -> None:
        pass


class UnmeteredPrompt:
    """A prompt on a NoMeter."""

    def __init__(self, flight: Flight, account: dict[str, Any], brief: dict[str, Any]) -> None:
        self.flight = flight
        self._account, self._brief = account, brief

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def end(self) -> None:
        pass

    def counted(self, tokens: Tokens) -> None:
        pass

    def account(self, **_: object) -> dict[str, Any]:
        return self._account

    def brief(self, **_: object) -> dict[str, Any]:
        return self._brief


def holder(meter: Any) -> httpx.AsyncClient:
    """The holder of a lease at a wrapper with this meter, before an engine that answers at once."""
    config = {"uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}}
    hand_over = getattr(meter, "hand_over", None)
    gate = LeaseGate(time.monotonic, fence_s=6000.0, process="this", on_change=hand_over)
    gate.bind(replace(LeaseGrant("r", 1, "t", json.dumps(config), 6000.0, 6000.0), as_of=gate.moment))
    engine = FakeEngine()
    app = PromptGate(
        gate, meter, engine=lambda: (cast("RunningLLM", engine), "ready"), max_in_flight=8, prompt_max_s=600.0
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://wrapper/t", timeout=60)


async def overhead(rounds: int, prompts: int) -> list[Result]:
    """Median time of a prompt with a meter less that of one without (A B B A), in ms and as a share of the latter."""
    meter = PromptMeter(EnergySettings.model_validate(ACCOUNT), gpus=0)
    meter.start()
    with meter.prompt() as prompt:
        await asyncio.sleep(0.2)
    account = prompt.account(usage=USAGE, answer="an answer")
    brief = prompt.brief(usage=USAGE, answer=None)
    with_meter, without = holder(meter), holder(NoMeter(account, brief))
    paths = {"process_prompt": {"question": "Why?"}, "v1/completions": {"prompt": "Why?"}}
    results = []
    for path, body in paths.items():

        async def ask(client: httpx.AsyncClient, path: str = path, body: Any = body) -> float:
            begun_s = time.perf_counter()
            (await client.post(path, json=body)).raise_for_status()
            return (time.perf_counter() - begun_s) * 1000

        differences, shares = [], []
        for _ in range(rounds):
            took_ms: dict[httpx.AsyncClient, list[float]] = {with_meter: [], without: []}
            for pair in range(2 * prompts):
                for client in (with_meter, without) if pair % 2 else (without, with_meter):
                    took_ms[client].append(await ask(client))
            alone_ms = p50(took_ms[without])
            differences.append(p50(took_ms[with_meter]) - alone_ms)
            shares.append(differences[-1] / alone_ms)
            await meter.write()
        name = "prompt" if path == "process_prompt" else "native"
        results.append(measured(PART, f"{name}_overhead_p50_ms", differences, "ms"))
        # The milliseconds depend on the machine and its other load; this share hardly does.
        results.append(measured(PART, f"{name}_overhead_share", shares, "share"))
    meter.stop()
    await with_meter.aclose()
    await without.aclose()
    return results


def p50(values: Sequence[float]) -> float:
    """The median of many values."""
    return sorted(values)[len(values) // 2]


def main() -> int:
    """Run all of it; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of polling, in each round")
    parser.add_argument("--prompts", type=int, default=200, help="in each round, by two")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    results = [
        *window_errors(chosen.windows),
        *asyncio.run(overhead(chosen.rounds, chosen.prompts)),
        *polling(chosen.rounds, chosen.seconds),
    ]
    publish(results, output=chosen.output, targets=TARGETS)
    found = {result.name: result.value for result in results}
    met = (
        found["window_error_within_resolution"] >= 0.999
        and found["meter_cpu_share"] < 0.01
        and found["prompt_overhead_p50_ms"] <= 0.1
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
