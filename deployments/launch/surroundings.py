"""Checks what a local start needs of this machine, before anything is started.

Each check raises a one-line error that names the problem and the remedy.
"""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

import psutil

from deployments.launch.local_ray import free_ports, require_free_port
from deployments.machine.disk import disk_problem
from deployments.machine.private_files import require_unchanged_by_others
from deployments.machine.second_user import home_of, require_usable, second_user
from registry.errors import BadSettings
from registry.settings import Settings, url_host
from registry.wire.http import LOOPBACK

HAPROXY_OPEN_FILES = 10_276
"""The most files that HAProxy opens with Serve's configuration (``maxconn 4096``).

HAProxy refuses to start if its limit is lower. Measured with HAProxy 2.8 and Ray 2.60.
"""

DASHBOARD_PORT = 8265
"""Ray's default port for its dashboard."""


def require_open_files(needed: int = HAPROXY_OPEN_FILES) -> None:
    """Raise the limit of open files for this process and its children to the system's maximum.

    Raises:
        BadSettings: The maximum is less than ``needed``.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < needed:
        raise BadSettings(
            "ulimit -n",
            f"at most {most} open files are allowed, HAProxy needs {needed}: raise the hard limit (ulimit -Hn as root, "
            "LimitNOFILE= of a systemd unit), or run without HAProxy (http.haproxy: false)",
        )


def require_writable(folder: Path, setting: str, mode: int = 0o700) -> None:
    """Create a folder with this mode, unless it exists, and test that it can be written.

    Raises:
        BadSettings: It can't be created or written, or its disk is full; names the setting.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise BadSettings(setting, f"{folder} can't be written ({error.strerror})") from error
    if (full := disk_problem(folder)) is not None:
        raise BadSettings(setting, full)


def dashboard_port(settings: Settings) -> int:
    """Return the port of a local cluster's dashboard: the configured one, else Ray's default, else a free one.

    Raises:
        BadSettings: The configured one can't be used.
    """
    wanted = settings.ray.dashboard_port
    if wanted is not None:
        require_free_port("127.0.0.1", wanted, "ray.dashboard_port")
        return wanted
    try:
        require_free_port("127.0.0.1", DASHBOARD_PORT, "ray.dashboard_port")
    except BadSettings:
        return free_ports(1)[0]
    return DASHBOARD_PORT


def without_proxies(environment: MutableMapping[str, str], *hosts: str) -> None:
    """Make programs connect to this machine and these hosts directly, whatever proxy the environment names.

    Adds them to both NO_PROXY and no_proxy, because some programs read only one of them.
    """
    own = [*LOOPBACK, socket.gethostname(), *_own_addresses(), *map(url_host, hosts)]
    said = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    names = dict.fromkeys(name.strip() for name in ",".join([*said, *own]).split(",") if name.strip())
    environment["NO_PROXY"] = environment["no_proxy"] = ",".join(names)


def _own_addresses() -> list[str]:
    addresses = (address for interface in psutil.net_if_addrs().values() for address in interface)
    families = (socket.AF_INET, socket.AF_INET6)
    return [address.address.partition("%")[0] for address in addresses if address.family in families]


def check(settings: Settings) -> None:
    """Check what a local start needs. Raise the limit of open files, and set NO_PROXY, for its processes.

    Raises:
        BadSettings: A folder or a limit does not allow the start, every user can write to a folder, or engines can't
            run as the user of ``wrappers.run_as``.
    """
    user = None if settings.wrappers.run_as is None else second_user(settings.wrappers.run_as)
    require_writable(settings.state_dir, "state_dir")
    require_writable(settings.cache_dir, "cache_dir", 0o700 if user is None else 0o711)  # it has a folder of that user
    for folder, setting in ((settings.state_dir, "state_dir"), (settings.cache_dir, "cache_dir")):
        require_unchanged_by_others(folder, setting)
    if user is not None:
        require_usable(user, home_of(user, settings.cache_dir))
    require_writable(Path("/tmp"), "/tmp")  # noqa: S108 - Ray's socket paths must be short
    if settings.http.haproxy:
        require_open_files()
    without_proxies(os.environ, settings.http.host)
