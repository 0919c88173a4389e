"""A machine's part in a Ray cluster of several: ``ray start`` with the environment that the registry needs, once.

Starting again what runs already changes nothing: so ``ray up`` can be repeated, and a head that comes back lets the
machines, and the leases on them, alone.
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
from registry.errors import BadSettings, StartFailed
from registry.settings import forwarded_environment

HAPROXY_HOME = Path("/tmp/gp-haproxy")  # noqa: S108 - HAProxy allows its socket paths 97 characters
"""Where HAProxy has its files on a node."""

RECORD = Path("/tmp/gp-node.json")  # noqa: S108 - it is to go when the machine is started anew, as what it tells of
"""What was started on this machine, and how."""

RAY_LIMIT_S = 120
"""Longest ``ray start`` and ``ray stop``, seconds."""

# A machine that dies, or is cut off, is found by Ray after some 5 s in place of 65: it is asked every second, may take
# 2 s to answer, and is dead after 3 misses. Source: ray_config_def.h, health_check_*.
_FOUND_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

# How long nodes and wrappers outlive a head that is being restarted, seconds; Ray's own is 60.
_OUTLIVE_THE_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}

# Ray's autoscaler v2 takes a head of one's own for one of the machines, and leaves the last of them out (Ray 2.60).
_KNOWS_THE_HEAD = {"RAY_enable_autoscaler_v2": "0"}

# It passes on to drivers what workers print, which none of ours wants, and outlives a head that is gone for good.
_NO_LOG_MONITOR = "--include-log-monitor=false"

# What an operator sets for Ray in cluster.yaml: where the head's state is kept.
_RAYS_STORE = "RAY_REDIS_"

# The cluster launcher's: the engines on machines without GPU would have one thread each.
_NOT_OURS = ("OMP_NUM_THREADS", "PYTHONWARNINGS")


def start_ray(options: Sequence[str]) -> bool:
    """Run ``ray start`` with these options, in place of what Ray runs here; False when that is the very same already.

    One at a time on a machine: whoever comes while another does waits, some minutes at most, and then finds what runs.

    Raises:
        BadSettings: HAProxy's package is not installed, there is no token in ~/.ray/auth_token, or the autoscaling
            configuration can't be read.
        StartFailed: Ray does not start; its own words are on standard output.
    """
    # A launcher that has lost the connection tries again, while what it began here goes on: there would be two raylets.
    with RECORD.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _start_ray(_for_the_monitor(options))


def _start_ray(options: Sequence[str]) -> bool:
    environment = node_environment()
    told = {name: value for name, value in os.environ.items() if name.startswith(_RAYS_STORE)} | forwarded_environment()
    started_with = [item for item in sorted((told | environment).items()) if item[0] not in _NOT_OURS]
    wanted = hashlib.sha256(json.dumps([_code(), started_with, *options]).encode()).hexdigest()
    running = _ray_processes()
    if running and _record() == {"wanted": wanted, "running": running}:
        return False
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for Ray's processes, which inherit it
    for command in (["stop"], ["start", _NO_LOG_MONITOR, *options]):
        try:
            done = subprocess.run(
                [Path(sys.executable).with_name("ray"), *command],
                env={name: value for name, value in os.environ.items() if name not in _NOT_OURS} | environment,
                timeout=RAY_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StartFailed(f"ray {command[0]} was not over after {RAY_LIMIT_S} s") from error
        if done.returncode:
            raise StartFailed(f"ray {command[0]} ended with {done.returncode}")
    RECORD.write_text(json.dumps({"wanted": wanted, "running": _ray_processes()}), encoding="utf-8")
    return True


def node_environment() -> dict[str, str]:
    """What Ray's processes on a node need; HAProxy's files are written. Raises BadSettings."""
    if not (Path.home() / ".ray" / "auth_token").exists():
        raise BadSettings("~/.ray/auth_token", "is missing; `ray get-auth-token --generate` makes one for all nodes")
    return {
        **RAY_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",  # Ray's ports run code for whoever reaches them
        **_FOUND_SOON,
        **_OUTLIVE_THE_HEAD,
        **_KNOWS_THE_HEAD,
        **haproxy_environment(HAPROXY_HOME),
    }


def _for_the_monitor(options: Sequence[str]) -> Sequence[str]:
    """On the head: with a configuration by which no machine is given up."""
    if not any(option.startswith("--autoscaling-config") for option in options):
        return options
    from deployments.launch.launcher import with_machines  # which imports Ray

    return with_machines(options)


def _code() -> str:
    """A hash of our own code, which the wrappers of a node run."""
    digest = hashlib.sha256()
    for package in (registry, deployments):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _ray_processes() -> list[list[object]]:
    """Name, pid and start of what a node can't do without."""
    needed = (process for process in psutil.process_iter(["name"]) if process.info["name"] in ("gcs_server", "raylet"))
    return sorted([process.info["name"], process.pid, process.create_time()] for process in needed)


def _record() -> object:
    try:
        return json.loads(RECORD.read_bytes())
    except (FileNotFoundError, ValueError):  # none, or cut short by a crash: as good as none
        return None
