"""What another user of the machine can read, write or connect to while a local registry runs, and where secrets are.

See "Local users" in SECURITY.md.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.launch.local_ray import HAPROXY_FOLDER, TEMPORARY
from deployments.machine.worker_environment import FILE_NAME
from deployments.serve.ray_folder import RAY_FOLDER
from tests.cluster.conftest import HAPROXY_FILES, SECRETS, Registry, search_for_secrets

pytestmark = pytest.mark.cluster

OTHERS = stat.S_IRWXG | stat.S_IRWXO

OPEN_INSIDE = {
    RAY_FOLDER: "Ray opens its own folder to all users, on purpose",
    "ray-logs": "copies of the folders of Ray that have ended, as open as they were",
    TEMPORARY: "libraries make temporary files as the umask says",
    HAPROXY_FOLDER: "Serve adds files as the umask says; those that we write are closed, see test_haproxy.py",
}
"""Folders of a local cluster with files of others, and why these may be open; only its owner enters the one above."""


def cluster_folder(registry: Registry) -> Path:
    """The folder of the local cluster, in /tmp."""
    return Path(json.loads((registry.folder / "state" / "up.json").read_text())["folder"])


def open_below(folder: Path) -> Iterator[str]:
    """What has a mode for others, or another owner, in a folder. Files may go meanwhile."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.lstat()
            is_ours = found.st_uid == os.geteuid() and (stat.S_ISLNK(found.st_mode) or not found.st_mode & OTHERS)
            if not is_ours and path.name != RAY_FOLDER:
                yield f"{stat.filemode(found.st_mode)} {found.st_uid} {path}"
            if stat.S_ISDIR(found.st_mode) and path.name not in OPEN_INSIDE:
                yield from open_below(path)


def reachable(path: Path) -> bool:
    """Whether a stranger can enter all folders above a file, and read or write it."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents) and bool(
        path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)
    )


def used(processes: list[psutil.Process]) -> Iterator[tuple[str, Path]]:
    """The processes' Unix sockets, and the files that they have open for writing or share in memory, by process."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            for connection in process.net_connections("unix"):
                if connection.laddr:
                    yield process.name(), Path(str(connection.laddr))
            for file in process.open_files():
                if file.mode != "r":
                    yield process.name(), Path(file.path)
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                _, mode, _, _, _, *path = line.split(maxsplit=5)
                if mode[1] == "w" and mode[3] == "s" and path and path[0].startswith("/"):
                    yield process.name(), Path(path[0])


def test_nothing_of_ours_is_open_to_other_users(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """With an LLM deployed, no file, folder or socket of the registry has a mode for others, or can be reached."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    folder = cluster_folder(registry)
    roots = [folder, registry.folder / "state", registry.folder / "cache"]
    assert [stat.S_IMODE(root.stat().st_mode) for root in roots] == [0o700] * 3
    assert [line for root in roots[:2] for line in open_below(root)] == []
    sockets = list((folder / HAPROXY_FOLDER).rglob("admin.sock"))
    assert [stat.S_IMODE(each.stat().st_mode) for each in sockets] == [0o600]
    seen = sorted(set(used(registry.processes())))
    assert any("plasma" in str(path) for _, path in seen), seen
    assert [each for each in seen if not each[1].is_absolute()] == []  # an abstract socket has no mode
    assert [each for each in seen if each[1].exists() and reachable(each[1])] == []


def test_secrets_are_where_they_are_needed_only(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """With an LLM deployed, secrets are seen nowhere. A hub token and a proxy's password reach engines."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    search = search_for_secrets(registry)
    assert search.found == []
    of_haproxy = [path for path in (cluster_folder(registry) / HAPROXY_FOLDER).rglob("*") if path.name in HAPROXY_FILES]
    assert {path.name for path in of_haproxy} == set(HAPROXY_FILES)
    assert [path for path in of_haproxy if path.stat().st_mode & OTHERS] == []
    secrets_file = (registry.folder / "state" / FILE_NAME).read_bytes()
    assert search.kinds_in(secrets_file) == set(SECRETS)
    forkservers = [child for child in registry.replica().children() if "forkserver" in " ".join(child.cmdline())]
    assert forkservers
    assert registry.engines()  # forks of the forkserver
    for each in forkservers:
        assert search.kinds_in(Path(f"/proc/{each.pid}/environ").read_bytes()) == set(SECRETS)
