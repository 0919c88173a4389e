"""The true energy of what a figure covers: of the parts of a machine that its components are counters of.

Where a counter counts more than the wrapper's own, the meter's boundary is this, and the world's truth is extended by
it: wrappers reserve the machine, so what is no wrapper's on it (the system's, strangers' and spare idle power of CPUs
and memory) is shared equally by all of them, and what strangers take on a wrapper's GPU is in that wrapper's figures.
Inside a wrapper it is base power: prompts in flight share it equally. A model of the CPU sees no strangers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from tests.energy_world.history import Prompt
from tests.energy_world.truth import Steps, Truth, total

Span = tuple[float, float]
KINDS = {"gpu": "gpu", "package": "cpu", "dram": "dram", "cpu": "model"}


def kinds_of(components: Iterable[str]) -> frozenset[str]:
    """Return the kinds (gpu, cpu, dram, model) of the components with these names."""
    return frozenset(KINDS[name.replace(":", "-").split("-")[0]] for name in components)


class Covered:
    """What one wrapper's counters should count, exactly."""

    def __init__(self, truth: Truth, wrapper: str) -> None:
        machine = truth.machine
        self._truth, self._name = truth, wrapper
        own = machine.wrapper(wrapper)
        gpu, cpu_busy, cpu_idle, dram_busy, dram_idle = truth.wrappers[wrapper]
        span = (0.0, truth.history.horizon_s)
        share = 1 / len(machine.wrappers)
        nothing = (Steps(span, [0.0]), 1.0)
        packages = (
            [steps for g in own.gpus for steps in (truth.packages[g], truth.drams[g])] if machine.is_module else []
        )
        gpus = total([nothing, *((truth.gpus[g], 1.0) for g in own.gpus), *((steps, 1.0) for steps in packages)])
        others = truth.other_cpus
        free = [1.0 - sum(w.idle_shares[p] for w in machine.wrappers) for p in range(machine.cpu.packages)]
        free_w = sum(f * watts for f, watts in zip(free, machine.cpu.idle_w, strict=True))
        free_dram_w = sum(f * watts for f, watts in zip(free, machine.cpu.dram_idle_w, strict=True))
        cpu = total(
            [(cpu_busy, 1.0), (cpu_idle, 1.0), (others, share * machine.cpu.busy_w), (Steps(span, [free_w]), share)]
        )
        dram = total(
            [
                (dram_busy, 1.0),
                (dram_idle, 1.0),
                (others, share * machine.cpu.dram_busy_w),
                (Steps(span, [free_dram_w]), share),
            ]
        )
        idle_w = sum(machine.cpu.idle_w) + sum(machine.cpu.dram_idle_w)
        model = total([(cpu_busy, 1.0), (dram_busy, 1.0), (Steps(span, [idle_w]), share)])
        self.power = {"gpu": gpus, "cpu": cpu, "dram": dram, "model": model}
        """Power of each kind [W]."""
        both = [(steps, -1.0) for steps in (cpu_busy, cpu_idle, dram_busy, dram_idle)]
        self._more = {
            "gpu": total([(gpus, 1.0), (gpu, -1.0), *(both if machine.is_module else ())]),
            "cpu": total([(cpu, 1.0), (cpu_busy, -1.0), (cpu_idle, -1.0)]),
            "dram": total([(dram, 1.0), (dram_busy, -1.0), (dram_idle, -1.0)]),
            "model": total([(model, 1.0), *both]),
        }

    @cached_property
    def _each(self) -> dict[str, Steps]:
        """What of the extension one prompt in flight has [W], by kind."""
        segments = self._truth.segments[self._name]
        each = Steps(
            [segments[0].begin_s, *(s.end_s for s in segments)],
            [1 / len(s.in_flight) if s.in_flight else 0.0 for s in segments],
        )
        return {kind: _product(steps, each) for kind, steps in self._more.items()}

    def window_j(self, kinds: frozenset[str], spans: Iterable[Span]) -> float:
        """Return the energy of some stretches."""
        return sum(self.power[kind].between(*span) for span in spans for kind in kinds)

    def prompt_j(self, kinds: frozenset[str], prompt: Prompt) -> float:
        """Return the energy of a prompt. A refused one has that of the time in which no other was in flight."""
        if not prompt.ran:
            prompts = [p for p in self._truth.history.prompts if p.ran and p.wrapper == prompt.wrapper]
            return self.window_j(
                kinds, without([(prompt.begin_s, prompt.end_s)], [(p.begin_s, p.end_s) for p in prompts])
            )
        base, own = self._truth.prompts[prompt.id]
        mine = base + own
        parts = {"gpu": mine.gpu_j, "cpu": mine.cpu_j, "dram": mine.dram_j, "model": mine.cpu_j + mine.dram_j}
        if self._truth.machine.is_module:
            parts["gpu"] = mine.total_j
        return sum(parts[kind] + self._each[kind].between(prompt.begin_s, prompt.end_s) for kind in kinds)


def without(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """Return the parts of some stretches that none of others cover."""
    found = []
    busy = sorted(taken)
    for begin_s, end_s in spans:
        now_s = begin_s
        for taken_begin_s, taken_end_s in busy:
            if taken_end_s <= now_s or taken_begin_s >= end_s:
                continue
            if taken_begin_s > now_s:
                found.append((now_s, taken_begin_s))
            now_s = max(now_s, taken_end_s)
        if now_s < end_s:
            found.append((now_s, end_s))
    return found


def _product(one: Steps, other: Steps) -> Steps:
    times = np.unique(np.concatenate((one.times_s, other.times_s)))
    middles = (times[1:] + times[:-1]) / 2
    values = [one.at(at_s) * other.at(at_s) for at_s in middles.tolist()]
    return Steps(times.tolist(), values)
