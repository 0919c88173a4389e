"""Reads energy counters that count a whole module: its GPUs, its CPU and their memory.

GPUs of one module (e.g. of a GB200) may all return the same counter, which must be counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from deployments.energy.counters.base import CounterLost, Source
from deployments.energy.counters.nvml import GPUCounter
from deployments.machine.gpus import ReadFailed
from registry.wire.flags import Flag
from registry.wire.labels import Label

_MOVES_TO_TELL = 3


class _Modules:
    """Finds out which GPUs show the same counter, by reading all of them twice.

    If two GPUs show one counter, alternating readings of them never fall while the counter moves.
    """

    def __init__(self, gpus: Sequence[GPUCounter], others: Sequence[GPUCounter]) -> None:
        self.redundant: frozenset[str] | None = None
        """Names of the GPUs that show the counter of an earlier one; None until known."""
        self.shared: frozenset[str] = frozenset()
        """Names of the GPUs that show the counter of one of the ``others``."""
        self._own = len(gpus)
        self._gpus = [*gpus, *others]
        self._alike = {(i, j) for i, j in combinations(range(len(self._gpus)), 2) if i < self._own}
        self._shown: list[float] | None = None
        self._moves = [0] * len(self._gpus)

    def look(self, now_s: float) -> None:
        """Read all counters, unless the answer is known already.

        Raises:
            ReadFailed: The answer is not known yet, or a counter can't be read.
        """
        if self.redundant is not None:
            return
        first, again = ([gpu.read(now_s) for gpu in self._gpus] for _ in range(2))
        self._alike = {(i, j) for i, j in self._alike if first[i] <= first[j] <= again[i] <= again[j]}
        if self._shown is not None:
            self._moves = [moves + (a != b) for moves, a, b in zip(self._moves, first, self._shown, strict=True)]
        self._shown = first
        if any(self._moves[i] < _MOVES_TO_TELL for i, _ in self._alike):
            raise ReadFailed("not known yet whether GPUs show one counter of their module")
        self.redundant = frozenset(self._gpus[j].name for _, j in self._alike if j < self._own)
        self.shared = frozenset(self._gpus[i].name for i, j in self._alike if j >= self._own)


class ModuleCounter(Source):
    """The energy counter of a whole module, read through one of its GPUs; redundant if another GPU shows it, too.

    Each GPU has its own source because its reading steps at its own times. Reads fail until it is known which GPUs
    show the same counter.
    """

    method = GPUCounter.method
    label = Label.MEASURED
    step = GPUCounter.step
    covers_cpu = True

    def __init__(self, gpu: GPUCounter, modules: _Modules, closes: Sequence[GPUCounter]) -> None:
        self.name = gpu.name
        self.default_limit_w = gpu.default_limit_w
        self._gpu = gpu
        self._modules = modules
        self._closes = closes

    @property
    def redundant(self) -> bool:
        """Whether another source counts the same joules."""
        return self.name in (self._modules.redundant or ())

    @property
    def origin(self) -> str:  # type: ignore[override]  # known only after the first readings
        """What is read and how, in words."""
        mirrors = ", ".join(sorted(self._modules.redundant or ()))
        return (
            f"{self._gpu.origin}; counted once: {mirrors} show the counter of another GPU"
            if mirrors
            else self._gpu.origin
        )

    def read(self, now_s: float) -> float:
        """Return the joules since the driver was loaded."""
        self._modules.look(now_s)
        if self.name in self._modules.shared:
            raise CounterLost(Flag.MODULE_SHARED)
        return self._gpu.read(now_s)

    def power_w(self) -> float | None:
        """Return the power of the module, W; None if it is not reported."""
        return self._gpu.power_w()

    def contended(self, now_s: float) -> bool | None:
        """Whether other compute processes run on the GPU; None if unknown."""
        return self._gpu.contended(now_s)

    def close(self) -> None:
        """Release NVML."""
        for gpu in (self._gpu, *self._closes):
            gpu.close()


def module_counters(gpus: Sequence[GPUCounter], others: Sequence[GPUCounter] = ()) -> list[Source]:
    """Return the sources for GPUs whose counters each count a whole module.

    ``others`` are the GPUs of other wrappers on the machine: a counter that is also theirs gives no figure.
    """
    modules = _Modules(gpus, others)
    return [ModuleCounter(gpu, modules, () if index else others) for index, gpu in enumerate(gpus)]
