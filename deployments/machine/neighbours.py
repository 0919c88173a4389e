"""What the wrappers of a machine know of one another: their processes, and whether any of them is at work."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.machine.cpu_time import ProcessTable

_FLOCK = "hhqqi"
"""``struct flock``: type, whence, start, length, process. Source: fcntl(2), "Open file description locks"."""
_WORKS, _LIVES = 0, 1
"""Which byte of its file a wrapper locks while it works, and which for as long as it lives. The locks are
shared, so that a wrapper that takes the place of one that still ends is not refused."""


class Neighbours:
    """One of the wrappers of a machine, which share ``directory``.

    Each locks a file of its own while it starts an LLM or answers, so that one that is killed is at work no more, and
    changes the file's time when it begins, so that what is over before anybody looks is seen, too. Nobody ever waits
    for such a lock: others ask the kernel whether it is held.
    """

    def __init__(self, directory: Path, wrapper_id: str, *, process: tuple[int, int] | None = None) -> None:
        """Join the others; ``process`` is this wrapper's, its pid and its start (ticks since boot)."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._own = directory / wrapper_id
        self._file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)  # for as long as the process lives
        pid, started = process or (os.getpid(), _started(os.getpid()))
        text = f"{pid} {started}\n".encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        self._lock(fcntl.F_RDLCK, _LIVES)
        self._works = 0
        self._begun_ns: dict[Path, int] = {path: path.stat().st_mtime_ns for path in self._others()}

    @contextmanager
    def busy(self) -> Iterator[None]:
        """This wrapper is at work for as long as this lasts."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """This wrapper begins one more piece of work. Costs a few microseconds, and never waits."""
        self._works += 1
        if self._works == 1:
            os.utime(self._file)
            self._lock(fcntl.F_RDLCK, _WORKS)

    def end(self) -> None:
        """A piece of its work is over."""
        self._works -= 1
        if not self._works:
            self._lock(fcntl.F_UNLCK, _WORKS)

    def others_worked(self) -> bool | None:
        """Whether any of the others works, or has since this was last asked; None: can't be told. For one thread."""
        try:
            return any([self._worked(path) for path in self._others()])  # noqa: C419 - each has to be looked at
        except OSError:
            return None  # somebody has tidied up the directory

    def processes(self) -> dict[int, int] | None:
        """The processes of the others that live, each with its start (ticks since boot); None: can't be told."""
        found = {}
        try:
            for path in self._others():
                if _is_locked(path, _LIVES):
                    pid, started = path.read_text(encoding="ascii").split()
                    found[int(pid)] = int(started)
        except (OSError, ValueError):
            return None
        return found

    def _others(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if path != self._own]

    def _worked(self, path: Path) -> bool:
        begun_ns = path.stat().st_mtime_ns
        before_ns, self._begun_ns[path] = self._begun_ns.get(path, 0), begun_ns
        return begun_ns != before_ns or _is_locked(path, _WORKS)

    def _lock(self, kind: int, byte: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))


def _started(pid: int) -> int:
    stat = ProcessTable().stat(pid)
    return 0 if stat is None else stat.started


def _is_locked(path: Path, byte: int) -> bool:
    with path.open(encoding="ascii") as file:
        asked = fcntl.fcntl(file, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(struct.unpack(_FLOCK, asked)[0] != fcntl.F_UNLCK)
