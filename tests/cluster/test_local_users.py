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

import httpx
import psutil
import pytest

from deployments.launch.local_ray import ACCESS_FILE, HAPROXY_FOLDER, TEMPORARY
from deployments.machine.cluster_token import proxy_secret
from deployments.machine.worker_environment import FILE_NAME
from deployments.serve.ray_folder import RAY_FOLDER
from tests.cluster.conftest import SECRETS, Registry

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


def environment_of(process: psutil.Process) -> str:
    """The environment that a process was started with, as its user and root can read it."""
    with suppress(psutil.NoSuchProcess, OSError):
        return Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    return ""


def test_secrets_are_where_they_are_needed_only(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """A hub token and a proxy's password reach engines, and are in no log, command line, state or other environment."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    values = [SECRETS["HF_TOKEN"], SECRETS["HTTPS_PROXY"].partition("me:")[2].partition("@")[0]]

    def known(text: str) -> bool:
        return any(value in text for value in values)

    folder = cluster_folder(registry)
    token = (registry.folder / "state" / ACCESS_FILE).read_text()
    files = [path for root in (folder, registry.folder) for path in root.rglob("*") if path.is_file()]
    with_secrets = {path for path in files if known(path.read_text(encoding="utf-8", errors="replace"))}
    assert with_secrets == {registry.folder / "state" / FILE_NAME}
    logs = [path for path in files if path.is_relative_to(folder / RAY_FOLDER) or path.suffix in (".log", ".jsonl")]
    assert len(logs) > 10
    assert [path for path in logs if token in path.read_text(encoding="utf-8", errors="replace")] == []
    to_replicas = proxy_secret(registry.folder / "state" / ACCESS_FILE)
    with_it = [path for path in files if to_replicas in path.read_text(encoding="utf-8", errors="replace")]
    assert {path.name for path in with_it} == {"changes.sed", "haproxy.cfg"}
    assert all(path.is_relative_to(folder / HAPROXY_FOLDER) and not path.stat().st_mode & OTHERS for path in with_it)

    processes = registry.processes()
    assert not [each for each in processes if to_replicas in environment_of(each)]
    commands = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if known(command) or to_replicas in command]
    # The operator's shell gave them to `up` and its fork, which starts Ray; engines may have to ask the hub.
    replica = registry.replica()
    (fork,) = psutil.Process(registry.process.pid).children()
    allowed = {registry.process.pid, fork.pid, *(child.pid for child in replica.children(recursive=True))}
    informed = {each.pid for each in processes if known(environment_of(each))}
    assert [psutil.Process(pid).cmdline() for pid in informed - allowed] == []
    assert {engine.pid for engine in registry.engines()} & allowed
    assert all(child.pid in informed for child in replica.children() if "forkserver" in " ".join(child.cmdline()))

    dashboard = json.loads((registry.folder / "state" / "up.json").read_text())["dashboard"]
    for path in ("/api/v0/actors?detail=1", "/api/v0/jobs?detail=1", "/api/v0/workers?detail=1",
                 "/api/v0/runtime_envs?detail=1", "/api/serve/applications/"):  # fmt: skip
        answer = httpx.get(f"{dashboard}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30)
        assert answer.status_code == 200, (path, answer.text)
        assert not known(answer.text), path
        assert to_replicas not in answer.text, path
