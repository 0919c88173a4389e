"""The Prompting Service's own client against a real registry: no header, no scheme, no field of its own is changed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from greenprompt_client.client import ENDED
from tests.cluster.conftest import DEPLOY_LIMIT_S, Registry
from tests.support.prompting_service_client import PromptingServiceClient

pytestmark = [pytest.mark.cluster, pytest.mark.vllm]

LLM = Callable[..., dict[str, Any]]


def until_deployed(client: PromptingServiceClient, request_id: str) -> dict[str, Any]:
    """Poll as that client does."""
    deadline_s = time.monotonic() + DEPLOY_LIMIT_S
    while (state := client.status(request_id))["status"] != "deployed":
        assert time.monotonic() < deadline_s, state
        time.sleep(0.2)
    return state


def test_two_llms_one_after_the_other(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """POST, poll, prompt and DELETE of two LLMs work with what the client sends; the end of each lease is seen there.

    Only the port is not 8000, which may be another's on this machine: a note says that the client could not work then.
    """
    port = urlsplit(registry.url).port
    assert port is not None
    client = PromptingServiceClient(registry.url, port=port)
    accepted = client.request(measurement_id, [llm("a"), llm("b")])
    ids = [entry["requestId"] for entry in accepted]
    registry.posted += ids
    assert [entry["llmconfig"] for entry in accepted] == [llm("a"), llm("b")]
    assert any(f"listens on port {port}" in note for note in accepted[0]["notes"])
    for n, request_id in enumerate(ids):
        state = until_deployed(client, request_id)
        assert state.keys() >= {"requestId", "llmconfig", "status", "measurementId", "address"}
        address = state["address"]
        assert "/" not in address
        assert address.endswith("@127.0.0.1")
        assert client.wrapper_status(address).json().items() >= {"status": "success", "message": "ready"}.items()
        answer = client.prompt(address, "What does a prompt cost?")
        assert answer.status_code == 200, answer.text
        assert [hop.status_code for hop in answer.history] == [307]
        assert answer.url == f"{state['url']}/process_prompt"
        assert set(answer.json()) >= {"answer", "sci_score"}
        assert [client.status(other)["status"] for other in ids[n + 1 :]] == ["queued"] * (len(ids) - n - 1)
        assert client.release(request_id) == 204
        refused = client.prompt(address, "Still mine?")
        assert (refused.status_code, refused.json()["code"]) == (410, "lease_ended")


def test_prompts_at_the_root_are_fenced(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """While somebody has a lease, a prompt at the root without its token, or with another, is refused."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    for auth, status in ((None, 401), (("lease", "made-up"), 403)):
        answer = httpx.post(f"{registry.url}/process_prompt", json={"question": "Mine?"}, auth=auth, timeout=60)
        assert answer.status_code == status
    assert httpx.get(registry.url, timeout=60).status_code == 200


@pytest.mark.parametrize("padding", [0, 200_000])
def test_a_hang_up_during_the_post_leaves_no_request(
    registry: Registry, llm: LLM, measurement_id: int, padding: int
) -> None:
    """A client that goes away before its POST is answered leaves nothing that holds a machine.

    The registry stands still meanwhile, so that it takes the POST only when nobody waits for its answer any more. Ray
    delivers a large POST (``padding``, bytes) after its withdrawal: an argument of over 100 KiB is fetched first.
    """
    parts = urlsplit(registry.url)
    llms = [llm("a"), llm("b")]
    llms[0]["args"]["prompting"]["stop_strings"] = ["x" * (padding or 1)]
    body = json.dumps({"measurementId": measurement_id, "llms": llms}).encode()
    head = f"POST /promptingservice/request HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    actor = registry.process_named("ray::RegistryActor")
    actor.suspend()
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as client:
            client.sendall(head + body)
            time.sleep(1)  # for the ingress to have sent it to the registry
        time.sleep(1)  # for the hang-up to have been heard
    finally:
        actor.resume()
    registry.until(registry.post(measurement_id + 1, llm("b"))[0], "deployed")  # as no machine is held
    answer = httpx.get(f"{registry.url}/measurements/{measurement_id}", timeout=60)
    if answer.status_code == 404:
        return  # the POST came after its withdrawal, and was refused
    requests = answer.json()["requests"]
    registry.posted += [each["requestId"] for each in requests]
    assert all(each["status"] in ENDED for each in requests), requests
