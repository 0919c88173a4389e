"""What a client sees when a part of the registry dies under it: real processes, really killed."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from deployments.machine import process_tree
from tests.cluster.conftest import Registry

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

LLM = Callable[..., dict[str, Any]]
BACK_LIMIT_S = 120


def prompt(address: str) -> httpx.Response:
    """One short prompt."""
    return httpx.post(f"{address}/process_prompt", json={"question": "Are you there?"}, timeout=60)


def until_prompted(address: str) -> httpx.Response:
    """The first answer that is no 5xx and no refused connection."""
    deadline_s = time.monotonic() + BACK_LIMIT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            answer = prompt(address)
            if answer.status_code < 500:
                return answer
        time.sleep(0.2)
    pytest.fail(f"no answer within {BACK_LIMIT_S} s")


def test_a_lease_outlives_the_registry_actor(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The actor is killed: the address goes on answering, the request is still known, and the queue moves on."""
    first, second = registry.post(measurement_id, llm("a"), llm("a"))
    before = registry.until(first, "deployed")
    registry.process_named("ray::RegistryActor").send_signal(signal.SIGKILL)
    assert prompt(before["url"]).status_code == 200
    after = registry.until(first, "deployed")
    assert after["url"] == before["url"]
    assert prompt(before["url"]).status_code == 200
    assert registry.delete(first) == 204
    registry.until(second, "deployed")
    assert registry.delete(second) == 204


def test_wrappers_outlive_the_controller_of_serve(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Serve's controller is killed: prompts go on, and its successor leads to the same wrapper as before."""
    first, second = registry.post(measurement_id, llm("a"), llm("b"))
    address = registry.until(first, "deployed")["url"]
    replica = registry.replica()
    registry.process_named("ray::ServeController").send_signal(signal.SIGKILL)
    assert until_prompted(address).status_code == 200
    assert registry.delete(first) == 204
    address = registry.until(second, "deployed")["url"]  # which takes the way that the successor has found
    assert registry.replica() == replica
    assert prompt(address).status_code == 200
    assert registry.delete(second) == 204


@pytest.mark.parametrize(
    ("sign", "victim"),
    [
        pytest.param(signal.SIGKILL, 0, id="engine killed"),
        pytest.param(signal.SIGKILL, -1, id="worker killed", marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 0, id="engine stopped", marks=pytest.mark.long),
    ],
)
def test_an_engine_that_dies_is_started_again_under_its_lease(
    registry: Registry, llm: LLM, measurement_id: int, sign: signal.Signals, victim: int
) -> None:
    """The engine is killed or stopped: its holder is told within ten seconds, and the same address answers again."""
    (request_id,) = registry.post(measurement_id, llm("a", max_new_tokens=2000))
    address = registry.until(request_id, "deployed")["url"]
    engines = registry.engines()
    with ThreadPoolExecutor(1) as holder:
        cut = holder.submit(prompt, address)
        while not registry.wrapper()["unfinished"]:
            assert not cut.done(), cut.result().text
        engines[victim].send_signal(sign)
        assert registry.until(request_id, "deploying", limit_s=10)["reason"]
        assert (cut.result().status_code, cut.result().json()["code"]) == (503, "engine_not_ready")
    assert until_prompted(address).status_code == 200
    state = registry.until(request_id, "deployed")
    assert state["url"] == address
    assert "engine_restarted" in state["flags"]
    assert process_tree.alive(engines) == set()
    registry.delete(request_id)


def test_a_wrapper_that_dies_is_replaced_under_its_lease(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The replica is killed: Serve starts another, which runs the lease's LLM; nothing of the old engine stays."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    address = registry.until(request_id, "deployed")["url"]
    replica, engines = registry.replica(), registry.engines()
    assert engines
    replica.send_signal(signal.SIGKILL)
    assert until_prompted(address).status_code == 200
    assert registry.until(request_id, "deployed")["url"] == address
    assert process_tree.alive(engines) == set()
    registry.delete(request_id)
