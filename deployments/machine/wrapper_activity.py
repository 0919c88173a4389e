"""Shares state between the wrappers of a machine: their processes, and whether one of them is working."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.machine.cpu_time import ProcessTable

_FLOCK = "hhqqi"
"""``struct flock``: type, whence, start, length, pid. Source: fcntl(2), "Open file description locks"."""
_WORKS, _LIVES = 0, 1
"""The bytes of its file that a wrapper locks: the first while it works, the second while it lives.

The locks are shared, so that a new wrapper can lock the file while its predecessor still ends.
"""


class WrapperActivity:
    """Publishes whether this wrapper works, and reads whether others do, in a directory that wrappers share.

    Each wrapper has a file there. It locks one byte of it as long as it lives, and another one
    while it starts an LLM or answers; the kernel releases the locks if the wrapper is killed. It
    also updates the file's time when work begins, so that work which ends before the next check is
    seen. No process waits for such a lock; the others ask the kernel whether it is held.
    """

    def __init__(self, directory: Path, wrapper_id: str, *, process: tuple[int, int] | None = None) -> None:
        """Create this wrapper's file; ``process``: pid and start (ticks since boot), by default of this process."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._own = directory / wrapper_id
        self._file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o600)  # stays open for the life of the process
        pid, started = process or (os.getpid(), _started(os.getpid()))
        text = f"{pid} {started}\n".encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        self._lock(fcntl.F_RDLCK, _LIVES)
        self._works = 0
        self._begun_ns: dict[Path, int] = {path: path.stat().st_mtime_ns for path in self._others()}

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Mark this wrapper as working until the context ends."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Begin one more piece of work of this wrapper. Takes a few microseconds and never waits."""
        self._works += 1
        if self._works == 1:
            os.utime(self._file)
            self._lock(fcntl.F_RDLCK, _WORKS)

    def end(self) -> None:
        """End one piece of work."""
        self._works -= 1
        if not self._works:
            self._lock(fcntl.F_UNLCK, _WORKS)

    def others_worked(self) -> bool | None:
        """Return whether another wrapper works or has worked since the last call; None if unknown. For one thread."""
        try:
            return any([self._worked(path) for path in self._others()])  # noqa: C419 - every call has a side effect
        except OSError:
            return None  # a file was removed

    def processes(self) -> dict[int, int] | None:
        """Return the processes of the other living wrappers with their starts (ticks since boot); None if unknown."""
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
