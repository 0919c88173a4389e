"""What a local start needs of this machine, checked before anything is started.

Each check raises an error of one line that names what is wrong and what to do.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

import psutil

from deployments.launch.local_ray import free_ports, require_free_port
from registry.errors import BadSettings
from registry.settings import Settings, url_host
from registry.wire.http import LOOPBACK

HAPROXY_OPEN_FILES = 10_276
"""Files that HAProxy opens at most with the configuration that Serve writes (``maxconn 4096``); it refuses to start
where it may not. Seen with HAProxy 2.8 and Ray 2.60."""

LEAST_FREE_BYTES = 64 * 2**20
"""Free space without which the database, Ray's session and logs can't be written for long."""

DASHBOARD_PORT = 8265
"""Ray's own choice for its dashboard."""


def require_open_files(needed: int = HAPROXY_OPEN_FILES) -> None:
    """Let this process, and those it starts, open as many files as the system allows.

    Raises:
        BadSettings: that is fewer than ``needed``.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < needed:
        raise BadSettings(
            "ulimit -n",
            f"at most {most} open files are allowed, HAProxy needs {needed}: raise the hard limit (ulimit -Hn as root, "
            "LimitNOFILE= of a systemd unit), or do without it (http.haproxy: false)",
        )


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder, and try to write into it.

    Raises:
        BadSettings: it can't be made or written, or its disk is full; names the setting.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise BadSettings(setting, f"{folder} can't be written ({error.strerror})") from error
    if (full := disk_problem(folder)) is not None:
        raise BadSettings(setting, full)


def disk_problem(folder: Path) -> str | None:
    """What is wrong with the disk of a folder, None if there is enough space on it."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} can't be read ({error.strerror})"
    return None if free >= LEAST_FREE_BYTES else f"the disk of {folder} is full ({free / 2**20:.0f} MiB are free)"


def dashboard_port(settings: Settings) -> int:
    """The port of a local cluster's dashboard: the configured one, else Ray's own, else a free one.

    Raises:
        BadSettings: the configured one can't be used.
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
    """Have programs reach this machine and these hosts directly, whatever proxy the environment names.

    Adds them to NO_PROXY and no_proxy; some programs read the one, some the other.
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
    """Check what a local start needs, and set what its processes inherit. Raises BadSettings."""
    for folder, setting in ((settings.state_dir, "state_dir"), (settings.cache_dir, "cache_dir")):
        require_writable(folder, setting)
    require_writable(Path("/tmp"), "/tmp")  # noqa: S108 - where Ray's sockets are short enough
    if settings.http.haproxy:
        require_open_files()
    without_proxies(os.environ, settings.http.host)
