"""Processes that must not be forgotten: find them, watch them, see them gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def descendants(pid: int) -> set[psutil.Process]:
    """Children, children's children … of a process; none if it does not exist. A reused pid is another process."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those that still run; one that ended and only waits to be reaped (a zombie) does not."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files in shared memory that these processes have in use and that have a name, so that they outlive them."""
    found = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8").splitlines():
                _, directory, name = line.partition("/dev/shm/")  # noqa: S108 - read from the kernel, not written to
                if name and not name.endswith(" (deleted)"):
                    found.add(Path(directory) / name)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL; those that are gone already are none of our business any more."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def ended(processes: Iterable[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    """Wait until all of them have ended, at most ``timeout_s`` seconds ≥ 0. Returns those that have not."""
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
    """Calls back, in the event loop, as soon as one of some processes ends. Linux only (pidfd)."""

    def __init__(self, processes: Iterable[psutil.Process], on_death: Callable[[int], None]) -> None:
        """Start watching; ``on_death`` gets the pid, at most once per process. Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._fds: dict[int, int | None] = {}  # by pid; None for a process that had ended before
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
        """Stop watching; nothing is called back after this."""
        for pid in list(self._fds):
            self._forget(pid)
