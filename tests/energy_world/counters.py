"""What hardware counters show of the truth, with the faults that real ones have."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from tests.energy_world.machine import AMD_RANGE_UJ, INTEL_RANGE_UJ, Machine
from tests.energy_world.truth import Steps, Truth, total

JUMP_J = 100_000.0
RAPL_TICK_S = 0.000976
NVML_FAULTS = {"jump": 0.08, "stall": 0.12, "reset": 0.08}
"""Fault → probability for each GPU with an energy counter; a machine may have several."""
RAPL_START = {"wrap": 0.4, "reset": 0.12, "plain": 0.48}
UNREADABLE = 0.12
"""Probability that one zone of the machine can't be read, half of them from some moment on."""

FaultKind = Literal["jump", "stall", "reset", "unreadable", "lost"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a counter from ``begin_s`` to ``end_s`` (equal for an instant)."""

    kind: FaultKind
    counter: str
    begin_s: float
    end_s: float


class GpuCounter:
    """NVML's energy and power of one GPU: new values at ticks that jitter, rounded down to mJ and mW.

    ``power`` is what the counter counts: on a module, its CPU and memory too. ``low`` is the part of the power above
    idle that the counter sees, 1 for an honest one.
    """

    def __init__(
        self,
        rng: Random,
        power: Steps,
        horizon_s: float,
        *,
        tick_s: float,
        faults: Sequence[Fault] = (),
        low: float = 1.0,
        has_energy: bool = True,
        has_instant: bool = True,
    ) -> None:
        self.power, self.tick_s, self.faults = power, tick_s, tuple(faults)
        self.has_energy, self.has_instant = has_energy, has_instant
        self.lost = [(f.begin_s, f.end_s) for f in faults if f.kind == "lost"]
        noise = np.random.default_rng(rng.getrandbits(64))
        count = math.ceil((horizon_s + 4.0) / tick_s)
        ticks = -2.0 + tick_s * (np.arange(count) + rng.random() + 0.2 * (noise.random(count) - 0.5))
        true_j = power.integrals(ticks)
        if low < 1.0:
            idle_w = float(power.values.min())
            true_j = idle_w * ticks + low * (true_j - idle_w * ticks)
        start_j = rng.uniform(3e3, 3e8)
        shown_j = start_j + true_j
        for fault in faults:
            after = ticks >= fault.begin_s
            if fault.kind == "jump":
                shown_j = np.where(after, shown_j + JUMP_J, shown_j)
            elif fault.kind == "reset":
                began_j = np.interp(fault.begin_s, ticks, shown_j)
                shown_j = np.where(after, shown_j - began_j + 0.5, shown_j)
            elif fault.kind == "stall":
                during = after & (ticks < fault.end_s)
                before = shown_j[max(int(np.argmax(after)) - 1, 0)]
                shown_j = np.where(during, before, shown_j)
        self.ticks_s: list[float] = ticks.tolist()
        self._shown_mj: list[int] = np.floor(shown_j * 1000).astype(np.int64).tolist()

    def tick(self, now_s: float) -> int:
        """Return the number of the last tick."""
        return max(bisect_right(self.ticks_s, now_s) - 1, 0)

    def energy_mj(self, now_s: float) -> int:
        """Return the counter [mJ]."""
        return self._shown_mj[self.tick(now_s)]

    def mean_mw(self, now_s: float) -> int:
        """Return the mean power [mW] of the second before the last tick."""
        at_s = self.ticks_s[self.tick(now_s)]
        return int(self.power.between(at_s - 1.0, at_s) * 1000)

    def instant_mw(self, now_s: float) -> int:
        """Return the power [mW] at the last tick."""
        return int(self.power.at(self.ticks_s[self.tick(now_s)]) * 1000)

    def is_lost(self, now_s: float) -> bool:
        """Return True while the driver is being reloaded."""
        return any(begin_s <= now_s < end_s for begin_s, end_s in self.lost)


class RaplCounter:
    """One RAPL counter [µJ]: a new value about each millisecond, in units, that wraps at ``range_uj``."""

    def __init__(self, power: Steps, range_uj: int, start_uj: float, resets_s: Sequence[float] = ()) -> None:
        self.power, self.range_uj = power, range_uj
        self.unit_uj = range_uj / 2**32
        self.start_uj = start_uj
        self.resets_s = sorted(resets_s)

    def energy_uj(self, now_s: float) -> int:
        """Return the counter [µJ]."""
        at_s = math.floor(now_s / RAPL_TICK_S) * RAPL_TICK_S
        reset = bisect_right(self.resets_s, at_s) - 1
        if reset >= 0:
            raw_uj = self.power.between(self.resets_s[reset], at_s) * 1e6
        else:
            raw_uj = self.start_uj + self.power.integral(at_s) * 1e6
        units = math.floor(raw_uj / self.unit_uj)
        return int(units * self.unit_uj) % self.range_uj


@dataclass(frozen=True, slots=True)
class Zone:
    """One directory of the powercap tree. Zones that mirror each other share a counter."""

    directory: str
    """As ``intel-rapl:0`` or ``intel-rapl:0:0``."""
    name: str
    counter: RaplCounter
    limit_w: float
    lag_s: float = 0.0
    """A mirror may show the value of a moment ago."""
    unreadable: tuple[float, float] = (math.inf, math.inf)

    def is_readable(self, now_s: float) -> bool:
        """Return True if ``energy_uj`` can be read."""
        return not self.unreadable[0] <= now_s < self.unreadable[1]

    def energy_uj(self, now_s: float) -> int:
        """Return what the file says [µJ]."""
        return self.counter.energy_uj(now_s - self.lag_s)


def gpu_counters(rng: Random, truth: Truth) -> list[GpuCounter]:
    """Return the counters of all GPUs, with random faults unless the machine is calm."""
    machine, horizon_s = truth.machine, truth.history.horizon_s
    tick_s = rng.choice((0.02, 0.05, 0.1, 0.1, rng.uniform(0.02, 0.1)))
    has_instant = machine.kind != "sampled" or rng.random() < 0.5
    low = rng.uniform(0.5, 0.7) if machine.kind == "low_counter" else 1.0
    counters = []
    for gpu, power in zip(machine.gpus, truth.gpus, strict=True):
        if machine.is_module:
            power = total([(power, 1.0), (truth.packages[gpu.index], 1.0), (truth.drams[gpu.index], 1.0)])  # noqa: PLW2901
        has_energy = machine.kind != "sampled"
        faults = _gpu_faults(rng, f"gpu-{gpu.index}", horizon_s) if has_energy and _is_faulty(machine) else []
        counters.append(
            GpuCounter(
                rng,
                power,
                horizon_s,
                tick_s=tick_s,
                faults=faults,
                low=low,
                has_energy=has_energy,
                has_instant=has_instant,
            )
        )
    return counters


def _is_faulty(machine: Machine) -> bool:
    return machine.kind not in {"calm", "low_counter"}


def _gpu_faults(rng: Random, name: str, horizon_s: float) -> list[Fault]:
    found = []
    for kind, chance in NVML_FAULTS.items():
        if rng.random() >= chance:
            continue
        begin_s = rng.uniform(0.05, 0.95) * horizon_s
        if kind == "jump":
            found.append(Fault("jump", name, begin_s, begin_s))
        elif kind == "stall":
            found.append(Fault("stall", name, begin_s, begin_s + rng.uniform(1.0, 6.0)))
        else:
            found.append(Fault("reset", name, begin_s, begin_s))
            if rng.random() < 0.5:
                found.append(Fault("lost", name, begin_s, begin_s + rng.uniform(0.2, 2.0)))
    return found


def rapl_zones(rng: Random, truth: Truth) -> list[Zone]:
    """Return the zones of the powercap tree; none on a module, in a container, and on some machines without GPUs."""
    machine = truth.machine
    if machine.kind in {"gh200", "no_rapl"} or (machine.kind == "cpu_only" and rng.random() < 0.3):
        return []
    amd = machine.kind in {"h200_amd", "amd_mirrored"}
    range_uj = AMD_RANGE_UJ if amd else INTEL_RANGE_UJ
    limit_w = machine.cpu.limit_w
    zones: list[Zone] = []
    for number in range(machine.cpu.packages):
        package, dram = truth.packages[number], truth.drams[number]
        if machine.kind == "amd_mirrored":
            counter = _rapl(rng, machine, package, range_uj, truth)
            lag_s = rng.choice((0.0, 0.001))
            for die in (0, 1):
                directory = f"intel-rapl:{len(zones)}"
                zones.append(Zone(directory, f"package-{number}-die-{die}", counter, limit_w, lag_s * die))
            continue
        dies = (0.55, 0.45) if machine.kind == "intel_dies" else (1.0,)
        for die, share in enumerate(dies):
            top = f"intel-rapl:{number * len(dies) + die}"
            name = f"package-{number}-die-{die}" if len(dies) > 1 else f"package-{number}"
            power = total([(package, share)])
            zones.append(Zone(top, name, _rapl(rng, machine, power, range_uj, truth), limit_w))
            if amd:
                continue
            memory = total([(dram, share)])
            zones.append(Zone(f"{top}:0", "dram", _rapl(rng, machine, memory, INTEL_RANGE_UJ // 4, truth), 80.0))
    if not amd and _is_faulty(machine) and rng.random() < 0.15:
        zones += _more_zones(rng, truth, zones)
    if _is_faulty(machine) and rng.random() < UNREADABLE:
        place = rng.randrange(len(zones))
        from_s = -1.0 if rng.random() < 0.5 else rng.uniform(0.2, 0.8) * truth.history.horizon_s
        bad = zones[place]
        zones[place] = Zone(bad.directory, bad.name, bad.counter, bad.limit_w, bad.lag_s, (from_s, math.inf))
    return zones


def _more_zones(rng: Random, truth: Truth, zones: list[Zone]) -> list[Zone]:
    """Return zones that a meter must not add: the cores of a package, the platform, a second way to a package."""
    package = truth.packages[0]
    cores = RaplCounter(total([(package, 0.6)]), INTEL_RANGE_UJ, 1e9)
    platform = total([(steps, 1.2) for steps in (*truth.packages, *truth.drams)])
    tops = sum(zone.directory.count(":") == 1 for zone in zones)
    more = [
        Zone("intel-rapl:0:1", "core", cores, 350.0),
        Zone(f"intel-rapl:{tops}", "psys", RaplCounter(platform, INTEL_RANGE_UJ, 2e9), 1000.0),
        Zone("intel-rapl-mmio:0", zones[0].name, zones[0].counter, zones[0].limit_w),
    ]
    return rng.sample(more, rng.randint(1, 3))


def _rapl(rng: Random, machine: Machine, power: Steps, range_uj: int, truth: Truth) -> RaplCounter:
    """Return a counter that wraps, or is reset in the upper half of its range, or neither (if its range lasts)."""
    horizon_s = truth.history.horizon_s
    fate = rng.choices(list(RAPL_START), list(RAPL_START.values()))[0] if _is_faulty(machine) else "wrap"
    at_s = rng.uniform(0.05, 0.95) * horizon_s
    if fate == "wrap":
        start_uj = (range_uj - power.integral(at_s) * 1e6) % range_uj
        return RaplCounter(power, range_uj, start_uj)
    if fate == "reset":
        start_uj = (rng.uniform(0.55, 0.98) * range_uj - power.integral(at_s) * 1e6) % range_uj
        return RaplCounter(power, range_uj, start_uj, [at_s])
    return RaplCounter(power, range_uj, rng.uniform(0.0, 0.2) * range_uj)
