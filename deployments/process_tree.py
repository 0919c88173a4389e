"""Processes that must not be forgotten: find them, watch them, see them gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

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


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL; those that are gone already are none of our business any more."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def ended(processes: Collection[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    """Wait until all of them have ended, at most ``timeout_s`` seconds ≥ 0. Returns those that have not."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while (remaining := alive(processes)) and asyncio.get_running_loop().time() < deadline_s:
        await asyncio.sleep(0.01)
    return remaining


class DeathWatch:
    """Calls back, in the event loop, as soon as one of some processes ends. Linux only (pidfd)."""

    def __init__(self, processes: Iterable[psutil.Process], on_death: Callable[[int], None]) -> None:
        """Start watching; ``on_death`` gets the pid, at most once per process. Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._fds: dict[int, int] = {}
        for process in processes:
            try:
                self._fds[process.pid] = fd = os.pidfd_open(process.pid)
            except ProcessLookupError:
                self._loop.call_soon(on_death, process.pid)
            else:
                self._loop.add_reader(fd, self._ended, process.pid, on_death)

    def _ended(self, pid: int, on_death: Callable[[int], None]) -> None:
        self._forget(pid)
        on_death(pid)

    def _forget(self, pid: int) -> None:
        fd = self._fds.pop(pid)
        self._loop.remove_reader(fd)
        os.close(fd)

    def close(self) -> None:
        """Stop watching; nothing is called back after this."""
        for pid in list(self._fds):
            self._forget(pid)
