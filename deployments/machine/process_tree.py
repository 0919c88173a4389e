"""Finds processes, watches them, kills them and waits for their end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - read from the kernel, not written to


def descendants(pid: int) -> set[psutil.Process]:
    """Return all descendants of a process; none if it does not exist. A reused pid counts as another process."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return the processes that still run; a zombie does not."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def users_of(folder: Path) -> set[psutil.Process]:
    """Return this user's living processes whose ``TMPDIR`` is in or below a folder.

    They inherited it from the process that set it, whatever their parent is now. Some overwrite their environment with
    a title (Ray's agents): these count if they have files open there.
    """
    mine = (process for process in psutil.process_iter(["uids"]) if _uid(process) == os.getuid())
    return {process for process in mine if _uses(process, folder)}


def _uid(process: psutil.Process) -> int | None:
    uids = process.info["uids"]
    return uids.real if uids is not None else None


def _uses(process: psutil.Process, folder: Path) -> bool:
    try:
        environment = process.environ()
        used = [environment.get("TMPDIR", "/")] if environment else [file.path for file in process.open_files()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or belongs to another user after all
        return False
    return any(Path(path).is_relative_to(folder) for path in used)


def ended_by(pid: int, proc_root: Path = Path("/proc")) -> int | None:
    """Return the signal that ended a process, 0 if it exited; None if it runs or its parent has reaped it.

    Source: proc_pid_stat(5), exit_code.
    """
    try:
        text = (proc_root / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the second field may contain any characters
    return int(fields[-1]) & 0x7F if fields[0] == b"Z" else None


def stopped(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return the processes that are stopped (SIGSTOP) and not continued."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                found.add(process)
    return found


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Return the named shared memory files that these processes use; such files outlive their processes."""
    found = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                # The last of six fields is the path. It may be any file's, because a process chooses what it maps.
                path = Path(line.split(maxsplit=5)[-1])
                if path.parent == _SHARED_MEMORY and not path.name.endswith(" (deleted)"):
                    found.add(path)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL; skip processes that are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def ended(processes: Iterable[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    """Wait up to ``timeout_s`` seconds ≥ 0 until all of them have ended; return those that have not."""
    waiting = {process.pid: process for process in alive(processes)}
    all_ended = asyncio.Event()

    def cross_out(pid: int) -> None:
        waiting.pop(pid)
        if not waiting:
            all_ended.set()

    watch = DeathWatch(waiting.values(), cross_out)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            if waiting:
                await all_ended.wait()
    watch.close()
    return set(waiting.values())


class DeathWatch:
    """Calls back in the event loop as soon as one of the processes ends. Linux only (pidfd)."""

    def __init__(self, processes: Iterable[psutil.Process], on_death: Callable[[int], None]) -> None:
        """Start watching; ``on_death`` gets the pid, at most once per process. Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._fds: dict[int, int | None] = {}  # by pid; None for a process that had already ended
        for process in processes:
            try:
                self._fds[process.pid] = fd = os.pidfd_open(process.pid)
            except ProcessLookupError:
                self._fds[process.pid] = None
                self._loop.call_soon(self._ended, process.pid)
            else:
                self._loop.add_reader(fd, self._ended, process.pid)

    def _ended(self, pid: int) -> None:
        if pid in self._fds:
            self._forget(pid)
            self._on_death(pid)

    def _forget(self, pid: int) -> None:
        fd = self._fds.pop(pid)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)

    def close(self) -> None:
        """Stop watching; there are no callbacks after this."""
        for pid in list(self._fds):
            self._forget(pid)
