"""Runs a local registry in a child process, and starts another one when its cluster dies.

Ray 2.60 gives up 60 s after the death of its control process (GCS), and does not start it again. So the process of
``greenprompt up`` only watches. A child of it starts Ray, and ends as soon as a process ends that Ray can't do without.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import IO, Any, NoReturn

import psutil

from deployments.machine import process_tree
from deployments.machine.child_processes import die_with_parent
from registry.background import spawn_thread
from registry.errors import RegistryError, StartFailed, in_one_line

PAUSES_S = (0.0, 2.0, 10.0, 30.0, 60.0)
"""Pause before the first, second, … restart within WINDOW_S, seconds. After the last of them there is no restart."""

WINDOW_S = 600.0
"""How long a restart counts, seconds."""

VITAL = frozenset({"gcs_server", "raylet"})
"""Names of the processes that Ray can't do without. They are children of the process that starts Ray."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RestartLimit:
    """Allows a restart for each of PAUSES_S within WINDOW_S. For one thread."""

    def __init__(self) -> None:
        self._begun_s: list[float] = []

    def next_pause_s(self) -> float | None:
        """Count one more restart and return the pause before it, seconds; None if there were too many."""
        now_s = time.monotonic()
        self._begun_s = [begun_s for begun_s in self._begun_s if now_s - begun_s < WINDOW_S]
        if len(self._begun_s) == len(PAUSES_S):
            return None
        pause_s = PAUSES_S[len(self._begun_s)]
        self._begun_s.append(now_s + pause_s)
        return pause_s


class StopWanted(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that error handlers do not catch it."""


def heed_signals() -> None:
    """Make the first SIGINT or SIGTERM interrupt the main thread at once, by StopWanted. Later ones have no effect."""

    def stop(*_: object) -> NoReturn:
        ignore_signals()
        raise StopWanted

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def ignore_signals() -> None:
    """Make SIGINT and SIGTERM have no effect on this process."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)


class Life:
    """One life of a registry, as the child process that runs it reports it to the parent."""

    def __init__(self, report: Connection) -> None:
        self._report = report
        self._stopping = False

    def ready(self) -> None:
        """Report that the registry is ready. From now on it is started again if it ends without a signal."""
        self._report.send(None)

    def stopping(self) -> None:
        """End the watch, because the cluster's processes are about to be stopped."""
        self._stopping = True

    def watch(self) -> None:
        """From now on, end this process as soon as a vital process of its cluster ends. Returns at once.

        The end is hard: what else runs in this process would wait for Ray for a minute.
        """
        vital = vital_processes()
        spawn_thread("cluster-watch", lambda: self._end(first_death(vital)), on_failure=self._watch_failed)

    def _watch_failed(self, error: BaseException) -> None:
        self._end(f"the watch of Ray's processes failed: {in_one_line(error)}")  # a death would go unnoticed

    def _end(self, problem: str) -> None:
        if not self._stopping:
            self._report.send(StartFailed(problem))
            os._exit(1)


def vital_processes() -> list[psutil.Process]:
    """Return the running vital processes of the cluster that this process has started."""
    return [child for child in process_tree.alive(psutil.Process().children()) if child.name() in VITAL]


def first_death(vital: Sequence[psutil.Process]) -> str:
    """Block until one of the vital processes has ended, or return at once if one is missing; the text says which."""
    names = {process.pid: process.name() for process in vital}
    if (missing := missing_words(names.values())) is not None:
        return missing
    ends = select.poll()
    with ExitStack() as opened:
        pids = {}
        for pid in names:
            pids[fd := os.pidfd_open(pid)] = pid
            opened.callback(os.close, fd)
            ends.register(fd, select.POLLIN)
        pid = pids[ends.poll()[0][0]]
    return f"Ray's {names[pid]} {end_words(process_tree.ended_by(pid) or 0)}"


def missing_words(names: Iterable[str]) -> str | None:
    """Return which vital processes are not among these names, None if all are."""
    missing = VITAL.difference(names)
    return f"Ray's {' and '.join(sorted(missing))} ended during the start" if missing else None


def end_words(signal_number: int) -> str:
    """Return how a process ended; 0 if not by a signal, or if that is not known."""
    return f"was ended by {signal.Signals(signal_number).name}" if signal_number else "ended"


# D135: a local cluster that dies is replaced
def keep_running(
    live: Callable[[Life], None],
    clean_up: Callable[[], None],
    lock: IO[str],
    *,
    say: Callable[[str], Any],
    stop_limit_s: float,
) -> None:
    """Run ``live`` in child processes, one after the other, until SIGINT, SIGTERM or a child that returns from it.

    A child that dies, or fails after a registry was ready, is followed by another one. Before that, and at the end,
    ``clean_up`` is called, which must remove what is left of the child. It may be called twice for one child.

    Args:
        live: Runs a registry until SIGTERM. It gets StopWanted at this signal, and must call ``Life.ready``.
        clean_up: Removes the remaining processes and files of a child that has ended.
        lock: A file that only this process is to hold. Each child closes it: the child of a killed parent ends a moment
            later, and the next start must not be refused until then.
        say: Prints a line for the operator.
        stop_limit_s: Longest time that a child may take to end after a signal, seconds; then it is killed.

    Raises:
        RegistryError: The first start failed; what ``live`` raised.
        StartFailed: The cluster died too often, or what is left of it can't be removed.
    """
    child = _Child(live, lock)
    restarts = RestartLimit()
    heed_signals()
    try:
        while (problem := child.run()) is not None:
            clean_up()
            if not child.was_ready:
                raise problem
            if (pause_s := restarts.next_pause_s()) is None:
                raise StartFailed(
                    f"{problem}; it was started again {len(PAUSES_S)} times within {WINDOW_S / 60:g} minutes, "
                    "and is not started any more; run `greenprompt up` when the cause is removed"
                )
            say(f"{problem}. Starting again{f' in {pause_s:g} s' if pause_s else ''} …")
            time.sleep(pause_s)
    except StopWanted:
        child.end(stop_limit_s)
    finally:
        ignore_signals()
    clean_up()


class _Child:
    """Runs one child process after the other."""

    def __init__(self, live: Callable[[Life], None], lock: IO[str]) -> None:
        self.was_ready = False
        self._live = live
        self._lock = lock
        self._process: ForkProcess | None = None

    def run(self) -> RegistryError | None:
        """Start a child and wait until it has ended. Return None if it ended as it should, else what went wrong."""
        reports, report = multiprocessing.Pipe(duplex=False)
        with reports:
            with report:
                process = multiprocessing.get_context("fork").Process(target=self._in_child, args=[os.getpid(), report])
                # During the fork, a signal would interrupt us before we know the child, or get lost in the child.
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                try:
                    process.start()
                    self._process = process
                except OSError as error:  # e.g. no memory
                    return StartFailed(f"no process can be started: {in_one_line(error)}")
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            process.join()
            return self._problem(process.exitcode or 0, reports)

    def _in_child(self, parent_pid: int, report: Connection) -> None:
        die_with_parent(parent_pid)
        self._lock.close()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            self._live(Life(report))
        except StopWanted:  # before the registry was started
            return
        except RegistryError as error:
            report.send(error)
            sys.exit(1)

    def _problem(self, exit_code: int, reports: Connection) -> RegistryError | None:
        problem: RegistryError | None = None
        with suppress(EOFError, OSError):  # the end of what it reported; OSError if it was killed during a report
            while True:
                told = reports.recv()
                self.was_ready |= told is None
                problem = problem or told
        if exit_code == 0:
            return None
        return problem or StartFailed(f"the process that runs Ray {end_words(max(-exit_code, 0))}")

    def end(self, limit_s: float) -> None:
        """Send SIGTERM to the child, if it runs, and wait for its end; kill it after ``limit_s`` seconds."""
        if self._process is None or self._process.exitcode is not None:
            return
        self._process.terminate()
        self._process.join(limit_s)
        self._process.kill()
        self._process.join()
