"""The CPU time of a process and all its descendants, read from /proc. Never goes backwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class _Stat(NamedTuple):
    parent: int
    started: int
    cpu_ticks: int


class CPUTimeTree:
    """CPU-seconds of a process tree. Not thread-safe.

    The time of a child that has ended is not lost: the kernel adds it to its parent when that reaps it, and what it
    can't add (a parent that ignores its children, or that died first) is kept from the last look. A descendant whose
    parent dies stays in the tree. Only what a process did between the last look and its unreaped end is missed.

    Args:
        pid: The root of the tree.
        proc_root: Where proc is mounted.
        rescan_s: How often new descendants are looked for, seconds; reading the known ones is cheaper.

    Source: proc_pid_stat(5): ppid, utime, stime, cutime, cstime, starttime.
    """

    def __init__(self, pid: int, *, proc_root: Path = Path("/proc"), rescan_s: float = 1.0) -> None:
        self._root = pid
        self._proc_root = proc_root
        self._rescan_s = rescan_s
        self._started: dict[int, int] = {}
        self._scanned_s: float | None = None
        self._raw_ticks: int | None = None
        self._total_ticks = 0

    def _stat(self, pid: int) -> _Stat | None:
        """One line of /proc; None when there is no such process (any more)."""
        try:
            # os.open costs a third of Path.read_bytes, and this runs for every process 20 times a second.
            fd = os.open(f"{self._proc_root}/{pid}/stat", os.O_RDONLY)
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
        return _Stat(int(fields[1]), int(fields[19]), sum(int(field) for field in fields[11:15]))

    def _scan(self) -> None:
        """Add descendants that are new. The known stay, whoever their parent is by now."""
        names = [path.name for path in self._proc_root.iterdir() if path.name.isdigit()]
        stats = {int(name): stat for name in names if (stat := self._stat(int(name))) is not None}
        children: dict[int, list[int]] = {}
        for pid, stat in stats.items():
            children.setdefault(stat.parent, []).append(pid)
        todo = [self._root, *(pid for pid in self._started if pid in stats)]
        found: dict[int, int] = {}
        while todo:
            pid = todo.pop()
            if pid in stats and pid not in found:
                found[pid] = stats[pid].started
                todo.extend(children.get(pid, ()))
        self._started = found

    def pids(self) -> frozenset[int]:
        """The processes of the tree, as of the last scan."""
        return frozenset(self._started)

    def exists(self, pid: int) -> bool:
        """Whether this process can be seen from here."""
        return self._stat(pid) is not None

    def refresh(self, now_s: float) -> None:
        """Look for new descendants, if the last look is ``rescan_s`` ago."""
        if self._scanned_s is None or now_s - self._scanned_s >= self._rescan_s:
            self._scan()
            self._scanned_s = now_s

    def read_s(self, now_s: float) -> float:
        """CPU-seconds since the first call, ≥ 0 and never less than before."""
        self.refresh(now_s)
        raw = 0
        for pid, started in list(self._started.items()):
            stat = self._stat(pid)
            if stat is None or stat.started != started:
                del self._started[pid]
            else:
                raw += stat.cpu_ticks
        if self._raw_ticks is not None:
            # The sum falls when a process ended unreaped: its time stays counted, so start again from here.
            self._total_ticks += max(raw - self._raw_ticks, 0)
        self._raw_ticks = raw
        return self._total_ticks / TICKS_PER_S
