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
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

import deployments
import registry
from deployments.launch import keeper, ray_commands, up_again
from deployments.launch.access_token import require_own_token
from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import HAPROXY_FOLDER, RAY_ENVIRONMENT, TEMPORARY
from deployments.launch.ray_commands import RayStart
from deployments.launch.ray_tls import quiet, require_tls_files, tls_digest
from deployments.machine.cluster_token import proxy_secret, token_path
from deployments.machine.private_files import open_private, private_folder
from deployments.machine.worker_environment import forwarded_environment, hide_secrets, secret_environment
from deployments.serve.ray_folder import RAY_FOLDER
from registry.errors import BadSettings

log = structlog.get_logger("deployments.launch.node")

BASE = Path("/tmp")  # noqa: S108 - vanishes at a reboot, as Ray's processes do; socket paths must be short
"""Where a node's folder is made."""

# Ray detects a machine that died or was cut off after about 5 s instead of 65: it is checked every second, has 2 s to
# answer, and counts as dead after 3 failures. Source: ray_config_def.h, health_check_*.
_FOUND_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

# D51: long enough for a restart of Redis, too
# How long nodes and wrappers survive while the head restarts, seconds; Ray's default is 60.
_OUTLIVE_THE_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}

# Ray's autoscaler v2 counts an on-premise head as one of the machines, and then omits the last machine (Ray 2.60).
_KNOWS_THE_HEAD = {"RAY_enable_autoscaler_v2": "0"}

# Prefixes of the variables that an operator sets for Ray in cluster.yaml: where the head's state is stored, and TLS.
_FOR_RAY = ("RAY_REDIS_", "RAY_USE_TLS", "RAY_TLS_")

# Set by the cluster launcher; with them, engines on machines without GPU would have one thread each.
_NOT_OURS = ("OMP_NUM_THREADS", "PYTHONWARNINGS")


def start_ray(options: Sequence[str]) -> bool:
    """Run ``ray start`` with these options, after stopping any running Ray.

    Returns False, without effect, if Ray already runs with the same options, environment and code.
    Blocks until an earlier call on this machine has ended, and then up to 2 * RAY_LIMIT_S. On the head, a process stays
    that starts Ray again if it dies (deployments.launch.keeper).

    Raises:
        BadSettings: HAProxy's package is not installed or does not fit this version of Ray, the access token is
            missing or open to others, the files of Ray's TLS can't be used, the node's folder is not this user's
            alone, or the autoscaling configuration can't be read, or secrets can't be written.
        StartFailed: Ray does not start; its own message is on standard output.
    """
    # If a launcher loses its connection, it retries while its first command still runs here: without the lock there
    # would be two raylets.
    folder = node_folder()
    with open_private(folder / keeper.NODE_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _start_ray(_in_own_folder(folder, _for_the_monitor(options)), folder)


# D130: a folder of our own
def node_folder() -> Path:
    """Create the folder of this user's files on this machine, which only this user can enter.

    Raises:
        BadSettings: It exists, and belongs to another user or is open to others.
    """
    return private_folder(_node_folder())


def head_is_kept() -> bool:
    """Whether this machine has a head that is started again if it dies. Creates nothing."""
    return keeper.is_running(_node_folder())


def _node_folder() -> Path:
    return BASE / f"gp-{os.geteuid()}"


def secrets_file() -> Path:
    """Return the file for this machine's secrets. It is named after the machine, because machines may share a home.

    It is not in the node's folder: many systems remove files of ``/tmp`` that are older than ten days.
    """
    return Path.home() / ".greenprompt" / f"secrets-{socket.gethostname()}.json"


def _in_own_folder(folder: Path, options: Sequence[str]) -> Sequence[str]:
    """Put Ray's files below the node's folder, unless the operator has chosen a folder with ``--temp-dir``.

    Ray opens its own folder to all users: they could run code through its socket, and read its logs.
    """
    if any(option.startswith("--temp-dir") for option in options):
        return options
    return [*options, f"--temp-dir={folder / RAY_FOLDER}"]


def _start_ray(options: Sequence[str], folder: Path) -> bool:
    environment = node_environment(folder)
    told = {name: value for name, value in os.environ.items() if name.startswith(_FOR_RAY)} | forwarded_environment()
    told |= secret_environment(os.environ)
    started_with = [item for item in sorted((told | environment).items()) if item[0] not in _NOT_OURS]
    # With another token, Ray's new processes could not join the old ones, and replicas would refuse HAProxy's requests.
    what = [_code(), proxy_secret(token_path()), started_with, *options, tls_digest(os.environ)]
    wanted = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    is_head = "--head" in options
    # D35: a node is started once
    if ray_commands.is_running(folder, wanted):
        if is_head and not keeper.is_running(folder):
            log.warning("Ray runs, but is not started again if it dies: run `ray stop`, and start it again")
        return False
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS} | environment
    file = secrets_file()
    try:
        hide_secrets(file, environment)
    except OSError as error:
        raise BadSettings(str(file), f"secrets can't be written ({error.strerror})") from error
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # inherited by Ray's processes
    keeper.end(folder)
    start = RayStart(str(Path(sys.executable).with_name("ray")), list(options), environment, wanted)
    if is_head:
        up_again.forget()  # the registry of the Ray that is stopped now
        keeper.launch(folder, start)
    else:
        start.run(folder)
    return True


def node_environment(folder: Path) -> dict[str, str]:
    """Return the environment of Ray's processes on a node; writes HAProxy's files to its folder. Raises BadSettings."""
    require_own_token()
    require_tls_files(os.environ)
    temporary = private_folder(folder / TEMPORARY)
    return {
        **({} if "TMPDIR" in os.environ else {"TMPDIR": str(temporary)}),
        # Where Ray's launcher keeps its list of machines. Ray's monitor, `ray up` and this code must use the same list.
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or str(BASE),
        **RAY_ENVIRONMENT,
        **quiet(os.environ),
        "RAY_AUTH_MODE": "token",  # Ray's ports run code for anyone who can reach them
        **_FOUND_SOON,
        **_OUTLIVE_THE_HEAD,
        **_KNOWS_THE_HEAD,
        **haproxy_environment(folder / HAPROXY_FOLDER, proxy_secret(token_path())),
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
