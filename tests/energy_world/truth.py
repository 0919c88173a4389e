"""The exact power of each component over time, and who it belongs to, for a history.

Power is constant between two events, so every integral is exact. Attribution, the same everywhere:

* A wrapper's **base** power is what it takes without prompts: its GPUs' idle, context and load power, its processes'
  own CPU load, and its share of the CPU packages' and DRAM's idle power.
* While at least one of its prompts is in flight, the base is divided among these equally; else it is idle energy.
* What prompts take above the base is their **own**. On a GPU, several together take less than their sum: that is
  divided by what each would take alone in its phase (prefill or decode). On the CPU it is divided equally.
* A stranger's power, the system's, spare GPUs' and shares of idle power that no wrapper has are **unassigned**.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tests.energy_world.history import History, Prompt, Stranger, llm_of
from tests.energy_world.machine import Gpu, Llm, Wrapper

Floats = NDArray[np.float64]

MODULE_CPU_W = 150.0
"""Of a module's limit [W], what is kept for its CPU and memory."""


class Steps:
    """A function of time that is constant between breakpoints, and beyond the first and the last one."""

    def __init__(self, times_s: Sequence[float], values: Sequence[float]) -> None:
        """Take n + 1 increasing times and the n values between them."""
        self.times_s: Floats = np.asarray(times_s, dtype=float)
        self.values: Floats = np.asarray(values, dtype=float)
        self.sums: Floats = np.concatenate(([0.0], np.cumsum(self.values * np.diff(self.times_s))))
        self._times = self.times_s.tolist()
        self._values = self.values.tolist()
        self._sums = self.sums.tolist()

    def at(self, at_s: float) -> float:
        """Return the value at a time; at a breakpoint the one after it."""
        return float(self._values[self._place(at_s)])

    def integral(self, at_s: float) -> float:
        """Return the exact integral from the first breakpoint to a time; negative before it."""
        place = self._place(at_s)
        return float(self._sums[place] + self._values[place] * (at_s - self._times[place]))

    def integrals(self, at_s: Floats) -> Floats:
        """Return ``integral`` for many times."""
        place = np.clip(np.searchsorted(self.times_s, at_s, "right") - 1, 0, len(self.values) - 1)
        result: Floats = self.sums[place] + self.values[place] * (at_s - self.times_s[place])
        return result

    def between(self, begin_s: float, end_s: float) -> float:
        """Return the exact integral between two times."""
        return self.integral(end_s) - self.integral(begin_s)

    def _place(self, at_s: float) -> int:
        return min(max(bisect_right(self._times, at_s) - 1, 0), len(self._values) - 1)


def total(parts: Iterable[tuple[Steps, float]]) -> Steps:
    """Return the weighted sum of functions, with the breakpoints of all."""
    listed = list(parts)
    times = np.unique(np.concatenate([steps.times_s for steps, _ in listed]))
    middles = (times[1:] + times[:-1]) / 2
    values = np.zeros(len(middles))
    for steps, weight in listed:
        place = np.clip(np.searchsorted(steps.times_s, middles, "right") - 1, 0, len(steps.values) - 1)
        values += weight * steps.values[place]
    return Steps(times.tolist(), values.tolist())


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy [J] by component. CPU and DRAM: what processes caused, and a share of what idle ones take."""

    gpu_j: float = 0.0
    cpu_busy_j: float = 0.0
    cpu_idle_j: float = 0.0
    dram_busy_j: float = 0.0
    dram_idle_j: float = 0.0

    @property
    def cpu_j(self) -> float:
        """CPU packages, busy and idle [J]."""
        return self.cpu_busy_j + self.cpu_idle_j

    @property
    def dram_j(self) -> float:
        """DRAM, busy and idle [J]."""
        return self.dram_busy_j + self.dram_idle_j

    @property
    def total_j(self) -> float:
        """All components [J]."""
        return self.gpu_j + self.cpu_j + self.dram_j

    def __add__(self, other: Energy) -> Energy:
        return Energy(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Energy) -> Energy:
        return Energy(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


NOTHING = Energy()


def sum_of(parts: Iterable[Energy]) -> Energy:
    """Return the sum; nothing if there are no parts."""
    result = NOTHING
    for part in parts:
        result += part
    return result


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch in which nothing changes for one wrapper. Powers [W] are in the order of ``Energy``'s fields."""

    begin_s: float
    end_s: float
    alive: bool
    loaded: bool
    loading: bool
    in_flight: tuple[tuple[Prompt, float], ...]
    """Prompts with the GPU power [W] that each would take alone."""
    base_w: tuple[float, ...]
    own_w: tuple[float, ...]
    gpu_w: tuple[float, ...]
    """All of the wrapper's GPUs, in its order, with strangers."""
    foreign_w: float
    front_cpus: float
    serve_cpus: float
    load_cpus: float


class Truth:
    """Everything that is true of a machine's power during a history."""

    def __init__(self, history: History) -> None:
        self.history = history
        machine = self.machine = history.machine
        self.segments = {w.name: _segments(history, w) for w in machine.wrappers}
        span = (0.0, history.horizon_s)
        self.gpus = [self._gpu(gpu) for gpu in machine.gpus]
        """Power of each GPU [W], without its module's CPU."""
        self.foreign = {
            name: self._steps(name, [segment.foreign_w for segment in segments])
            for name, segments in self.segments.items()
        }
        """Strangers' power on each wrapper's GPUs [W]."""
        self.tree_cpus = {
            name: self._steps(name, [s.front_cpus + s.serve_cpus + s.load_cpus for s in segments])
            for name, segments in self.segments.items()
        }
        """Busy processors of each wrapper's process tree."""
        self.front_cpus = {n: self._steps(n, [s.front_cpus for s in v]) for n, v in self.segments.items()}
        self.serve_cpus = {n: self._steps(n, [s.serve_cpus for s in v]) for n, v in self.segments.items()}
        self.load_cpus = {n: self._steps(n, [s.load_cpus for s in v]) for n, v in self.segments.items()}
        self.system_cpus = Steps(span, [machine.system_cpus])
        self.stranger_cpus = {s.pid: _span(s, s.cpus, history.horizon_s) for s in history.strangers if s.cpus}
        """Busy processors of each stranger, by process id."""
        others = [(self.system_cpus, 1.0), *((steps, 1.0) for steps in self.stranger_cpus.values())]
        self.other_cpus = total(others)
        """Busy processors of all that are in no wrapper's tree."""
        self.packages = [self._package(p, machine.cpu.idle_w[p], machine.cpu.busy_w) for p in self._package_numbers]
        self.drams = [
            self._package(p, machine.cpu.dram_idle_w[p], machine.cpu.dram_busy_w) for p in self._package_numbers
        ]
        self.busy_cpus = total([*others, *((steps, 1.0) for steps in self.tree_cpus.values())])
        """Busy processors of the whole machine."""
        parts = range(len(fields(Energy)))
        self.wrappers = {
            name: [self._steps(name, [s.base_w[part] + s.own_w[part] for s in segments]) for part in parts]
            for name, segments in self.segments.items()
        }
        """Power of each wrapper [W], by component in the order of ``Energy``'s fields."""
        self.prompts: dict[str, tuple[Energy, Energy]] = self._prompts()
        """Prompt id → (its part of the base, its own) energy."""

    @property
    def _package_numbers(self) -> range:
        return range(self.machine.cpu.packages)

    def wrapper(self, name: str, begin_s: float, end_s: float) -> Energy:
        """Return the energy of a wrapper between two times, without strangers on its GPUs."""
        return Energy(*(steps.between(begin_s, end_s) for steps in self.wrappers[name]))

    def whole(self, begin_s: float, end_s: float) -> Energy:
        """Return the energy of the whole machine between two times."""
        idle_w, dram_idle_w = sum(self.machine.cpu.idle_w), sum(self.machine.cpu.dram_idle_w)
        time_s = end_s - begin_s
        cpu_j = sum(steps.between(begin_s, end_s) for steps in self.packages)
        dram_j = sum(steps.between(begin_s, end_s) for steps in self.drams)
        return Energy(
            gpu_j=sum(steps.between(begin_s, end_s) for steps in self.gpus),
            cpu_busy_j=cpu_j - idle_w * time_s,
            cpu_idle_j=idle_w * time_s,
            dram_busy_j=dram_j - dram_idle_w * time_s,
            dram_idle_j=dram_idle_w * time_s,
        )

    def _steps(self, name: str, values: list[float]) -> Steps:
        segments = self.segments[name]
        return Steps([segments[0].begin_s, *(s.end_s for s in segments)], values)

    def _gpu(self, gpu: Gpu) -> Steps:
        for wrapper in self.machine.wrappers:
            if gpu.index in wrapper.gpus:
                place = wrapper.gpus.index(gpu.index)
                return self._steps(wrapper.name, [s.gpu_w[place] for s in self.segments[wrapper.name]])
        return Steps((0.0, self.history.horizon_s), [gpu.idle_w])

    def _package(self, number: int, idle_w: float, busy_w: float) -> Steps:
        parts = [(Steps((0.0, self.history.horizon_s), [idle_w]), 1.0)]
        parts += [(self.tree_cpus[w.name], w.busy_shares[number] * busy_w) for w in self.machine.wrappers]
        parts.append((self.other_cpus, busy_w / self.machine.cpu.packages))
        return total(parts)

    def _prompts(self) -> dict[str, tuple[Energy, Energy]]:
        """Integrate each prompt's power: its part of what is divided equally, and its own on the GPU."""
        llms = {llm.name: llm for llm in self.machine.llms}
        found = {p.id: (NOTHING, NOTHING) for p in self.history.prompts}
        for name, segments in self.segments.items():
            counts = [len(s.in_flight) for s in segments]
            each = [1 / n if n else 0.0 for n in counts]
            base = [
                self._steps(name, [s.base_w[part] * e for s, e in zip(segments, each, strict=True)])
                for part in range(5)
            ]
            own = [
                self._steps(name, [s.own_w[part] * e for s, e in zip(segments, each, strict=True)])
                for part in range(1, 5)
            ]
            per_watt = [s.own_w[0] / sum(watts for _, watts in s.in_flight) if s.in_flight else 0.0 for s in segments]
            gpu = self._steps(name, per_watt)
            for p in self.history.prompts:
                if p.wrapper != name or not p.ran:
                    continue
                llm = llms[p.llm]
                gpu_j = llm.prefill_w * gpu.between(p.begin_s, p.prefill_end_s)
                gpu_j += llm.decode_w * gpu.between(p.prefill_end_s, p.end_s)
                found[p.id] = (
                    Energy(*(steps.between(p.begin_s, p.end_s) for steps in base)),
                    Energy(gpu_j, *(steps.between(p.begin_s, p.end_s) for steps in own)),
                )
        return found


def _span(stranger: Stranger, value: float, horizon_s: float) -> Steps:
    end_s = min(stranger.end_s, horizon_s - 0.5)
    return Steps((0.0, stranger.begin_s, end_s, horizon_s), (0.0, value, 0.0))


def _segments(history: History, wrapper: Wrapper) -> list[Segment]:
    """Cut a wrapper's time at every event that changes its power."""
    prompts = [p for p in history.prompts if p.wrapper == wrapper.name and p.ran and p.end_s > p.begin_s]
    lives = [x for x in history.lives if x.wrapper == wrapper.name]
    engines = [x for x in history.engines if x.wrapper == wrapper.name]
    gpus = [history.machine.gpus[index] for index in wrapper.gpus]
    foreign = [s for s in history.strangers if s.gpu in wrapper.gpus]
    cuts = {0.0, history.horizon_s}
    cuts.update(at for life in lives for at in (life.begin_s, life.end_s))
    cuts.update(at for stranger in foreign for at in (stranger.begin_s, stranger.end_s))
    cuts.update(at for x in engines for at in (x.begin_s, x.loaded_s, x.end_s))
    cuts.update(at for p in prompts for at in (p.begin_s, p.prefill_end_s, p.end_s))
    cuts.update(from_s for gpu in gpus for from_s, _ in gpu.limits)
    times = sorted(at for at in cuts if 0.0 <= at <= history.horizon_s)
    starting: dict[float, list[Prompt]] = {}
    for prompt in prompts:
        starting.setdefault(prompt.begin_s, []).append(prompt)
    running: list[Prompt] = []
    segments = []
    llms = {llm.name: llm for llm in history.machine.llms}
    for begin_s, end_s in pairwise(times):
        running = [p for p in running if p.end_s > begin_s] + starting.get(begin_s, [])
        engine = next((x for x in engines if x.begin_s <= begin_s < x.end_s), None)
        loaded = engine is not None and engine.loaded_s <= begin_s
        in_flight = []
        for prompt in running:
            llm = llms[prompt.llm]
            in_flight.append((prompt, llm.prefill_w if begin_s < prompt.prefill_end_s else llm.decode_w))
        segments.append(
            _segment(
                history,
                wrapper,
                (begin_s, end_s),
                alive=any(x.begin_s <= begin_s < x.end_s for x in lives),
                engine=engine is not None,
                loaded=loaded,
                in_flight=tuple(in_flight),
                foreign={s.gpu: s.gpu_w for s in foreign if s.begin_s <= begin_s < s.end_s},
                llm=llm_of(history.machine, engine.llm) if engine else None,
            )
        )
    return segments


def _gpu_powers(
    limit_w: float, *, fixed_w: float, load_w: float, active_w: float, foreign_w: float
) -> tuple[float, float, float]:
    """Return the power [W] of base, prompts and strangers. At its limit, a GPU slows all that work on it down."""
    wanted_w = load_w + active_w + foreign_w
    scale = min(1.0, (limit_w - fixed_w) / wanted_w) if wanted_w else 1.0
    return fixed_w + scale * load_w, scale * active_w, scale * foreign_w


def _segment(
    history: History,
    wrapper: Wrapper,
    span: tuple[float, float],
    *,
    alive: bool,
    engine: bool,
    loaded: bool,
    in_flight: tuple[tuple[Prompt, float], ...],
    foreign: dict[int | None, float],
    llm: Llm | None,
) -> Segment:
    """Return the powers of a stretch in which nothing changes."""
    cpu = history.machine.cpu
    alone_w = 0.0
    if llm and in_flight:
        alone_w = sum(w ** (1 / llm.batch_exponent) for _, w in in_flight) ** llm.batch_exponent
    reserve_w = MODULE_CPU_W if history.machine.is_module else 0.0
    gpus = [
        _gpu_powers(
            gpu.limit_w(span[0]) - reserve_w,
            fixed_w=gpu.idle_w + (gpu.context_w if engine else 0.0),
            load_w=gpu.load_w if engine and not loaded else 0.0,
            active_w=alone_w * gpu.gain,
            foreign_w=foreign.get(gpu.index, 0.0),
        )
        for gpu in (history.machine.gpus[index] for index in wrapper.gpus)
    ]
    base_gpu_w, own_gpu_w, foreign_w = (sum(powers[part] for powers in gpus) for part in range(3))
    front = wrapper.idle_cpus if alive else 0.0
    load = wrapper.load_cpus if engine and not loaded else 0.0
    serve = wrapper.loaded_cpus if loaded else 0.0
    prompt_cpus = llm.cpus_first + llm.cpus_more * (len(in_flight) - 1) if llm and in_flight else 0.0
    base_cpus = front + load + serve
    idle_w = sum(share * watts for share, watts in zip(wrapper.idle_shares, cpu.idle_w, strict=True))
    dram_idle_w = sum(share * watts for share, watts in zip(wrapper.idle_shares, cpu.dram_idle_w, strict=True))
    return Segment(
        begin_s=span[0],
        end_s=span[1],
        alive=alive,
        loaded=loaded,
        loading=engine and not loaded,
        in_flight=in_flight,
        base_w=(base_gpu_w, base_cpus * cpu.busy_w, idle_w, base_cpus * cpu.dram_busy_w, dram_idle_w),
        own_w=(own_gpu_w, prompt_cpus * cpu.busy_w, 0.0, prompt_cpus * cpu.dram_busy_w, 0.0),
        gpu_w=tuple(sum(powers) for powers in gpus),
        foreign_w=foreign_w,
        front_cpus=front,
        serve_cpus=serve + prompt_cpus,
        load_cpus=load,
    )
