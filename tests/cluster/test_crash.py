"""What is left of a registry whose machine or actor stops, or which ends: requests in order, leases, nothing else.

One registry is started, crashes, and is started again in the same ``state_dir``, with leases of a few seconds from then
on. The next tests use what came back. The last test stops it with SIGTERM, and starts it again in a shell with unusual
variables and limits. The name of the folder has spaces and special characters.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.machine import process_tree
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.cluster.conftest import Ran, Registry, assert_no_secret_left, search_for_secrets, start, stop
from tests.cluster.spoiled_shell import ODD_FOLDER, all_at_once, detached

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

LEASE_S = 6.0
SHORT_LEASES = {"max_s": LEASE_S, "at_expiry": "finish"}


@dataclass
class Crash:
    """A registry before and after a crash of its machine.

    ``before``, ``configured``: what each request was, and the LLMs that ran before anybody asked. ``ran``: what it ran.
    ``temporary``: TMPDIR of both. ``traces``: what was in places that others use, before the first start.
    """

    before: dict[str, dict[str, Any]]
    configured: list[dict[str, Any]]
    ran: Ran
    registry: Registry
    temporary: Path
    traces: set[str]

    @property
    def holder(self) -> dict[str, Any]:
        """The request that held the LLM."""
        (holder,) = [state for state in self.before.values() if state["status"] == "deployed"]
        return holder

    @property
    def queue(self) -> list[str]:
        """The requests that waited, in their order."""
        waiting = [state for state in self.before.values() if state["status"] == "queued"]
        return [state["requestId"] for state in sorted(waiting, key=lambda state: state["position"])]


def prompt(address: str) -> httpx.Response:
    """The answer to a short prompt."""
    return httpx.post(f"{address}/process_prompt", json={"question": "Are you there?"}, timeout=60)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The one LLM that is asked for here; its folder is the registry's."""
    folder = tmp_path_factory.mktemp("crash") / ODD_FOLDER
    return {
        "modeltyp": "text-generation",
        "model": str(make_tiny_llm(folder / "llms" / "a", seed=0)),
        "uses_chat_template": False,
        "args": {"prompting": {"max_new_tokens": 4}, "deployment": {"enforce_eager": True}},
    }


def traces() -> set[str]:
    """What Ray, HAProxy, torch and vLLM could leave behind in places that others use, too."""
    patterns = ("tmp/ray*", "tmp/haproxy*", "tmp/torch*", "tmp/vllm*", "dev/shm/plasma*", "dev/shm/torch*")
    return {str(path) for pattern in patterns for path in Path("/").glob(pattern)}


def until_ready(registry: Registry) -> list[dict[str, Any]]:
    """The LLMs of a registry, once the first is ready; fails after 60 s."""
    deadline_s = time.monotonic() + 60
    while True:
        llms: list[dict[str, Any]] = httpx.get(f"{registry.url}/llms", timeout=60).json()
        if llms and llms[0]["status"] == "ready":
            return llms
        assert time.monotonic() < deadline_s, llms
        time.sleep(0.2)


@pytest.fixture(scope="module")
def crash(llm: dict[str, Any]) -> Iterator[Crash]:
    """A registry with a lease and a queue, all of whose processes were killed, and its successor."""
    folder = Path(llm["model"]).parents[1]
    traces_before = traces()
    temporary = folder / "tmp"
    temporary.mkdir()
    variables = {"TMPDIR": str(temporary)}
    first = start(folder, variables, deploy=[{"machine": "*", "llm": llm}])
    try:
        configured = until_ready(first)
        (holder,) = first.post(1, llm)
        first.until(holder, "deployed")
        first.post(2, llm, tenant="a")
        first.post(3, llm, llm, tenant="a")
        first.post(4, llm, tenant="b")
        first.post(5, llm, tenant="b", priority="high")
        before = {request_id: first.get(request_id) for request_id in first.posted}
        ran = Ran(first)
    finally:
        process_tree.kill(first.processes())
        first.process.wait()
    second = start(folder, variables, leases=SHORT_LEASES)
    try:
        yield Crash(before, configured, ran, second, temporary, traces_before)
    finally:
        stop(second)


@pytest.fixture
def registry(crash: Crash) -> Iterator[Registry]:
    """The registry that came back, without the requests of the test before."""
    yield crash.registry
    for request_id in crash.registry.posted:
        crash.registry.delete(request_id)
    crash.registry.posted.clear()


def test_a_configured_llm_runs_before_anybody_asks(crash: Crash, llm: dict[str, Any]) -> None:
    """The LLMs of the configuration are deployed when the registry starts."""
    assert [each["model"] for each in crash.configured] == [llm["model"]]


def test_requests_outlive_a_crash_of_the_machine(crash: Crash) -> None:
    """The same ids answer: the lease has failed and says why, the others are served in the order they had."""
    registry = crash.registry
    assert [crash.before[request_id]["position"] for request_id in crash.queue] == [1, 2, 3, 4, 5]
    lost = registry.get(crash.holder["requestId"])
    assert (lost["status"], lost["url"]) == ("failed", None)
    assert "was lost" in lost["reason"]
    for n, request_id in enumerate(crash.queue):
        behind = [registry.get(each) for each in crash.queue[n + 1 :]]
        assert [(state["status"], state["position"]) for state in behind] == [
            ("queued", place) for place in range(1, len(behind) + 1)
        ]
        state = registry.until(request_id, "deployed")
        assert state["createdAt"] == crash.before[request_id]["createdAt"]
        assert prompt(state["url"]).status_code == 200
        assert registry.delete(request_id) == 204
    refused = httpx.get(f"{crash.holder['url']}/get_status", timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (403, "no_such_lease")


def test_nothing_is_left_of_a_crash(crash: Crash) -> None:
    """Nothing of what crashed runs on beside its successor, or takes room on its machine."""
    assert crash.ran.left() == []


@contextlib.contextmanager
def standing_still(process: psutil.Process) -> Iterator[None]:
    """A process is stopped for the length of the block."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@dataclass
class Holder:
    """Prompts at an address, one after the other, until it is refused; ``late`` came after ``over`` was set."""

    address: str
    model: str
    over: threading.Event
    good: int = 0
    late: int = 0

    def run(self, tokens: int) -> httpx.Response:
        """The refusal of a prompt; those before are whole answers of so many tokens."""
        body = {"model": self.model, "prompt": "Tell me", "max_tokens": tokens, "ignore_eos": True}
        while (answer := httpx.post(f"{self.address}/v1/completions", json=body, timeout=60)).status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == tokens
            self.good += 1
            self.late += self.over.is_set()
        return answer


def until_refused(address: str) -> httpx.Response:
    """The first answer of an address that is not 200."""
    while (answer := httpx.get(f"{address}/get_status", timeout=60)).status_code == 200:
        pass
    return answer


def test_an_expired_lease_is_refused_with_the_registry_stopped(registry: Registry, llm: dict[str, Any]) -> None:
    """The wrapper ends a lease by itself: prompts that had begun are finished, others answered 410 with the reason."""
    holder, after = registry.post(11, llm, llm)
    address = registry.until(holder, "deployed")["url"]
    over = threading.Event()
    holders = [Holder(address, llm["model"], over) for _ in range(3)]
    with standing_still(registry.process_named("ray::RegistryActor")), ThreadPoolExecutor() as threads:
        # Of different lengths, so that some are in flight at any moment.
        running = [threads.submit(each.run, tokens) for each, tokens in zip(holders, (310, 430, 570), strict=True)]
        refusals = [until_refused(address)]
        over.set()
        refusals += [each.result() for each in running]
    errors = [answer.json().get("error", answer.json()) for answer in refusals]  # below /v1 in OpenAI's shape
    assert {answer.status_code for answer in refusals} == {410}
    assert {error["code"] for error in errors} == {"lease_ended"}
    assert all("expired" in error["message"] for error in errors)
    assert all(each.good for each in holders)
    assert any(each.late for each in holders)

    assert registry.until(holder, "expired")["reason"] == "its lease reached its deadline"
    assert registry.until(after, "deployed")["url"] != address
    assert prompt(address).status_code == 410


def test_a_lease_expires_while_the_registry_restarts(registry: Registry, llm: dict[str, Any]) -> None:
    """The actor is killed under a lease: the lease ends when it should, and the next in line has its turn."""
    holder, after = registry.post(12, llm, llm)
    address = registry.until(holder, "deployed")["url"]
    registry.process_named("ray::RegistryActor").kill()
    assert prompt(address).status_code == 200
    refusal = until_refused(address)
    assert refusal.status_code == 410
    assert "expired" in refusal.json()["message"]
    assert registry.until(holder, "expired")["endedAt"] is not None
    registry.until(after, "deployed")


def test_it_ends_without_a_trace_and_goes_on_in_a_spoiled_shell(crash: Crash, llm: dict[str, Any]) -> None:
    """SIGTERM leaves no process, port or file, and no secret was seen. The next start has the same requests.

    It runs in the background, in a shell whose variables name proxies, certificates and a locale that do not exist, and
    whose limits are low.
    """
    registry = crash.registry
    folder = Path(json.loads((registry.folder / "state" / "up.json").read_text(encoding="utf-8"))["folder"])
    assert folder.is_dir()
    search = search_for_secrets(registry)  # takes longer than a lease
    processes = registry.processes()
    holder, waiting = registry.post(21, llm, llm)
    registry.until(holder, "deployed")
    stop(registry)
    assert registry.process.returncode == 0
    assert_no_secret_left(registry, search)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    port = int(registry.url.rsplit(":", 1)[1])
    socket.create_server(("127.0.0.1", port)).close()
    assert not folder.exists()
    assert list(crash.temporary.iterdir()) == []
    assert traces() <= crash.traces

    config = yaml.safe_load((registry.folder / "config.yaml").read_text(encoding="utf-8"))
    del config["leases"]  # the next lease is not over before it is seen
    with detached(registry.folder, all_at_once(yaml.safe_dump(config)), port):
        ended = registry.get(holder)
        assert (ended["status"], ended["reason"]) == ("expired", "the registry was shut down")
        registry.until(waiting, "deployed")
        assert registry.delete(waiting) == 204
