"""The energy of several modules of GPUs and CPUs, whose GPUs may show one counter (two of a GB200 do, if it is its)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from deployments.energy import Label
from deployments.gpu_counters import MODULE_LIMIT_W, GPUCounter
from deployments.source import ReadFailed, Source

_MOVES_TO_TELL = 3


class ModuleCounters(Source):
    """The counters of GPUs that each show a whole module, every counter once.

    Which GPUs show one counter is found out by reading all of them twice: what one counter shows never falls from one
    reading to the next, whichever GPU it is asked of, while it moves. Until that is known nothing is told.
    """

    method = GPUCounter.method
    label = Label.MEASURED
    covers_cpu = True

    def __init__(self, gpus: Sequence[GPUCounter]) -> None:
        self.name = "gpu:" + "+".join(gpu.name.removeprefix("gpu:") for gpu in gpus)
        self.step = sum(gpu.step for gpu in gpus)
        self.default_limit_w = MODULE_LIMIT_W * len(gpus)
        self.origin = f"NVML energy counters of the modules of {len(gpus)} GPUs: GPUs, CPUs and the memory of both"
        self._gpus = gpus
        self._counted: Sequence[GPUCounter] = ()
        self._alike = set(combinations(range(len(gpus)), 2))
        self._shown: list[float] | None = None
        self._moves = [0] * len(gpus)

    def read(self, now_s: float) -> float:
        """Joules since the driver was loaded, of every counter once."""
        if not self._counted:
            self._look(now_s)
        return sum(gpu.read(now_s) for gpu in self._counted)

    def _look(self, now_s: float) -> None:
        first, again = ([gpu.read(now_s) for gpu in self._gpus] for _ in range(2))
        self._alike = {(i, j) for i, j in self._alike if first[i] <= first[j] <= again[i] <= again[j]}
        if self._shown is not None:
            self._moves = [moves + (a != b) for moves, a, b in zip(self._moves, first, self._shown, strict=True)]
        self._shown = first
        if any(self._moves[i] < _MOVES_TO_TELL for i, _ in self._alike):
            raise ReadFailed("not known yet whether GPUs show one counter of their module")
        mirrors = {j for _, j in self._alike}
        self._counted = [gpu for index, gpu in enumerate(self._gpus) if index not in mirrors]
        if mirrors:
            names = ", ".join(self._gpus[index].name for index in sorted(mirrors))
            self.origin += f"; counted once: {names} show the counter of another GPU of their module"

    def power_w(self) -> float | None:
        """Watts of the modules that are counted; None if one tells none."""
        told_w = [gpu.power_w() for gpu in self._counted]
        known_w = [power_w for power_w in told_w if power_w is not None]
        return sum(known_w) if known_w and len(known_w) == len(told_w) else None

    def contended(self, now_s: float) -> bool | None:
        """Whether other compute processes run on one of the GPUs; None: can't be told."""
        answers = [gpu.contended(now_s) for gpu in self._gpus]
        return True if True in answers else None if None in answers else False

    def close(self) -> None:
        """Give NVML back."""
        for gpu in self._gpus:
            gpu.close()
