"""What is left of a registry when its machine, its owner or its actor stops: requests in order, leases, nothing else.

One registry is started, crashes, and is started again in the same ``state_dir``, with leases of a few seconds from then
on; the tests after the first one use what came back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.machine import process_tree
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.cluster.conftest import Ran, Registry, start, stop_and_search

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

LEASE_S = 6.0
SHORT_LEASES = {"max_s": LEASE_S, "at_expiry": "finish"}


@dataclass
class Crash:
    """A registry before and after a crash of its machine: what each request was, and what ran."""

    before: dict[str, dict[str, Any]]
    ran: Ran
    registry: Registry

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
    folder = tmp_path_factory.mktemp("crash")
    return {
        "modeltyp": "text-generation",
        "model": str(make_tiny_llm(folder / "llms" / "a", seed=0)),
        "uses_chat_template": False,
        "args": {"prompting": {"max_new_tokens": 4}, "deployment": {"enforce_eager": True}},
    }


@pytest.fixture(scope="module")
def crash(llm: dict[str, Any]) -> Iterator[Crash]:
    """A registry with a lease and a queue, all of whose processes were killed, and its successor."""
    folder = Path(llm["model"]).parents[1]
    first = start(folder)
    try:
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
    second = start(folder, leases=SHORT_LEASES)
    crash = Crash(before, ran, second)
    yield crash
    stop_and_search(crash.registry)  # a test may have put another one in its place


@pytest.fixture
def registry(crash: Crash) -> Iterator[Registry]:
    """The registry that came back, without the requests of the test before."""
    yield crash.registry
    for request_id in crash.registry.posted:
        crash.registry.delete(request_id)
    crash.registry.posted.clear()


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


def test_a_killed_owner_takes_everything_along(crash: Crash, llm: dict[str, Any]) -> None:
    """A ``greenprompt up`` that is killed ends its cluster; the next starts at once, whatever has yet to end."""
    registry = crash.registry
    (warm,) = registry.post(20, llm)
    registry.until(warm, "deployed")
    ran = Ran(registry)  # takes seconds on a busy machine, in which the next lease would be over, and its LLM handed on
    registry.delete(warm)
    (held, waiting) = registry.post(21, llm, llm)
    registry.until(held, "deployed")
    registry.process.kill()
    registry.process.wait()
    crash.registry = start(registry.folder, leases=SHORT_LEASES)
    assert ran.left() == []
    assert crash.registry.get(held)["status"] in ("failed", "expired")  # lost with its machine, or out of time before
    crash.registry.until(waiting, "deployed")
    crash.registry.delete(waiting)
