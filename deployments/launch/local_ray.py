"""A Ray cluster of our own on this machine, reachable from this machine only: its environment and its folder.

Must be entered before ``ray`` is imported: Serve reads its settings from the environment when it is.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import structlog

from deployments.launch.haproxy import haproxy_environment
from registry.errors import BadSettings
from registry.settings import Settings
from registry.wire.http import LOOPBACK

log = structlog.get_logger("deployments.launch.local_ray")

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Ray's hint about accelerators of zero-GPU workers; we ask for GPUs explicitly.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's workers, and so the engines in them, would run at niceness 15 and come last wherever something else runs.
    "RAY_worker_niceness": "0",
    # Above 95 % of the machine's memory, whoever uses it, Ray would end the registry, proxies and wrappers; it knows
    # nothing of engines. The kernel ends engines first (deployments.machine.out_of_memory), if Ray does not put its
    # workers in front of all others.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_oom_score_adjustment": "0",
    # Calls of the last minutes that the dashboard can show. With Ray's own 100,000 the head grew by 8 MiB a minute.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # gRPC, by which the registry's commands reach a wrapper, asks the proxy of the environment even for the machine
    # itself: no wrapper was ever ready (Ray 2.60). All that it connects to here are machines of the cluster.
    "no_grpc_proxy": "0.0.0.0/0,::/0",
}
"""What every process of Ray is told.

Nothing is reported to anybody, engines count as much as any other program, the head does not grow, no proxy lies
between machines of the cluster, and where memory runs out no part of ours goes before an engine.
"""

ACCESS_FILE = "ray-token"
"""Name of the file in ``state_dir`` with the access token of a local cluster, while it runs."""

FOLDER_PREFIX = "gprompt-"
"""How a local cluster's folder in /tmp begins. Short, and not in a longer TMPDIR: HAProxy allows its socket paths,
which hold a node id of 56 digits, 97 characters."""

RAY_LAST_WORKER_PORT = 19_999
"""Ray's workers listen on ports up to this one unless told otherwise."""

REMOVE_TIMEOUT_S = 5.0
"""How long a cluster's folder may resist being removed, seconds."""

RAY_FOLDER = "r"
"""Folder below it for Ray, which lets everybody write to a folder that it is given: the one above lets nobody in."""

TEMPORARY = "t"
"""Folder below it for temporary files of everything that belongs to the cluster."""

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def local_ray_environment(settings: Settings) -> Iterator[Path]:
    """Prepare this process's environment for a local cluster; yields the cluster's own folder.

    The folder holds Ray's session (logs, sockets) and HAProxy's files, and is removed at the end.
    The access token is made anew for each cluster and lies in ``state_dir/ray-token``, readable by its owner.

    Raises:
        BadSettings: HAProxy is wanted and not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
    try:
        token_file = _write_token(settings.state_dir)
        temporary = folder / TEMPORARY
        temporary.mkdir()
        environment = {
            **RAY_ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            # What the parts leave behind when they are killed lies here, and goes with the folder.
            "TMPDIR": str(temporary),
        }
        if settings.http.haproxy:
            local_only = settings.http.host in LOOPBACK
            environment |= haproxy_environment(folder / "h", ports=free_ports(3), local_only=local_only)
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(environment)
        yield folder
    finally:
        remove_folder(folder)
        (settings.state_dir / ACCESS_FILE).unlink(missing_ok=True)


def _write_token(state_dir: Path) -> Path:
    path = state_dir / ACCESS_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on at the moment, all different.

    None is one that the kernel or Ray gives out by itself (their own ranges), so that they are still free when they are
    wanted, a few seconds later.

    Raises:
        OSError: there are no so many.
    """
    lowest_ephemeral = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    candidates = list(range(RAY_LAST_WORKER_PORT + 1, max(lowest_ephemeral, 2 * RAY_LAST_WORKER_PORT)))
    Random().shuffle(candidates)
    free: list[int] = []
    for port in candidates:
        if len(free) == count:
            return free
        with suppress(OSError):  # somebody listens there
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
    raise OSError(f"there are no {count} free ports above {RAY_LAST_WORKER_PORT}")


def remove_folder(folder: Path) -> None:
    """Remove a cluster's folder, into which the last of its processes may still write for a moment."""
    give_up_s = time.monotonic() + REMOVE_TIMEOUT_S
    while folder.exists() and time.monotonic() < give_up_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
    if folder.exists():
        log.warning("the cluster's folder could not be removed", folder=str(folder))


def keep_logs(folder: Path, kept: Path) -> Path:
    """Copy the logs of a cluster that did not start out of its folder, which is removed; replaces those kept before."""
    shutil.rmtree(kept, ignore_errors=True)
    for logs in folder.glob(f"{RAY_FOLDER}/session_2*/logs"):
        shutil.copytree(logs, kept, dirs_exist_ok=True)
    return kept


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raise BadSettings, naming the setting, when something listens on the port."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise BadSettings(setting, f"port {port} of {host} can't be used ({error.strerror}); choose another") from error
