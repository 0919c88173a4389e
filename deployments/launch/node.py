"""Makes a machine a node of a Ray cluster: runs ``ray start`` once, with the environment that the registry needs.

Repeating it changes nothing if Ray already runs with the same options and environment and the same
version of our code. So ``ray up`` can be repeated, and a restarted head does not restart Ray on the
machines, which would end their leases.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

import deployments
import registry
from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import RAY_ENVIRONMENT
from deployments.machine.worker_environment import forwarded_environment
from registry.errors import BadSettings, StartFailed

HAPROXY_HOME = Path("/tmp/gp-haproxy")  # noqa: S108 - HAProxy's socket paths have at most 97 characters
"""Folder of HAProxy's files on a node."""

RECORD = Path("/tmp/gp-node.json")  # noqa: S108 - must vanish at a reboot, as the processes that it describes
"""File that records the Ray processes of this machine, and a hash of what they were started with."""

RAY_LIMIT_S = 120
"""Time limit of ``ray start`` and ``ray stop``, seconds."""

# Ray detects a machine that died or was cut off after about 5 s instead of 65: it is checked every second, has 2 s to
# answer, and counts as dead after 3 failures. Source: ray_config_def.h, health_check_*.
_FOUND_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

# D51: also while Redis restarts
# How long nodes and wrappers survive while the head restarts, seconds; Ray's default is 60.
_OUTLIVE_THE_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}

# Ray's autoscaler v2 counts an on-premise head as one of the machines, and then omits the last machine (Ray 2.60).
_KNOWS_THE_HEAD = {"RAY_enable_autoscaler_v2": "0"}

# We don't need the log monitor, which forwards workers' output to drivers. It does not end if the head is lost.
_NO_LOG_MONITOR = "--include-log-monitor=false"

# Prefix of the variables that an operator sets for Ray in cluster.yaml: where the head's state is stored.
_RAYS_STORE = "RAY_REDIS_"

# Set by the cluster launcher; with them, engines on machines without GPU would have one thread each.
_NOT_OURS = ("OMP_NUM_THREADS", "PYTHONWARNINGS")


def start_ray(options: Sequence[str]) -> bool:
    """Run ``ray start`` with these options, after stopping any running Ray.

    Returns False, without effect, if Ray already runs with the same options, environment and code.
    Blocks up to 2 * RAY_LIMIT_S, and before that for an earlier call on this machine.

    Raises:
        BadSettings: HAProxy's package is not installed or does not fit this version of Ray,
            ~/.ray/auth_token is missing, or the autoscaling configuration can't be read.
        StartFailed: Ray does not start; its own message is on standard output.
    """
    # If a launcher loses its connection, it retries while its first command still runs here: without the lock there
    # would be two raylets.
    with RECORD.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _start_ray(_for_the_monitor(options))


def _start_ray(options: Sequence[str]) -> bool:
    environment = node_environment()
    told = {name: value for name, value in os.environ.items() if name.startswith(_RAYS_STORE)} | forwarded_environment()
    started_with = [item for item in sorted((told | environment).items()) if item[0] not in _NOT_OURS]
    wanted = hashlib.sha256(json.dumps([_code(), started_with, *options]).encode()).hexdigest()
    running = _ray_processes()
    # D35: a node is started once
    if running and _record() == {"wanted": wanted, "running": running}:
        return False
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # inherited by Ray's processes
    for command in (["stop"], ["start", _NO_LOG_MONITOR, *options]):
        try:
            done = subprocess.run(
                [Path(sys.executable).with_name("ray"), *command],
                env={name: value for name, value in os.environ.items() if name not in _NOT_OURS} | environment,
                timeout=RAY_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StartFailed(f"ray {command[0]} was not done after {RAY_LIMIT_S} s") from error
        if done.returncode:
            raise StartFailed(f"ray {command[0]} ended with {done.returncode}")
    RECORD.write_text(json.dumps({"wanted": wanted, "running": _ray_processes()}), encoding="utf-8")
    return True


def node_environment() -> dict[str, str]:
    """Return the environment of Ray's processes on a node; writes HAProxy's files. Raises BadSettings."""
    if not (Path.home() / ".ray" / "auth_token").exists():
        raise BadSettings(
            "~/.ray/auth_token", "is missing; create one for all nodes with `ray get-auth-token --generate`"
        )
    return {
        **RAY_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",  # Ray's ports run code for anyone who can reach them
        **_FOUND_SOON,
        **_OUTLIVE_THE_HEAD,
        **_KNOWS_THE_HEAD,
        **haproxy_environment(HAPROXY_HOME),
    }


def _for_the_monitor(options: Sequence[str]) -> Sequence[str]:
    """On the head, replace the autoscaling configuration by one that tries failed machines without limit."""
    if not any(option.startswith("--autoscaling-config") for option in options):
        return options
    from deployments.launch.launcher import with_machines  # late, because it imports Ray

    return with_machines(options)


def _code() -> str:
    """Return a hash of our own code, which the wrappers of a node run."""
    digest = hashlib.sha256()
    for package in (registry, deployments):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _ray_processes() -> list[list[object]]:
    """Return name, pid and start time of the processes that a node needs."""
    needed = (process for process in psutil.process_iter(["name"]) if process.info["name"] in ("gcs_server", "raylet"))
    return sorted([process.info["name"], process.pid, process.create_time()] for process in needed)


def _record() -> object:
    try:
        return json.loads(RECORD.read_bytes())
    except (FileNotFoundError, ValueError):  # missing, or truncated by a crash: treat as missing
        return None
