"""Splits a machine's CPU time into that of this wrapper, of other wrappers and of all other processes ("strangers")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from deployments.machine.cpu_time import TICKS_PER_S, CPUTimeTree, ProcessTable

_FIND_S = 1.0
"""Seconds between searches for other wrappers."""
_SELDOM_S = 10.0
"""Seconds between searches for new descendants of wrappers, while only the detection of strangers needs them.

A search takes milliseconds if there are many processes.
"""
# D56: strangers are seen by the CPU time that is left
STRANGERS_CORES = 0.5
STRANGERS_PART = 0.01
"""Strangers count as active above half a core, on machines of more than 50 CPUs above 1 % of all CPUs.

Ray's own processes, the registry, proxies and system services use less: up to some tenths of a core, more on larger
machines. Half a core is 1 to 4 W (configs/local.yaml: 1.69 to 8.96 W per busy processor).
"""


class _Look(NamedTuple):
    """CPU-seconds at time ``at_s``: of the whole machine, and of all wrappers."""

    at_s: float
    busy_s: float
    wrappers_s: float

    def strange_to(self, last: _Look) -> float:
        """Return the CPU-seconds that no wrapper used since an earlier look."""
        return self.busy_s - last.busy_s - (self.wrappers_s - last.wrappers_s)


class MachineCPU:
    """CPU time of this wrapper, of other wrappers and of strangers. Not thread-safe.

    Args:
        pid: This wrapper's process.
        others: Returns the processes of the machine's other wrappers, each with its start (ticks since boot); None if
            unknown.
        proc_root: Mount point of proc. In a container /proc/stat is the host's, so processes outside are strangers.
        processors: Number of CPUs; None: that of this machine.

    Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    """

    def __init__(
        self,
        pid: int,
        *,
        others: Callable[[], Mapping[int, int] | None] = dict,
        proc_root: Path = Path("/proc"),
        processors: int | None = None,
    ) -> None:
        self._table = ProcessTable(proc_root)
        self._rescan_s = _SELDOM_S
        self._processors = processors
        self.tree = self._tree(pid)
        self._find_others = others
        self._others: dict[tuple[int, int], CPUTimeTree] = {}
        self._gone_s = 0.0
        self._unseen = False
        self._found_s: float | None = None
        self._last: _Look | None = None
        self._looked_s: float | None = None

    def look_often(self) -> None:
        """Search for new descendants of wrappers every second, because energy figures depend on their CPU time."""
        self._rescan_s = self.tree.rescan_s = _FIND_S

    def _tree(self, pid: int) -> CPUTimeTree:
        return CPUTimeTree(pid, table=self._table, rescan_s=self._rescan_s, processors=self._processors)

    def wrappers_s(self, now_s: float) -> tuple[float, float] | None:
        """Return the CPU-seconds of this wrapper and of all others since the first call; None if one can't be read."""
        try:
            if self._found_s is None or now_s - self._found_s >= _FIND_S:
                self._found_s = now_s
                self._find(now_s)
            own_s = self.tree.read_s(now_s)
            others_s = self._gone_s + sum(tree.read_s(now_s) for tree in self._others.values())
        except (OSError, ValueError):
            return None
        return None if self._unseen else (own_s, others_s)

    def _find(self, now_s: float) -> None:
        found = self._find_others()
        self._unseen = found is None
        living = dict(found or {})
        for pid, started in living.items():
            stat = self._table.stat(pid)
            if stat is None or stat.started != started:
                self._unseen = True  # it runs in another pid namespace
            elif (pid, started) not in self._others:
                self._others[pid, started] = self._tree(pid)
        if found is not None:
            for gone in self._others.keys() - living.items():
                self._gone_s += self._others.pop(gone).read_s(now_s)

    def strangers(self, now_s: float) -> tuple[bool | None, float]:
        """Return whether strangers were active since the last call, and the time of that call.

        None: unknown. At the first call, the time is ``now_s``.
        """
        busy_s, ours = self._busy_s(), self.wrappers_s(now_s)
        last, since_s = self._last, now_s if self._looked_s is None else self._looked_s
        self._looked_s, self._last = now_s, None
        if busy_s is None or ours is None:
            return None, since_s
        self._last = _Look(now_s, busy_s, sum(ours))
        if last is None or now_s <= last.at_s:
            return None, since_s
        strange = self._last.strange_to(last) / (now_s - last.at_s)
        most = max(STRANGERS_CORES, STRANGERS_PART * self.tree.processors)
        if strange > most:
            # It may be new descendants of wrappers that were active. Once found, their time counts from their start.
            for tree in (self.tree, *self._others.values()):
                tree.refresh(now_s, 0.0)
            found = self.wrappers_s(now_s)
            if found is None:
                return None, since_s
            self._last = self._last._replace(wrappers_s=sum(found))
            strange = self._last.strange_to(last) / (now_s - last.at_s)
        # If wrappers used more than the whole machine, the two readings can't be of the same machine.
        return None if strange < -most else strange > most, since_s

    def _busy_s(self) -> float | None:
        """Return the machine's busy CPU-seconds since boot, including steal; None if unknown."""
        try:
            with (self._table.root / "stat").open(encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        # Sandboxes report zeros.
        return (user + nice + system + irq + softirq + steal) / TICKS_PER_S or None
