"""The kernel's out-of-memory killer: which processes it ends first, and whether it has ended one.

An engine holds most of a machine's memory and can be started again, so it goes first; a wrapper goes next. What Ray
runs beside them (the registry, proxies, its own daemons) keeps the score that it was started with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

WRAPPER_SCORE: Final = 500
ENGINE_SCORE: Final = 900

ENGINE_OUT_OF_MEMORY: Final = "engine_out_of_memory"
"""Flag: the kernel ended an engine during the measurement, since memory had run out."""

_SCORE: Final = Path("/proc/self/oom_score_adj")
_COUNTERS: Final = Path("/proc/vmstat")


def raise_score(score: int, file: Path = _SCORE) -> None:
    """Have the kernel prefer this process, and those that it starts later, when memory runs out.

    A score that is higher already stays: only root may lower one. Idempotent.

    Source: proc(5), oom_score_adj, from -1000 (never) to 1000.
    """
    if int(file.read_text(encoding="ascii")) < score:
        file.write_text(str(score), encoding="ascii")


class OOMKills:
    """Tells whether the kernel has ended a process for want of memory since the last look."""

    def __init__(self, counters: Path = _COUNTERS) -> None:
        self._counters = counters
        self._seen = self._count()

    def look(self) -> None:
        """Take what has happened so far as known."""
        self._seen = self._count()

    @property
    def happened(self) -> bool:
        """Whether a process was ended since the last look; False where the kernel does not count them."""
        now = self._count()
        return now is not None and self._seen is not None and now > self._seen

    def _count(self) -> int | None:
        """Processes that were ended since the machine's start, those of control groups included (Linux 4.13)."""
        for line in self._counters.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return None
