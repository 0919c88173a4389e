"""Starts and ends a registry for ``greenprompt up`` and ``down``: in the foreground or detached.

One process owns a local cluster. It holds a lock in ``state_dir`` while it lives. A fork of it runs Ray
(deployments.launch.restarts). When it ends, even if it is killed, all processes that it started end as
well. "Detached" means the same process in the background.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from deployments.engine.environment import remove_orphans, remove_shared_memory
from deployments.launch import surroundings, up_again
from deployments.launch.access_token import require_own_token
from deployments.launch.haproxy import SERVE_ENVIRONMENT
from deployments.launch.local_ray import (
    ACCESS_FILE,
    FOLDER_PREFIX,
    RAY_ENVIRONMENT,
    TEMPORARY,
    local_ray_environment,
    remove_cluster_files,
    require_free_port,
)
from deployments.launch.node import head_is_kept
from deployments.launch.ray_tls import require_tls_files
from deployments.launch.restarts import Life, StopWanted, heed_signals, ignore_signals, keep_running
from deployments.machine import process_tree
from deployments.machine.disk import disk_problem
from deployments.machine.private_files import open_private, require_unchanged_by_others, write_private
from deployments.serve.ray_folder import keep_logs
from registry.errors import BadSettings, StartFailed
from registry.settings import OPERATOR_KEY, Settings
from registry.wire.http import is_loopback

Say = Callable[[str], Any]

DOWN_LIMIT_S = 180.0
"""Longest wait of 'down' for the registry's process to end, seconds."""

HOLDER_LIMIT_S = 1.0
"""Longest wait for a process that has just taken the lock to write its pid, seconds."""

LEFTOVERS_LIMIT_S = 20.0
"""Longest wait for the remaining processes of a killed registry to end, seconds."""

STOP_LIMIT_S = 150.0
"""Longest time of a shutdown in addition to twice ``stop_timeout_s``, seconds."""

POLL_S = 0.1

LOCK = "up.lock"
"""Name of the file in ``state_dir`` that a running registry keeps locked; it contains the pid."""

DISK_POLL_S = 5.0
"""Seconds between a foreground registry's checks whether its disk is full."""


def run_in_foreground(settings: Settings, *, say: Say) -> None:
    """Start, print the addresses, wait for SIGINT or SIGTERM, shut down. Raises RegistryError.

    A local cluster that dies is replaced by a new one, with the registry on it.
    """
    with _only_one(settings) as (record, lock):
        if settings.ray.address is not None:
            _become_driver(settings)
            record(folder=None)
            _run(settings, None, record, say)
            return
        surroundings.check(settings)
        keep_running(
            partial(_live, settings, record, say),
            partial(_clean_up, settings, say),
            lock,
            say=say,
            stop_limit_s=2 * settings.wrappers.stop_timeout_s + STOP_LIMIT_S,
        )


def _live(settings: Settings, record: Callable[..., None], say: Say, life: Life) -> None:
    """Run a registry on a new local cluster until SIGINT or SIGTERM. For a process of its own. Raises RegistryError."""
    require_free_port(settings.http.host, settings.http.port, "http.port")
    settings = _with_dashboard_port(settings, surroundings.dashboard_port(settings))
    with local_ray_environment(settings) as folder:
        record(folder=str(folder))
        _run(settings, folder, record, say, life)


def _clean_up(settings: Settings, say: Say) -> None:
    if (logs := _remove_leftovers(settings)) is not None:
        say(f"Ray's logs of the cluster that died {logs}.")


def _run(
    settings: Settings, folder: Path | None, record: Callable[..., None], say: Say, life: Life | None = None
) -> None:
    heed_signals()

    def joined() -> None:
        heed_signals()  # Ray has replaced the handlers
        if life is not None:
            life.watch()

    try:
        from deployments.serve import app  # takes seconds, because it imports Ray

        app.check(settings)
        say("Starting Ray, Serve and a wrapper (it imports vLLM once, about half a minute) …")
        try:
            ready = app.start(settings, folder, on_joined=joined)._asdict()
            record(folder=str(folder) if folder else None, **ready)
            for line in ready_lines(settings, ready):
                say(line)
            if life is not None:
                life.ready()
            _watch_disk(settings.state_dir, say)
        except StopWanted:
            say("Shutting down: stopping LLMs, wrappers and the registry …")
        finally:
            ignore_signals()  # one signal is enough: each step of the shutdown has a time limit
            if life is not None:
                life.stopping()
            app.stop(settings)
            remove_orphans()  # those of a second user's engines are not in the cluster's folder
    except StopWanted:  # nothing was started yet
        pass
    say("Everything is down.")


def _watch_disk(folder: Path, say: Say) -> NoReturn:
    """Print a message when the disk of a folder becomes full and when it has space again, until a signal comes."""
    problem: str | None = None
    while True:
        time.sleep(DISK_POLL_S)
        before, problem = problem, disk_problem(folder)
        if problem is not None and before is None:
            say(f"Warning: {problem}; the registry accepts no requests until there is space again.")
        elif problem is None and before is not None:
            say(f"The disk of {folder} has space again.")


def _with_dashboard_port(settings: Settings, port: int) -> Settings:
    return settings.model_copy(update={"ray": settings.ray.model_copy(update={"dashboard_port": port})})


def ready_lines(settings: Settings, ready: dict[str, Any]) -> list[str]:
    """Return the lines to print when the registry is ready."""
    lines = [
        f"Registry ready:  {ready['url']}   (API: {ready['url']}/openapi.json)",
        f"Ray dashboard:   {ready['dashboard']}",
    ]
    if settings.ray.address is None:
        lines.append(f"                 it asks for the token in {settings.state_dir / ACCESS_FILE}")
    if settings.access.keys:
        lines.append(f"Calls need keys: the operator's key is in {settings.state_dir / OPERATOR_KEY}")
    # D137: ports are checked from outside
    if settings.ray.address is not None and not is_loopback(settings.http.host):
        command = f"greenprompt firewall cluster.yaml --check --port {settings.http.port}"
        lines.append(f"Open ports:      only a host outside of the cluster can check them: {command}")
    return lines


def start_on_cluster(settings: Settings, command: list[str], *, say: Say) -> None:
    """Start the registry on the cluster of ``ray.address``; it keeps running when this process ends.

    If one runs there already, it is not changed. On the head, the keeper repeats ``command`` when it has started Ray
    again. So ``command`` should be the one that calls this. Raises RegistryError.
    """
    _become_driver(settings)
    from deployments.serve import app

    for line in ready_lines(settings, app.start(settings, None)._asdict()):
        say(line)
    if head_is_kept() and up_again.REPEATED not in os.environ:
        try:
            up_again.remember(command)
        except OSError as error:
            raise BadSettings(str(up_again.command_file()), f"can't be written ({error.strerror})") from error
    say("Machines appear when they join the cluster; `greenprompt status` shows them.")


def _become_driver(settings: Settings) -> None:
    """Set what this process needs to connect to a running cluster.

    Raises:
        BadSettings: Others know its token, or it can't be read; or the files of Ray's TLS can't be used.
    """
    require_tls_files(os.environ)
    require_own_token(may_be_missing=True)
    os.environ.update(RAY_ENVIRONMENT | (SERVE_ENVIRONMENT if settings.http.haproxy else {}))


def run_detached(settings: Settings, command: list[str], *, say: Say) -> None:
    """Run the foreground command in the background and return when it is ready. Raises RegistryError."""
    surroundings.require_writable(settings.state_dir, "state_dir")
    require_unchanged_by_others(settings.state_dir, "state_dir")  # before a file in it is opened
    if _is_held(settings):
        raise _runs_already(settings)
    log_path = settings.state_dir / "up.log"
    try:
        log = open_private(log_path, "w")
    except OSError as error:
        raise BadSettings("state_dir", f"{log_path} can't be written ({error.strerror})") from error
    with log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    deadline_s = time.monotonic() + settings.wrappers.start_timeout_s + 120
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            text = log_path.read_text(encoding="utf-8").strip()
            last = text.splitlines()[-1] if text else "no output"
            raise StartFailed(last.removeprefix("greenprompt: "))
        state = _read_record(settings)
        if state.get("pid") == process.pid and "url" in state:
            for line in ready_lines(settings, state):
                say(line)
            say(f"Log:             {log_path}\nEnd it with:     greenprompt down")
            return
        time.sleep(POLL_S)
    process.terminate()
    raise StartFailed(f"not ready in time; see {log_path}")


def end(settings: Settings, *, say: Say) -> None:
    """End the registry of this ``state_dir`` and wait until its process is gone. Raises RegistryError."""
    if settings.ray.address is not None and not _is_held(settings):
        _become_driver(settings)
        from deployments.serve import app

        app.join_ray(settings, None)
        app.stop(settings)
        up_again.forget()
        say("The registry of the cluster is down.")
        return
    pid = _holder(settings)
    if pid is None:
        say(f"No registry runs from {settings.state_dir}.")
        return
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + DOWN_LIMIT_S
    while _is_held(settings):
        if time.monotonic() > deadline_s:
            raise StartFailed(f"process {pid} has not ended within {DOWN_LIMIT_S:g} s")
        time.sleep(POLL_S)
    say("Everything is down.")


@contextmanager
def _only_one(settings: Settings) -> Iterator[tuple[Callable[..., None], IO[str]]]:
    """Hold the lock of ``state_dir``; yield a function that records the running registry in up.json, and the lock.

    Raises:
        BadSettings: Another process holds it, or the folder can't be written.
        StartFailed: Processes of an earlier, killed registry do not end.
    """
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_unchanged_by_others(settings.state_dir, "state_dir")
        lock = open_private(settings.state_dir / LOCK, "a+")
    except OSError as error:
        raise BadSettings("state_dir", f"{settings.state_dir} can't be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _runs_already(settings) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _remove_leftovers(settings)
        path, owner = settings.state_dir / "up.json", os.getpid()

        def record(**what: Any) -> None:
            try:
                write_private(path, json.dumps({"pid": owner, **what}))
            except OSError as error:
                raise BadSettings("state_dir", f"{path} can't be written ({error.strerror})") from error

        try:
            yield record, lock
        finally:
            if path.is_file():
                path.unlink()
            lock.truncate(0)  # else 'down' could signal our old pid before the next holder has written its own


def _runs_already(settings: Settings) -> BadSettings:
    return BadSettings(
        "state_dir", f"a registry runs from {settings.state_dir} (process {_holder(settings) or 'unknown'})"
    )


def _is_held(settings: Settings) -> bool:
    """Whether a process holds the lock of ``state_dir``.

    Raises:
        BadSettings: The folder can't be read.
    """
    try:
        lock = (settings.state_dir / LOCK).open("r")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadSettings("state_dir", f"{settings.state_dir} can't be read ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _holder(settings: Settings) -> int | None:
    """Return the pid of the process that holds the lock of ``state_dir``, None if none does.

    The pid is read from the lock file, else from up.json. A process writes its pid just after it
    takes the lock. So if neither file has a pid, both are read again for up to HOLDER_LIMIT_S.

    Raises:
        BadSettings: The folder can't be read, or the lock is held and no pid is known.
    """
    path = settings.state_dir / LOCK
    deadline_s = time.monotonic() + HOLDER_LIMIT_S
    while _is_held(settings):
        pid = path.read_text(encoding="utf-8") or str(_read_record(settings).get("pid", ""))
        if pid.isdigit():
            return int(pid)
        if time.monotonic() > deadline_s:
            raise BadSettings("state_dir", f"{path} is locked, but does not name the process that holds the lock")
        time.sleep(POLL_S)
    return None


def _read_record(settings: Settings) -> dict[str, Any]:
    try:
        state = json.loads((settings.state_dir / "up.json").read_bytes())
    except (OSError, ValueError):  # missing, truncated by a power failure, or not a file: treat as missing
        return {}
    return state if isinstance(state, dict) else {}


# D8: all processes end with their owner
def _remove_leftovers(settings: Settings) -> str | None:
    """End the remaining processes of a killed registry's cluster and remove its folder and secrets.

    Returns what became of its logs, or None if it left none.
    Most processes exit with their parent (PR_SET_PDEATHSIG); Ray's agents check for their parent only once a minute.

    Raises:
        StartFailed: Some of them do not end.
    """
    folder = _read_record(settings).get("folder")
    if folder is None or not Path(folder).name.startswith(FOLDER_PREFIX):
        return None
    deadline_s = time.monotonic() + LEFTOVERS_LIMIT_S
    while left := process_tree.users_of(Path(folder)):
        if time.monotonic() > deadline_s:
            pids = ", ".join(str(process.pid) for process in left)
            raise StartFailed(f"processes of the last registry do not end: {pids}")
        process_tree.kill(left)
        time.sleep(POLL_S)
    if not Path(folder).exists():
        return None
    remove_shared_memory(Path(folder) / TEMPORARY)
    try:
        logs = f"are in {keep_logs(Path(folder), settings.state_dir / 'ray-logs')}"
    except OSError as error:  # e.g. a full disk
        logs = f"could not be kept ({error.strerror})"
    remove_cluster_files(settings, Path(folder))
    return logs
