"""Memory that runs out, in a control group of its own: the rest of the machine notices nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.machine import process_tree
from deployments.machine.memory import CGROUPS
from tests.cluster.conftest import Registry, start, stop

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

LIMIT_BYTES = 7 * 2**30
"""A local registry with one wrapper and a tiny LLM takes some 4 GiB."""

HOG = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(b"x") * int(line))
    print(flush=True)
"""


class Group:
    """A control group with a limit on memory, of version 1 or 2."""

    def __init__(self) -> None:
        first = CGROUPS / "memory"
        self._version = 1 if first.is_dir() else 2
        self.folder = (first if self._version == 1 else CGROUPS) / f"greenprompt-test-{os.getpid()}"
        self.folder.mkdir()
        limit = "memory.limit_in_bytes" if self._version == 1 else "memory.max"
        (self.folder / limit).write_text(str(LIMIT_BYTES))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this process starts meanwhile is in the group, and so is all that it starts in turn."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        names = {1: "memory", 2: ""}
        own = next(line.split(":", 2)[2] for line in lines if names[self._version] in line.split(":", 2)[1].split(","))
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.folder.parent / own.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def used_bytes(self) -> int:
        """What can't be had back by forgetting files."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(stat["rss"]) + int(stat["shmem"]) if self._version == 1 else int(stat["anon"]) + int(stat["shmem"])


@pytest.fixture
def group() -> Iterator[Group]:
    if os.getuid() != 0:
        pytest.skip("needs root, for a control group")
    group = Group()
    yield group
    for _ in range(100):  # until the kernel has let the last process go
        try:
            group.folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{group.folder} is still in use")


class Hog:
    """A process of somebody else's that takes memory."""

    def __init__(self, group: Group) -> None:
        with group.entered():
            self._process = subprocess.Popen(
                [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def take(self, count: int) -> None:
        """Take so many bytes more; returns when they are taken."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def prompt(url: str) -> httpx.Response:
    return httpx.post(f"{url}/process_prompt", json={"question": "Why?"}, timeout=60)


def in_order(registry: Registry) -> None:
    """The registry answers, and soon."""
    assert httpx.get(f"{registry.url}/healthz", timeout=10).is_success


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_that_runs_out_ends_an_engine_and_nothing_else(
    group: Group, workspace: Path, llm: Callable[..., dict[str, Any]], measurement_id: int, tmp_path: Path
) -> None:
    """Another program takes the memory up to 97 %, where nothing happens, and then all of it.

    The engine is ended by the kernel, with that reason in events and flags; registry, controller and wrapper are the
    same processes, and the registry answers throughout. While there is no memory the LLM is not started again.
    """
    with group.entered():
        registry = start(tmp_path, watch={"period_s": 0.25}, models={"local_roots": [str(workspace / "llms")]})
    hog = None
    try:
        (request_id,) = registry.post(measurement_id, llm("a"))
        address = registry.until(request_id, "deployed")["url"]
        assert prompt(address).is_success
        engines = registry.engines()
        kept = [registry.replica()]
        kept += [registry.process_named(name) for name in ("RegistryActor", "ServeController")]
        assert {Path(f"/proc/{each.pid}/oom_score_adj").read_text() for each in engines} == {"900\n"}

        hog = Hog(group)
        while group.used_bytes < 0.97 * LIMIT_BYTES:
            hog.take(16 * 2**20)
        for _ in range(10):
            in_order(registry)
            assert prompt(address).is_success
            time.sleep(0.3)
        assert process_tree.alive(engines) == set(engines)

        deadline_s = time.monotonic() + 150  # a group that is nearly full is slow
        while process_tree.alive(engines) == set(engines):
            assert time.monotonic() < deadline_s
            hog.take(4 * 2**20)
            in_order(registry)
        while "engine_out_of_memory" not in registry.get(request_id)["flags"]:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        events = httpx.get(f"{registry.url}/promptingservice/request/{request_id}/events", timeout=30).json()
        assert any("main memory ran out" in (event["reason"] or "") for event in events), events
        while registry.get(request_id)["status"] == "deploying":
            in_order(registry)
            time.sleep(0.3)
        state = registry.get(request_id)
        assert state["status"] == "failed"
        assert "of main memory, and of the machine's 7.0 GiB only" in state["reason"]
        assert process_tree.alive(kept) == set(kept)

        hog.end()
        (later,) = registry.post(measurement_id + 1, llm("a"))
        assert prompt(registry.until(later, "deployed")["url"]).is_success
        registry.delete(later)
    finally:
        if hog is not None:
            hog.end()
        stop(registry)
