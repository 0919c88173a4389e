"""Prompts on their whole way: client, HAProxy, wrapper, engine, and back."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.cluster.conftest import MAX_IN_FLIGHT, Registry

pytestmark = pytest.mark.cluster

LLM = Callable[..., dict[str, Any]]
LIMIT_S = 60


def until_unfinished(registry: Registry, count: int) -> None:
    """Return when the engine has exactly so many prompts that it has not finished."""
    deadline_s = time.monotonic() + LIMIT_S
    seen = []
    while (unfinished := registry.wrapper()["unfinished"]) != count:
        seen.append(unfinished)
        assert time.monotonic() < deadline_s, seen


def ask(address: str, **body: Any) -> http.client.HTTPConnection:
    """Send a prompt and don't wait for anything; closing the connection is hanging up."""
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.netloc, timeout=LIMIT_S)
    content = json.dumps({"prompt": "Count", "max_tokens": 2000, "ignore_eos": True, **body})
    connection.request("POST", f"{url.path}/v1/completions", content, {"content-type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_the_engine(
    registry: Registry, llm: LLM, measurement_id: int, stream: bool
) -> None:
    """A client that hangs up ends what it asked for in the engine, all of it; the stream of another goes on."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    address = registry.until(request_id, "deployed")["url"]
    model = llm("a")["model"]
    stays = ask(address, model=model, n=24, stream=True)
    until_unfinished(registry, 24)
    leaves = ask(address, model=model, n=8, stream=stream)
    until_unfinished(registry, 32)
    leaves.close()
    until_unfinished(registry, 24)
    stays.close()
    until_unfinished(registry, 0)
    assert registry.delete(request_id) == 204


def test_engines_wait_for_nothing_less_important(registry: Registry) -> None:
    """A wrapper, and so the engines in it, runs at the niceness of any other program, not at that of Ray's workers."""
    assert {process.nice() for process in [registry.replica(), *registry.replica().children(recursive=True)]} == {0}


def test_prompts_beyond_the_limit_are_sent_away(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Of many prompts at once as many are in flight as may be; the others are told to come again, and then can."""
    (request_id,) = registry.post(measurement_id, llm("a", max_new_tokens=200))
    address = registry.until(request_id, "deployed")["url"]

    def prompt(_number: int) -> httpx.Response:
        return httpx.post(f"{address}/process_prompt", json={"question": "Count"}, timeout=60)

    with ThreadPoolExecutor(4 * MAX_IN_FLIGHT) as pool:
        answers = list(pool.map(prompt, range(4 * MAX_IN_FLIGHT)))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= MAX_IN_FLIGHT
    for refused in (answer for answer in answers if answer.status_code == 429):
        assert refused.json()["code"] == "too_many_prompts"
        assert int(refused.headers["retry-after"]) > 0
    assert prompt(0).status_code == 200
    until_unfinished(registry, 0)
    assert registry.delete(request_id) == 204
