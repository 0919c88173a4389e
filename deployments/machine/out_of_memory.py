"""The kernel's out-of-memory killer: which processes it kills first, and whether it has killed one.

An engine uses most of a machine's memory and can be restarted, so it is killed first, then a wrapper. Ray's other
processes (the registry, proxies, its daemons) keep the score that they were started with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

# D84: engines go first when memory runs out
WRAPPER_SCORE: Final = 500
ENGINE_SCORE: Final = 900

_SCORE: Final = Path("/proc/self/oom_score_adj")
_COUNTERS: Final = Path("/proc/vmstat")


def raise_score(score: int, file: Path = _SCORE) -> None:
    """Make the kernel prefer this process, and its later children, as victims when memory runs out.

    A higher score is kept, because only root may lower it. Idempotent.

    Source: proc(5), oom_score_adj, from -1000 (never) to 1000.
    """
    if int(file.read_text(encoding="ascii")) < score:
        file.write_text(str(score), encoding="ascii")


class OOMKills:
    """Detects whether the kernel has killed a process for lack of memory since the last `look`, or since creation."""

    def __init__(self, counters: Path = _COUNTERS) -> None:
        self._counters = counters
        self._seen = self._count()

    def look(self) -> None:
        """Make `happened` ignore all kills until now."""
        self._seen = self._count()

    @property
    def happened(self) -> bool:
        """Whether a process was killed since the last `look`; False if the kernel does not count kills."""
        now = self._count()
        return now is not None and self._seen is not None and now > self._seen

    def _count(self) -> int | None:
        """Return the number of kills since boot, including those of control groups (Linux 4.13); None if unknown."""
        for line in self._counters.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return None
