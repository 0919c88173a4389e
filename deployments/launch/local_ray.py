"""A private Ray cluster on this machine, reachable only from here: its environment and its folder.

Enter ``local_ray_environment`` before ``ray`` is imported: Serve reads its settings from the environment then.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import structlog

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.ray_tls import SWITCH, make_tls_files, quiet, require_tls_files, uses_tls
from deployments.machine.cluster_token import proxy_secret
from deployments.machine.private_files import private_folder, write_private
from deployments.machine.worker_environment import FILE_NAME, hide_secrets
from registry.errors import BadSettings
from registry.settings import Settings

log = structlog.get_logger("deployments.launch.local_ray")

RAY_ENVIRONMENT = {
    # In connections from loopback (HAProxy's, or a local proxy's), uvicorn takes the client's address from
    # X-Forwarded-For, so any client could claim to call from a trusted address. If this is empty, uvicorn ignores the
    # header.
    "FORWARDED_ALLOW_IPS": "",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Silences Ray's hint about accelerators of zero-GPU workers; we request GPUs explicitly.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # D44: nothing slows prompts down
    # Ray's workers, and so their engines, would run at niceness 15 and yield to every other program.
    "RAY_worker_niceness": "0",
    # If the machine's memory is more than 95 % full, for any reason, Ray would kill the registry, proxies and
    # wrappers; it does not know engines. The kernel kills engines first (deployments.machine.out_of_memory), provided
    # that Ray does not raise the score of its workers.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_oom_score_adjustment": "0",
    # Recent calls that the dashboard can show. With Ray's default of 100,000 the head grew by 8 MiB a minute.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # gRPC, which carries the registry's commands to wrappers, uses the environment's proxy even for the machine
    # itself, so no wrapper ever became ready (Ray 2.60). All its connections here are to machines of the cluster.
    "no_grpc_proxy": "0.0.0.0/0,::/0",
}
"""Environment of all Ray processes.

No usage reports are sent, engines run at normal priority, the head's memory does not grow, no proxy is used inside the
cluster, and if memory runs out, the kernel kills an engine before any other part.
"""

ACCESS_FILE = "ray-token"
"""Name of the file in ``state_dir`` with the access token of a local cluster, while it runs."""

FOLDER_PREFIX = "gprompt-"
"""Prefix of a local cluster's folder in /tmp.

Short, and not in a longer TMPDIR: HAProxy allows 97 characters for its socket paths, which contain a node id of 56
digits.
"""

RAY_LAST_WORKER_PORT = 19_999
"""Default for the highest port of Ray's workers."""

LEAST_CHOICE = 1000
"""Smallest range of ports in which free ones are searched."""

REMOVE_TIMEOUT_S = 5.0
"""Longest time for removing a cluster's folder, seconds."""

TEMPORARY = "t"
"""Subfolder for temporary files of all parts of the cluster; also on a node, unless the operator sets TMPDIR."""

HAPROXY_FOLDER = "h"
"""Subfolder for HAProxy's files and sockets."""

TLS_FOLDER = "ray-tls"
"""Folder in ``state_dir`` with the certificate and the key by which Ray's processes know each other, while they run.

It is not in /tmp, from which systems remove old files: new workers read the files, too.
"""

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def local_ray_environment(settings: Settings) -> Iterator[Path]:
    """Prepare this process's environment for a local cluster; yield the cluster's folder.

    The folder holds Ray's session (logs, sockets) and HAProxy's files, and is removed at the end. Each cluster gets a
    new access token in ``state_dir/ray-token``; secrets, if there are any, are in ``state_dir/secrets.json``; both are
    removed at the end. Only this user can enter the folder or read these files. Ray opens its own folder to all users,
    so our files are not in it. Unless RAY_USE_TLS is set, Ray's processes use TLS, with files in ``state_dir/ray-tls``.

    Raises:
        BadSettings: HAProxy is wanted, and not installed or not usable with this version of Ray; or Ray's TLS is
            wanted, and its files can't be used.
        OSError: There are no free ports for HAProxy.
    """
    require_tls_files(os.environ)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
    secrets_file = settings.state_dir / FILE_NAME
    tls: dict[str, str] = {}
    try:
        token_file = _write_token(settings.state_dir)
        temporary = private_folder(folder / TEMPORARY)
        environment = {
            **RAY_ENVIRONMENT,
            # D131: a local cluster listens on loopback
            # Without this Ray replaces 127.0.0.1 by the machine's address, and binds its ports to all interfaces.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            # Files that killed processes leave are in here and are removed with the folder.
            "TMPDIR": str(temporary),
        }
        if not os.environ.get(SWITCH):
            tls = make_tls_files(private_folder(settings.state_dir / TLS_FOLDER))
        elif not uses_tls(os.environ):
            log.warning("Ray's TLS is off: other users of this machine can end Ray and run code", variable=SWITCH)
        if settings.http.haproxy:
            secret = proxy_secret(token_file)
            environment |= haproxy_environment(folder / HAPROXY_FOLDER, secret, ports=free_ports(3))
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(environment | quiet(os.environ) | tls)
        hide_secrets(secrets_file, os.environ)
        yield folder
    finally:
        for name in tls:  # the next cluster makes its own
            os.environ.pop(name, None)
        remove_cluster_files(settings, folder)


# D9: loopback means loopback
def _write_token(state_dir: Path) -> Path:
    path = state_dir / ACCESS_FILE
    write_private(path, secrets.token_hex(32))
    return path


def free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback interface.

    They are outside of the ranges from which Ray and the kernel assign ports, so they are probably still free
    a few seconds later. If the kernel's range leaves fewer than LEAST_CHOICE ports above Ray's, it is used too.

    Raises:
        OSError: There are not that many.
    """
    lowest_ephemeral = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    first = RAY_LAST_WORKER_PORT + 1
    candidates = list(range(first, lowest_ephemeral if lowest_ephemeral - first >= LEAST_CHOICE else 2 * first))
    Random().shuffle(candidates)
    free: list[int] = []
    for port in candidates:
        if len(free) == count:
            return free
        with suppress(OSError):  # the port is in use
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
    raise OSError(f"there are no {count} free ports above {RAY_LAST_WORKER_PORT}")


def remove_cluster_files(settings: Settings, folder: Path) -> None:
    """Remove a cluster's folder, its access token, its secrets and the files of its TLS."""
    remove_folder(folder)
    shutil.rmtree(settings.state_dir / TLS_FOLDER, ignore_errors=True)
    (settings.state_dir / ACCESS_FILE).unlink(missing_ok=True)
    (settings.state_dir / FILE_NAME).unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a cluster's folder. Retries for REMOVE_TIMEOUT_S, because ending processes may still write to it."""
    give_up_s = time.monotonic() + REMOVE_TIMEOUT_S
    while folder.exists() and time.monotonic() < give_up_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
    if folder.exists():
        log.warning("the folder of the local cluster could not be removed", folder=str(folder))


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raise BadSettings, naming the setting, if the port can't be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise BadSettings(setting, f"port {port} of {host} can't be used ({error.strerror}); choose another") from error
