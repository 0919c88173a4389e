"""Feeds the real meter with a simulated machine, and keeps its windows as a registry would.

Each process of a wrapper has a ``PromptMeter`` of its own, with the world's clock, its counters and its files. Every
meter polls every 50 ms, in a phase of its own, except while the world's poller gets no CPU time. A report a second
takes what is written down; what a process has not reported when it dies is lost.
"""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from deployments.energy import build, prompt_meter
from deployments.energy.counters import nvml as gpu_counters
from deployments.energy.counters.probe import probe_sources
from deployments.energy.meter import Meter
from deployments.energy.prompt_meter import MeteredPrompt, PromptMeter
from deployments.machine import gpus as gpu_info
from deployments.machine.machine_cpu import MachineCPU
from deployments.machine.wrapper_activity import WrapperActivity
from deployments.tokens import Tokens
from registry.accounting.windows import KeptWindow
from registry.contract.messages import Belief, LeaseGrant, Moment
from registry.energy_settings import EnergySettings
from tests.energy_world.history import Event, Lease, Life, Load, Prompt
from tests.energy_world.tree import HERTZ, UPTIME_S
from tests.energy_world.world import EnergyWorld

T = TypeVar("T")
POLL_S = 0.05
JITTER_S = 0.002
"""A poller comes up to so much late."""
REPORT_S = 1.0
READY_S = 1.0
"""A wrapper starts its work when its meter is ready, or after so long."""
AFTER_S = 1.5
"""For so long the counters go on after the end of the history."""
MEASUREMENT, TENANT = 1, "tenant"
GRID = {"gco2eq_per_kwh": 400.0, "source": "made up", "date": "2026", "low_gco2eq_per_kwh": 350.0}
GRID["high_gco2eq_per_kwh"] = 450.0
EMBODIED = {"g_per_hour": 37.5, "low_g_per_hour": 16.7, "high_g_per_hour": 49.0, "source": "made up"}


class PolledMeter(Meter):
    """A meter without a thread: the driver polls it."""

    def start(self) -> None:
        """Do nothing: it has been polled until it was ready."""


@dataclass(frozen=True)
class Held:
    """A stretch of a process' time that was one lease's, or nobody's."""

    lease_id: str | None
    begin_s: float
    end_s: float


@dataclass
class Process:
    """One process of a wrapper, and what it was used for."""

    life: Life
    name: str
    meter: PromptMeter
    wrapper_activity: WrapperActivity
    born_s: float
    next_poll_s: float
    report_s: float
    ready_s: float | None = None
    waiting: list[Event] = field(default_factory=list)
    flights: dict[str, MeteredPrompt] = field(default_factory=dict)
    loading: AbstractContextManager[Any] | None = None
    loads: list[tuple[float, float]] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    holder: tuple[str | None, float] = (None, 0.0)
    kept: int = 0
    end_s: float = 0.0

    def utc_s(self, at_s: float) -> float:
        """Return the date that its records have for a time."""
        return self.meter._writer._dates.utc_s(at_s)


@dataclass
class Run:
    """What a registry has of a history when it is over, and what the meters were told."""

    world: EnergyWorld
    settings: EnergySettings
    windows: list[KeptWindow] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    """Window id → prompt."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Window id → what the answer to its prompt says of the moment."""
    processes: dict[str, Process] = field(default_factory=dict)

    def process_of(self, kept: KeptWindow) -> Process:
        """Return the process that has measured a window."""
        return self.processes[kept.window.window_id.rpartition("-")[0]]


def settings_of(world: EnergyWorld) -> EnergySettings:
    """Return what an operator would set on this machine: half of them allow estimates, with an honest CPU model."""
    rng = Random(f"{world.seed}:settings")
    cpu = world.machine.cpu
    off = rng.uniform(0.85, 1.2)
    idle_w = (sum(cpu.idle_w) + sum(cpu.dram_idle_w)) / cpu.processors
    busy_w = idle_w + cpu.busy_w + cpu.dram_busy_w
    model = {
        "idle_w_per_cpu": idle_w * off,
        "idle_low_w_per_cpu": idle_w * 0.8,
        "idle_high_w_per_cpu": idle_w * 1.25,
        "busy_w_per_cpu": busy_w * off,
        "busy_low_w_per_cpu": busy_w * 0.8,
        "busy_high_w_per_cpu": busy_w * 1.25,
        "source": "made up",
    }
    chosen = {"allow_estimates": rng.random() < 0.5, "grid": GRID, "embodied": EMBODIED, "cpu_model": model}
    return EnergySettings.model_validate(chosen)


def drive(world: EnergyWorld, root: Path) -> Run:
    """Return what the meters have measured of a world. Needs an empty directory."""
    driver = _Driver(world, root)
    with driver.patched():
        driver.run()
    return driver.made


class _Driver:
    def __init__(self, world: EnergyWorld, root: Path) -> None:
        self.world, self.root = world, root
        self.made = Run(world, settings_of(world))
        self.rng = Random(f"{world.seed}:driver")
        self.tells_cached = self.rng.random() < 0.7
        self.alive: dict[str, Process] = {}
        self._starting: Life | None = None
        self._written_s = -1e9

    # --- time -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Drive the world from a second before its begin to its end, and until all windows are written."""
        clock = self.world.clock
        clock.now_s = -READY_S
        for life in self.world.history.lives:
            if life.begin_s < 0:
                self._start(life)
        for event in self.world.events:
            self._poll_until(event.at_s)
            clock.advance_to(event.at_s)
            self._happened(event)
        self._poll_until(self.world.horizon_s + AFTER_S)
        for wait_s in (0.0, 31.0):  # what a counter does not tell in half a minute is not known
            clock.advance(wait_s)
            for process in self.alive.values():
                for _ in range(3):
                    self._report(process)
        for process in list(self.alive.values()):
            self._stop(process)

    def _poll_until(self, at_s: float) -> None:
        clock = self.world.clock
        while self.alive:
            process = min(self.alive.values(), key=lambda each: each.next_poll_s)
            if process.next_poll_s > at_s:
                return
            clock.advance_to(max(process.next_poll_s, clock.now_s))
            process.next_poll_s = clock.now_s + POLL_S + self.rng.uniform(0.0, JITTER_S)
            if not self.world.is_paused():
                self._write_tree()
                process.meter.meter.poll_once()
            if process.ready_s is None:
                self._try_ready(process)
            elif clock.now_s >= process.report_s:
                process.report_s += REPORT_S
                self._report(process)

    def _write_tree(self) -> None:
        if self._written_s != self.world.clock.now_s:
            self._written_s = self.world.clock.now_s
            self.world.write_tree(self.root)

    # --- processes --------------------------------------------------------------------------------------

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let the meter see this world in place of the machine that the test runs on."""
        world = self.world
        proc = self.root / "proc"
        with pytest.MonkeyPatch.context() as patch:
            for module in (gpu_counters, gpu_info):
                patch.setattr(module, "pynvml", world.nvml)
            patch.setattr(os, "cpu_count", lambda: world.machine.cpu.processors)
            patch.setattr(prompt_meter, "Meter", partial(PolledMeter, clock=world.clock))
            patch.setattr(
                prompt_meter, "MachineCPU", lambda _, others: MachineCPU(self._pid(), others=others, proc_root=proc)
            )
            patch.setattr(
                build,
                "probe_sources",
                lambda uuids, *, pid, **more: probe_sources(
                    uuids,
                    pid=self._pid(),
                    powercap_root=self.root / "sys/class/powercap",
                    proc_root=proc,
                    **more,
                ),
            )
            self.patch = patch
            yield

    def _pid(self) -> int:
        assert self._starting is not None
        return self._starting.pid

    def _start(self, life: Life) -> None:
        world, now_s = self.world, self.world.clock.now_s
        machine = world.machine
        gpus = machine.wrapper(life.wrapper).gpus
        self._write_tree()
        self._starting = life
        self.patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(machine.gpus[gpu].uuid for gpu in gpus))
        started = int((UPTIME_S + life.begin_s) * HERTZ)
        wrapper_activity = WrapperActivity(self.root / "wrappers", life.wrapper, process=(life.pid, started))
        name = f"process{life.pid}"
        meter = PromptMeter(
            self.made.settings,
            gpus=len(gpus),
            cpus=machine.cpu.processors / len(machine.wrappers),
            on_machine=len(machine.wrappers),
            wrapper_id=life.wrapper,
            process=name,
            utc_s=lambda: world.wall_s,
            wrapper_activity=wrapper_activity,
        )
        process = Process(life, name, meter, wrapper_activity, now_s, now_s, now_s + self.rng.uniform(1.0, 2.0))
        self.made.processes[name] = self.alive[life.wrapper] = process

    def _try_ready(self, process: Process) -> None:
        now_s = self.world.clock.now_s
        if not process.meter.meter.is_final(-1e9) and now_s < process.born_s + READY_S - 1e-9:
            return
        if process.life.begin_s < 0 and now_s < -POLL_S:
            return  # it is no news that this one is ready
        process.meter.start()
        process.ready_s = now_s
        process.holder = (None, now_s)
        for event in process.waiting:
            self._happened(event)
        process.waiting.clear()

    def _stop(self, process: Process) -> None:
        """End a process: what it has not reported is lost."""
        self._hold(process, None)
        process.end_s = self.world.clock.now_s
        if process.loading is not None:
            process.loads.append((process.loads.pop()[0], process.end_s))
        process.meter.stop()
        os.close(process.wrapper_activity._file)
        del self.alive[process.life.wrapper]

    def _report(self, process: Process) -> None:
        moment = Moment(process.name, self.world.clock.now_s)
        windows = _result(process.meter.windows(Belief(1, None, moment, windows_kept=process.kept)))
        if windows:
            process.kept = windows[-1].number
            self.made.windows += [
                KeptWindow(each, "machine", None if each.request_id is None else TENANT) for each in windows
            ]

    # --- what happens -----------------------------------------------------------------------------------

    def _happened(self, event: Event) -> None:
        what = event.what
        if isinstance(what, Life):
            if event.kind == "wrapper_started":
                self._start(what)
            else:
                self._stop(self.alive[what.wrapper])
            return
        if not isinstance(what, Lease | Load | Prompt):
            return
        process = self.alive[what.wrapper]
        if process.ready_s is None:
            process.waiting.append(event)
        elif isinstance(what, Lease):
            self._lease(process, what, began=event.kind == "lease_began")
        elif isinstance(what, Load):
            self._load(process, what, began=event.kind == "load_began")
        elif event.kind == "prompt_began":
            process.flights[what.id] = process.meter.prompt(warmup=what.warm_up, prompt_id=what.name)
        elif event.kind == "prompt_ended":
            self._ended(process, what)

    def _lease(self, process: Process, lease: Lease, *, began: bool) -> None:
        now_s = self.world.clock.now_s
        self._hold(process, lease.id if began else None)
        grant = LeaseGrant(lease.id, MEASUREMENT, "token", "{}", 1e6, 1e6, handed_over_s=self._handed_over_s(lease))
        process.meter.hand_over(grant if began else None, now_s)

    def _handed_over_s(self, lease: Lease) -> float | None:
        now_s = self.world.clock.now_s
        return None if now_s == lease.begin_s else self.world.history.wall_s(lease.begin_s)

    def _hold(self, process: Process, lease_id: str | None) -> None:
        now_s = self.world.clock.now_s
        before, since_s = process.holder
        if process.ready_s is not None and now_s > since_s:
            process.held.append(Held(before, since_s, now_s))
        process.holder = (lease_id, now_s)

    def _load(self, process: Process, load: Load, *, began: bool) -> None:
        now_s = self.world.clock.now_s
        if began:
            process.loading = process.meter.load(load.llm)
            process.loading.__enter__()
            process.loads.append((now_s, 1e9))
            return
        if process.loading is None:
            return
        process.loading.__exit__(None, None, None)
        process.loading = None
        process.loads.append((process.loads.pop()[0], now_s))
        for lease in self.world.history.leases:
            if lease.id == load.lease_id and lease.end_s > now_s:  # it is handed over again, to the new process
                self._lease(process, lease, began=True)

    def _ended(self, process: Process, prompt: Prompt) -> None:
        """End a prompt as the answer to it does."""
        metered = process.flights.pop(prompt.id)
        flight = metered.flight
        self.made.prompts[flight.window_id] = prompt
        if prompt.outcome == "refused":
            metered.refused()
            metered.end()
            return
        metered.end()
        if prompt.outcome == "hung_up":
            flight.status = "cut"
            cached = prompt.cached_tokens if self.tells_cached else None
            metered.counted(Tokens(prompt.prompt_tokens, cached, prompt.output_tokens))
            return
        usage: dict[str, Any] = {"prompt_tokens": prompt.prompt_tokens, "completion_tokens": prompt.output_tokens}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": prompt.cached_tokens}
        self.made.answers[flight.window_id] = metered.account(usage=usage, answer="so many words")


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that waits for nothing but its turn."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
