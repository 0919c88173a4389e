"""The CPU time of a process and all its descendants, read from /proc. Never goes backwards."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
INHERITED_S = 0.5
"""A dead process's time may appear in its parent this much later: reading /proc is not atomic."""


class ProcessStat(NamedTuple):
    """One process: its parent, its start (ticks since boot), its own CPU time and that of reaped children, ticks."""

    parent: int
    started: int
    own_ticks: int
    reaped_ticks: int


class ProcessTable:
    """The processes of a machine, from /proc. Several trees share one table, so that /proc is listed once for all."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self.root = proc_root
        self._listed_s: float | None = None
        self._listed: dict[int, ProcessStat] = {}

    def stat(self, pid: int) -> ProcessStat | None:
        """Return one process; None if it does not exist (any more). Raises OSError or ValueError if unreadable."""
        try:
            # os.open costs a third of Path.read_bytes, and this runs for every process 20 times a second.
            fd = os.open(f"{self.root}/{pid}/stat", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            text = os.read(fd, 4096)
        except ProcessLookupError:
            return None
        finally:
            os.close(fd)
        # The second field, the program's name in parentheses, may contain any characters, so start after its end.
        fields = text[text.rindex(b")") + 2 :].split()
        own, reaped = (int(fields[first]) + int(fields[first + 1]) for first in (11, 13))
        return ProcessStat(int(fields[1]), int(fields[19]), own, reaped)

    def listed(self, now_s: float) -> dict[int, ProcessStat]:
        """Return all processes. Calls with the same time share one listing, which may take milliseconds."""
        if self._listed_s != now_s:
            names = [path.name for path in self.root.iterdir() if path.name.isdigit()]
            self._listed = {int(name): stat for name in names if (stat := self.stat(int(name))) is not None}
            self._listed_s = now_s
        return self._listed


class CPUTimeTree:
    """CPU-seconds of a process tree. Not thread-safe.

    When a parent reaps a child, the child's time is added to the parent's. Parents are read before
    their children, so a dead child's time appears in its parent at this reading or a later one, and
    is counted once. Time that no parent inherits (the parent ignores its children, or died first)
    is kept from the last reading. A descendant whose parent dies stays in the tree. Only one part
    is missed: the time from the last reading to the end of a process that no parent reaps.

    The total grows by at most what ``processors`` allow; anything above that is dropped.

    Args:
        pid: The root of the tree.
        proc_root: Mount point of proc.
        rescan_s: Seconds between searches for new descendants; reading the known ones is cheaper.
        table: The machine's processes, if other trees read them as well.
        processors: Number of CPUs; None: that of this machine.

    Source: proc_pid_stat(5): ppid, utime, stime, cutime, cstime, starttime.
    """

    def __init__(
        self,
        pid: int,
        *,
        proc_root: Path = Path("/proc"),
        rescan_s: float = 1.0,
        table: ProcessTable | None = None,
        processors: int | None = None,
    ) -> None:
        self.processors = processors or os.cpu_count() or 1
        self._root = pid
        self._table = table or ProcessTable(proc_root)
        self.rescan_s = rescan_s
        self._known: dict[int, ProcessStat] = {}
        self._scanned_s: float | None = None
        self._read_s: float | None = None
        self._ended_ticks = 0
        self._inherited_until_s = -math.inf
        self._total_ticks = 0.0
        self._spare_ticks = 0.0

    def _scan(self, now_s: float) -> None:
        """Add new descendants. Known ones stay, whatever their parent is now."""
        stats = self._table.listed(now_s)
        children: dict[int, list[int]] = {}
        for pid, stat in stats.items():
            children.setdefault(stat.parent, []).append(pid)
        todo = [self._root, *self._known]
        found: set[int] = set()
        while todo:
            pid = todo.pop()
            if pid in stats and pid not in found:
                found.add(pid)
                todo.extend(children.get(pid, ()))
        known, self._known = self._known, {}
        for pid in sorted(found, key=lambda pid: _depth(pid, stats)):
            new = stats[pid]
            # New processes count from their start, except those that existed at the first scan.
            self._known[pid] = known.pop(
                pid, new if self._read_s is None else new._replace(own_ticks=0, reaped_ticks=0)
            )
        self._known |= known  # keep those that have ended for the next reading

    def pids(self) -> frozenset[int]:
        """Return the pids of the tree at the last scan."""
        return frozenset(self._known)

    def exists(self, pid: int) -> bool:
        """Whether this process is visible from here."""
        return self._table.stat(pid) is not None

    def refresh(self, now_s: float, older_than_s: float | None = None) -> None:
        """Search for new descendants if the last search is at least ``older_than_s`` ago; None: ``rescan_s``."""
        if older_than_s is None:
            older_than_s = self.rescan_s
        if self._scanned_s is None or now_s - self._scanned_s >= older_than_s:
            self._scan(now_s)
            self._scanned_s = now_s

    def read_s(self, now_s: float) -> float:
        """Return the CPU-seconds since the first call, ≥ 0 and never decreasing. Raises OSError or ValueError."""
        self.refresh(now_s)
        own = reaped = ended = 0
        for pid, last in list(self._known.items()):
            stat = self._table.stat(pid)
            if stat is None or stat.started != last.started:
                ended += last.own_ticks + last.reaped_ticks
                del self._known[pid]
            else:
                own += max(stat.own_ticks - last.own_ticks, 0)
                reaped += max(stat.reaped_ticks - last.reaped_ticks, 0)
                self._known[pid] = stat
        # Time of ended processes was counted while they lived, so what their parents inherit of it is not new.
        if ended:
            self._inherited_until_s = now_s + INHERITED_S
        elif now_s > self._inherited_until_s:
            self._ended_ticks = 0
        self._ended_ticks += ended
        inherited = min(self._ended_ticks, reaped)
        self._ended_ticks -= inherited
        self._count(now_s, own + reaped - inherited)
        return self._total_ticks / TICKS_PER_S

    def _count(self, now_s: float, ticks: int) -> None:
        """Add CPU time, limited to what the processors could do since the last reading plus one scan interval."""
        per_s = self.processors * TICKS_PER_S
        if self._read_s is None:
            self._spare_ticks = per_s * self.rescan_s
        else:
            self._spare_ticks += per_s * max(now_s - self._read_s, 0.0)
            ticks_in_time = min(float(ticks), self._spare_ticks)
            self._total_ticks += ticks_in_time
            self._spare_ticks = min(self._spare_ticks - ticks_in_time, per_s * self.rescan_s)
        self._read_s = now_s


def _depth(pid: int, stats: dict[int, ProcessStat]) -> int:
    """Return the number of a process's ancestors."""
    depth = 0
    while (stat := stats.get(pid)) is not None and depth < len(stats):
        pid, depth = stat.parent, depth + 1
    return depth
