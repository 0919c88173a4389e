"""Estimates the CPU's energy where no counter exists, from CPU time and the operator's figures."""

from __future__ import annotations

import os

from deployments.energy.counters.base import Joules, Source
from deployments.energy.figures import CPUModel
from deployments.machine.cpu_time import TICKS_PER_S, CPUTimeTree
from deployments.machine.gpus import ReadFailed
from registry.wire.labels import Label


class CPUModelSource(Source):
    """The CPU's energy, estimated from the CPU time of our processes. Its units are CPU-seconds.

    The estimate is: idle watts x reserved CPUs x seconds, plus (busy - idle) watts x CPU-seconds.
    """

    name = "cpu-model"
    method = "cpu-model"
    label = Label.MODELED
    max_age_s = step = 1 / TICKS_PER_S

    def __init__(self, model: CPUModel, tree: CPUTimeTree, *, cpus: float) -> None:
        self.origin = f"estimate from the CPU time of our processes and {cpus:g} reserved CPUs; watts: {model.source}"
        self._model = model
        self._tree = tree
        self._cpus = cpus
        # Asked once, because os.cpu_count takes some 8 us and every prompt would pay for it.
        self._max_rate = max(cpus, os.cpu_count() or 1)

    @property
    def max_rate(self) -> float:
        """Upper bound, CPU-seconds per second: all CPUs of the machine, whatever is reserved."""
        return self._max_rate

    @property
    def late(self) -> float:
        """CPU-seconds that may show up late: a process is found up to a second after it started."""
        return self.max_rate * 1.0

    def read(self, now_s: float) -> float:
        """Return the CPU-seconds since the first reading."""
        try:
            return self._tree.read_s(now_s)
        except (OSError, ValueError) as error:
            raise ReadFailed(str(error)) from error

    def joules(self, duration_s: float, units: float) -> Joules:
        """Return the modelled energy with its range.

        If more CPUs are used than reserved, the energy falls as idle power rises. Then the high idle power gives the
        low bound.
        """
        model = self._model
        idle_s = self._cpus * duration_s - units
        lowest_w, highest_w = model.idle_low_w_per_cpu, model.idle_high_w_per_cpu
        if idle_s < 0:
            lowest_w, highest_w = highest_w, lowest_w
        return Joules(
            max(lowest_w * idle_s + model.busy_low_w_per_cpu * units, 0.0),
            model.idle_w_per_cpu * idle_s + model.busy_w_per_cpu * units,
            highest_w * idle_s + model.busy_high_w_per_cpu * units,
        )
