"""The CPU time of a process and all its descendants, read from /proc. Never goes backwards."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
INHERITED_S = 0.5
"""A process that is gone may show in the time of its parent so much later: /proc is no picture of one moment."""


class ProcessStat(NamedTuple):
    """One process: its parent, its start (ticks since boot), its own CPU time and that of reaped children, ticks."""

    parent: int
    started: int
    own_ticks: int
    reaped_ticks: int


class ProcessTable:
    """The processes of a machine as /proc shows them. Several trees share one, so that it is listed once for all."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self.root = proc_root
        self._listed_s: float | None = None
        self._listed: dict[int, ProcessStat] = {}

    def stat(self, pid: int) -> ProcessStat | None:
        """One process; None if there is no such process (any more)."""
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
        # The second field is the program's name in parentheses and may hold anything, so count from its end.
        fields = text[text.rindex(b")") + 2 :].split()
        own, reaped = (int(fields[first]) + int(fields[first + 1]) for first in (11, 13))
        return ProcessStat(int(fields[1]), int(fields[19]), own, reaped)

    def listed(self, now_s: float) -> dict[int, ProcessStat]:
        """All processes, as of this time. Takes milliseconds where there are many."""
        if self._listed_s != now_s:
            names = [path.name for path in self.root.iterdir() if path.name.isdigit()]
            self._listed = {int(name): stat for name in names if (stat := self.stat(int(name))) is not None}
            self._listed_s = now_s
        return self._listed


class CPUTimeTree:
    """CPU-seconds of a process tree. Not thread-safe.

    A child's time moves to its parent when that reaps it. Parents are read before their children, so what a child
    takes along shows in its parent in this look or in one of the next, where it is counted once. What is not inherited
    (a parent that ignores its children, or that died first) is kept from the last look. A descendant whose parent dies
    stays in the tree. Only what a process did between the last look and its unreaped end is missed.

    No time grows by more than ``processors`` explain: of anything above that the rest is dropped.

    Args:
        pid: The root of the tree.
        proc_root: Where proc is mounted.
        rescan_s: How often new descendants are looked for, seconds; reading the known ones is cheaper.
        table: The machine's processes, where others read them, too.
        processors: How many CPUs there are; None: those of this machine.

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
        """Add descendants that are new. The known stay, whoever their parent is by now."""
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
            # What is new counts from its birth, but for what was there at the first look.
            self._known[pid] = known.pop(
                pid, new if self._read_s is None else new._replace(own_ticks=0, reaped_ticks=0)
            )
        self._known |= known  # those that have ended since: the next reading sees to them

    def pids(self) -> frozenset[int]:
        """The processes of the tree, as of the last scan."""
        return frozenset(self._known)

    def exists(self, pid: int) -> bool:
        """Whether this process can be seen from here."""
        return self._table.stat(pid) is not None

    def refresh(self, now_s: float, older_than_s: float | None = None) -> None:
        """Look for new descendants, if the last look is so long ago; None: ``rescan_s``."""
        if older_than_s is None:
            older_than_s = self.rescan_s
        if self._scanned_s is None or now_s - self._scanned_s >= older_than_s:
            self._scan(now_s)
            self._scanned_s = now_s

    def read_s(self, now_s: float) -> float:
        """CPU-seconds since the first call, ≥ 0 and never less than before."""
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
        # Time that was counted already while those who took it along lived.
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
        """Add CPU time, no more than the processors had since the last reading and one look for new processes."""
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
    """How many ancestors a process has."""
    depth = 0
    while (stat := stats.get(pid)) is not None and depth < len(stats):
        pid, depth = stat.parent, depth + 1
    return depth
