"""A process on the head of a cluster that starts Ray and the registry again when Ray's GCS or raylet dies.

``greenprompt ray-start --head`` leaves it in the background. It runs ``ray start``, and the kernel makes it the parent
of Ray's processes. So it hears of each end at once. If a ``ray stop`` runs at that moment, the keeper ends, too. If it
is killed itself, Ray keeps running, but is not started again.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import psutil
import structlog

from deployments.launch import up_again
from deployments.launch.ray_commands import RAY_LIMIT_S, RayStart
from deployments.launch.restarts import (
    PAUSES_S,
    VITAL,
    WINDOW_S,
    RestartLimit,
    StopWanted,
    end_words,
    heed_signals,
    ignore_signals,
    missing_words,
)
from deployments.machine.child_processes import set_process_option
from deployments.machine.private_files import open_private
from deployments.serve.logs import configure_logging
from registry.background import spawn_thread
from registry.errors import StartFailed

log = structlog.get_logger("deployments.launch.keeper")

LOCK = "keeper.lock"
"""File in the node's folder that a keeper keeps locked; it contains the keeper's pid."""

NODE_LOCK = "node.lock"
"""File in the node's folder that is locked while Ray is started."""

LOG = "keeper.jsonl"
"""File in the node's folder with the keeper's log; it is rotated."""

UP_LIMIT_S = 600
"""Time limit for starting the registry again, seconds."""

END_LIMIT_S = 20.0
"""Longest wait for the end of a keeper after SIGTERM, seconds; then it is killed."""

END_POLL_S = 0.01
"""Pause before each signal, seconds: a keeper that ends by itself has removed its pid by then."""

ADOPTION_LIMIT_S = 5.0
"""Longest wait until Ray's processes are children of this process, after ``ray start``, seconds."""

ADOPTION_POLL_S = 0.05

STOP_POLL_S = 0.5
"""Seconds between two searches for a ``ray stop``, which takes longer; only while Ray is being started again."""

_SHOWN = 2000
"""Number of characters of a failed command's output that are logged."""


def launch(folder: Path, start: RayStart) -> None:
    """Start Ray by a keeper, which remains. Prints what Ray's commands print. Blocks up to 2 * RAY_LIMIT_S.

    The caller holds the lock of the node's folder.

    Raises:
        StartFailed: Ray does not start. The keeper has ended then.
    """
    plan = {"folder": str(folder), "program": start.program, "options": start.options, "wanted": start.wanted}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deployments.launch.keeper"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=start.environment,
                start_new_session=True,
            )
        ours.settimeout(2 * RAY_LIMIT_S + END_LIMIT_S)
        try:
            with ours.makefile("rw", encoding="utf-8") as channel:
                channel.write(f"{json.dumps(plan)}\n")
                channel.flush()
                answer = channel.readline()
        except ConnectionError:
            answer = ""
        except TimeoutError as error:
            process.kill()
            raise StartFailed("the process that starts Ray does not answer") from error
    told: dict[str, Any] = json.loads(answer) if answer else {"output": "", "problem": "its process ended"}
    sys.stdout.write(told["output"])
    if told["problem"] is not None:
        process.wait(END_LIMIT_S)
        raise StartFailed(told["problem"])


def is_running(folder: Path) -> bool:
    """Whether a keeper runs on this node."""
    return _holder(folder) is not None


def end(folder: Path) -> None:
    """End the keeper of this node, if one runs, without an effect on Ray. Blocks up to 2 * END_LIMIT_S.

    Raises:
        StartFailed: It does not end, e.g. because it runs in another container.
    """
    deadline_s = time.monotonic() + END_LIMIT_S
    while (pid := _holder(folder)) is not None:
        if time.monotonic() > deadline_s + END_LIMIT_S:
            raise StartFailed(f"process {pid}, which starts Ray again, does not end; end it where it runs")
        time.sleep(END_POLL_S)
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if _holder(folder) != pid:  # it has ended, and another process may have its pid
                    continue
                late = time.monotonic() > deadline_s
                signal.pidfd_send_signal(descriptor, signal.SIGKILL if late else signal.SIGTERM)
                ends = select.poll()
                ends.register(descriptor, select.POLLIN)
                ends.poll(END_LIMIT_S * 1000)
            finally:
                os.close(descriptor)


def _holder(folder: Path) -> int | None:
    """Return the pid of the process that holds the lock, None if none does."""
    try:
        with (folder / LOCK).open(encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        text = (folder / LOCK).read_text(encoding="ascii")
        return int(text) if text else None
    return None


class Keeper:
    """Starts Ray, watches it, and starts it again. For the main thread of its process."""

    def __init__(self, start: RayStart, folder: Path) -> None:
        self._start = start
        self._folder = folder
        self._restarts = RestartLimit()
        self._vital: dict[int, str] = {}

    def _run(self, output: IO[str]) -> None:
        earlier = _vital_children()
        self._start.run(self._folder, output)
        deadline_s = time.monotonic() + ADOPTION_LIMIT_S
        while True:
            self._vital = {pid: name for pid, name in _vital_children().items() if pid not in earlier}
            if set(self._vital.values()) == VITAL or time.monotonic() > deadline_s:
                return
            time.sleep(ADOPTION_POLL_S)

    def begin(self) -> dict[str, Any]:
        """Start Ray for the first time. Return what it printed, and the problem if it did not start, else None."""
        set_process_option("PR_SET_CHILD_SUBREAPER", 1)  # the parent of descendants whose parents end
        with tempfile.TemporaryFile("w+", dir=self._folder) as output:
            try:
                self._run(output)
            except StartFailed as error:
                return {"output": _text(output), "problem": str(error)}
            except OSError as error:  # e.g. the disk is full: a Ray that is not recorded would be started twice
                self._start.stop(output)
                return {"output": _text(output), "problem": f"its start can't be recorded: {error}"}
            return {"output": _text(output), "problem": None}

    # D136: a head that dies is started again
    def keep(self) -> None:
        """Start Ray again whenever it dies. Return when it was stopped, or died too often."""
        while (problem := _first_death(self._vital)) is not None:
            with _StopWatch() as stops:
                if not self._start_again(problem, stops):
                    break
        else:
            log.info("Ray was stopped")
        up_again.forget()

    def _start_again(self, problem: str, stops: _StopWatch) -> bool:
        """Start Ray and the registry again. Return False if Ray is to stay stopped."""
        while (pause_s := self._restarts.next_pause_s()) is not None:
            log.warning("Ray died and is started again", problem=problem, pause_s=pause_s)
            if stops.wait(pause_s):
                log.info("Ray was stopped")
                return False
            try:
                stopped = self._run_unless_stopped(stops)
            except (StartFailed, OSError) as error:
                problem = str(error)
                continue
            return not stopped and self._registry_again(stops)
        log.error(
            "Ray is not started any more; run `ray up --restart-only` when the cause is removed",
            problem=problem,
            restarts=len(PAUSES_S),
            window_s=WINDOW_S,
        )
        with suppress(StartFailed):  # there may be nothing to stop
            self._start.stop()
        return False

    def _run_unless_stopped(self, stops: _StopWatch) -> bool:
        """Start Ray. Return True if it was stopped meanwhile, by a `ray stop` that may have come too early.

        Raises:
            StartFailed: Ray does not start; its output is logged.
            OSError: A file in the node's folder can't be written.
        """
        lock_file = open_private(self._folder / NODE_LOCK, "w")
        with lock_file as lock, tempfile.TemporaryFile("w+", dir=self._folder) as output:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._run(output)
            except StartFailed as error:
                log.error("Ray does not start", problem=str(error), output=_text(output)[-_SHOWN:])  # noqa: TRY400
                if not stops.seen():
                    raise
            if stops.seen():
                log.info("Ray was stopped during its restart")
                self._start.stop(output)
                return True
        return False

    def _registry_again(self, stops: _StopWatch) -> bool:
        """Repeat the command that started the registry, if there was one, until it succeeds. Return False after a stop.

        If a registry runs, as with Redis, the command has no effect. After some failures, the registry is left to a
        person.
        """
        for pause_s in PAUSES_S:
            if stops.wait(pause_s):
                return False
            up = up_again.remembered()
            if up is None:  # also if `greenprompt down` has ended the registry meanwhile
                return True
            with tempfile.TemporaryFile("w+", dir=self._folder) as output:
                problem = self._run_up(up, output, stops)
                text = _text(output)[-_SHOWN:]
            if problem is None:
                log.info("the registry was started again")
                return True
            log.error("the registry does not start", problem=problem, output=text)
            if self._has_died():
                return True  # the next restart of Ray tries again
        log.error("the registry is not started any more; run `greenprompt up` when the cause is removed")
        return True

    def _run_up(self, up: up_again.UpCommand, output: IO[str], stops: _StopWatch) -> str | None:
        """Run the command, but not longer than Ray, the record of the command, or UP_LIMIT_S. Return a problem."""
        try:
            process = subprocess.Popen(
                up.command,
                cwd=up.folder,
                env={**up.environment, up_again.REPEATED: "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            return str(error)
        deadline_s = time.monotonic() + UP_LIMIT_S
        try:
            while process.poll() is None:
                if stops.wait(STOP_POLL_S):
                    return "Ray was stopped"
                if self._has_died():
                    return "Ray died again"
                if up_again.remembered() is None:
                    return "`greenprompt down` has ended the registry"
                if time.monotonic() > deadline_s:
                    return f"it did not end within {UP_LIMIT_S} s"
        finally:
            process.kill()
            process.wait()
        return f"it ended with {process.returncode}" if process.returncode else None

    def _has_died(self) -> bool:
        """Whether a vital process of Ray has ended; it is not reaped yet."""
        return any(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in self._vital)


def _vital_children() -> dict[int, str]:
    """Return pid and name of the vital processes of Ray, also of those that have ended and are not reaped yet."""
    return {child.pid: name for child in psutil.Process().children() if (name := child.name()) in VITAL}


def _first_death(vital: Mapping[int, str]) -> str | None:
    """Block until one of these children has ended. Return None if Ray was stopped, else which one ended, and how.

    Every other child that ends is reaped: Ray's processes whose parents have ended are children of this process.
    """
    if (missing := missing_words(vital.values())) is not None:
        return missing
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert ended is not None  # only with WNOHANG
        # Before it is reaped: a `ray stop` waits for that, so it still runs. The exit status does not tell: a raylet
        # whose agent was killed exits with 0, as after SIGTERM.
        stopped = ended.si_pid in vital and _ray_stop_runs()
        os.waitpid(ended.si_pid, 0)
        if stopped:
            return None
        if ended.si_pid in vital:
            by_signal = 0 if ended.si_code == os.CLD_EXITED else ended.si_status
            return f"Ray's {vital[ended.si_pid]} {end_words(by_signal)}"


def _ray_stop_runs() -> bool:
    """Whether this user or root runs ``ray stop`` on this machine, other than this process itself."""
    users = {0, os.getuid()}
    for process in psutil.process_iter(["cmdline", "uids", "ppid"]):
        uids = process.info["uids"]
        if uids is None or uids.real not in users or process.info["ppid"] == os.getpid():
            continue
        if _is_ray_stop(process.info["cmdline"] or []) and not _is_in_a_container(process.pid):
            return True
    return False


def _is_ray_stop(words: Sequence[str]) -> bool:
    """Whether this command line is one of ``ray stop``, and not of a program that has these words as arguments."""
    program, *rest = [Path(words[0]).name, *words[1:]] if words else [""]
    if program.startswith("python") and rest:
        program, *rest = rest[1:] if rest[0] == "-m" and len(rest) > 1 else [Path(rest[0]).name, *rest[1:]]
    return program in ("ray", "ray.scripts.scripts") and next((word for word in rest if word[0:1] != "-"), "") == "stop"


def _is_in_a_container(pid: int) -> bool:
    """Whether a process has other process numbers than this one, so that its ``ray stop`` finds other processes."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino != Path("/proc/self/ns/pid").stat().st_ino
    except PermissionError:  # it belongs to root
        return False
    except OSError:  # it has ended
        return True


class _StopWatch:
    """Notices each ``ray stop`` of other processes while it is entered."""

    def __init__(self) -> None:
        self._seen = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._thread = spawn_thread("ray-stop-watch", self._look, on_failure=lambda _: self._seen.set())
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def seen(self) -> bool:
        """Whether there was one, or the search failed."""
        return self._seen.is_set()

    def wait(self, limit_s: float) -> bool:
        """Return True as soon as there is one, else False after ``limit_s`` seconds."""
        return self._seen.wait(limit_s)

    def _look(self) -> None:
        while not self._over.wait(STOP_POLL_S):
            if _ray_stop_runs():
                self._seen.set()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def main() -> None:
    """Run a keeper. Standard input is a socket: the plan is read from it, and the result of the start is written."""
    with socket.socket(fileno=os.dup(0)) as connection:
        os.dup2(1, 0)  # /dev/null: the socket must not stay open
        with connection.makefile(encoding="utf-8") as channel:
            line = channel.readline()
        if not line:  # the caller was killed
            return
        plan = json.loads(line)
        folder = Path(plan.pop("folder"))
        with open_private(folder / LOCK, "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            configure_logging(folder / LOG)
            keeper = Keeper(RayStart(environment=dict(os.environ), **plan), folder)
            with suppress(StopWanted):
                heed_signals()
                _run(keeper, connection)
            ignore_signals()
            lock.truncate(0)


def _run(keeper: Keeper, connection: socket.socket) -> None:
    try:
        answer = keeper.begin()
        # The caller may have been killed, e.g. with its connection by ssh. The next one finds Ray running.
        with suppress(OSError):
            connection.sendall(f"{json.dumps(answer)}\n".encode())
        connection.close()
        if answer["problem"] is None:
            keeper.keep()
    except Exception:
        log.exception("the process that starts Ray again failed; run `ray stop`, and start Ray again to have another")
        raise


if __name__ == "__main__":
    main()
