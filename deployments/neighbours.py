"""What the wrappers of a machine know of one another: whether any of them is at work."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = "hhqqi"
"""``struct flock``: type, whence, start, length, process. Source: fcntl(2), "Open file description locks"."""


class Neighbours:
    """One of the wrappers of a machine, which share ``directory``.

    Each locks a file of its own while it starts an LLM or answers, so that one that is killed is at work no more, and
    changes the file's time when it begins, so that what is over before anybody looks is seen, too. Nobody ever waits
    for such a lock: others ask the kernel whether it is held.
    """

    def __init__(self, directory: Path, wrapper_id: str) -> None:
        """Join the others."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._own = directory / wrapper_id
        self._file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)  # for as long as the process lives
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
            self._lock(fcntl.F_WRLCK)

    def end(self) -> None:
        """A piece of its work is over."""
        self._works -= 1
        if not self._works:
            self._lock(fcntl.F_UNLCK)

    def others_worked(self) -> bool | None:
        """Whether any of the others works, or has since this was last asked; None: can't be told. For one thread."""
        try:
            return any([self._worked(path) for path in self._others()])  # noqa: C419 - each has to be looked at
        except OSError:
            return None  # somebody has tidied up the directory

    def _others(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if path != self._own]

    def _worked(self, path: Path) -> bool:
        begun_ns = path.stat().st_mtime_ns
        before_ns, self._begun_ns[path] = self._begun_ns.get(path, 0), begun_ns
        with path.open(encoding="utf-8") as file:
            asked = fcntl.fcntl(file, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        return begun_ns != before_ns or struct.unpack(_FLOCK, asked)[0] != fcntl.F_UNLCK

    def _lock(self, kind: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
