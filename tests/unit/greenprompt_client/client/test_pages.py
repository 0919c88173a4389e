"""Other pages of the registry in the Python client, its connections and its key."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from greenprompt_client.answers import AnswerError
from greenprompt_client.client import RegistryClient
from registry.errors import BadSettings
from registry.wire.schemas import MAX_EVENTS
from tests.support.scripted_registry import BUSY, STATE, Make


def test_pages(registry: Make) -> None:
    """The information pages come as their JSON."""
    client, script = registry(httpx.Response(200, json=[{"machine": "a"}]))
    assert client.get("/machines") == [{"machine": "a"}]
    assert script.asked == ["GET /machines"]


MACHINE: dict[str, Any] = {
    "machine": "gpu 1",
    "address": "10.0.0.1",
    "alive": True,
    "gpus": 0,
    "gpuType": None,
    "memoryBytes": None,
    "drain": "draining",
    "leases": 1,
    "wrappers": [],
}

HEALTH = {"status": "degraded", "wrappers": 1, "usable": 0, "queued": 3, "version": "0"}


def test_drain_and_undrain(registry: Make) -> None:
    """Both are asked again while the registry restarts, and give the machine as it is then."""
    client, script = registry(httpx.Response(503, json=BUSY), MACHINE, {**MACHINE, "drain": None})
    assert client.drain("gpu 1").drain == "draining"
    assert client.undrain("gpu 1").drain is None
    path = "/machines/gpu%201/drain"
    assert script.asked == [f"POST {path}", f"POST {path}", f"DELETE {path}"]


@pytest.mark.parametrize("last", ["drained", None])
def test_drain_is_waited_for(registry: Make, last: str | None) -> None:
    """Until the machine is drained, or somebody has undrained it; each look is told."""
    client, script = registry(MACHINE, {**MACHINE, "leases": 0}, {**MACHINE, "drain": last})
    looks: list[int] = []
    pauses: list[float] = []
    state = client.wait_until_drained("gpu 1", on_look=lambda seen: looks.append(seen.leases), sleep=pauses.append)
    assert state.drain == last
    assert looks == [1, 0, 1]
    assert len(pauses) == 2
    assert set(script.asked) == {"GET /machines/gpu%201"}


def test_wait_for_a_drain_has_an_end(registry: Make) -> None:
    """When the time is up the machine is still being drained, and that is said."""
    client, _ = registry(MACHINE)
    with pytest.raises(TimeoutError, match="gpu 1 is still being drained after 0 s"):
        client.wait_until_drained("gpu 1", timeout_s=0)


def test_events(registry: Make) -> None:
    """The events of all pages come in their order; a page that is not full is the last."""
    events = [{"event": n, "what": "TimePassed", "at": "2026-11-30T09:00:00Z"} for n in range(1, MAX_EVENTS + 3)]
    pages = (events[:MAX_EVENTS], events[MAX_EVENTS:])
    client, script = registry(*(httpx.Response(200, json=page) for page in pages))
    assert [each.event for each in client.events("r 1")] == list(range(1, MAX_EVENTS + 3))
    path = "GET /promptingservice/request/r%201/events"
    assert script.asked == [f"{path}?after={after}&limit={MAX_EVENTS}" for after in (0, MAX_EVENTS)]


def test_measurement(registry: Make) -> None:
    """A measurement comes with the requests of all its pages."""
    measurement = {
        "measurementId": 7,
        "machine": "a",
        "flags": [],
        "createdAt": STATE["createdAt"],
    }
    pages = measurement | {"requests": [STATE], "next": 4}, measurement | {"requests": [STATE], "next": None}
    client, script = registry(httpx.Response(503, json=BUSY), *pages)
    found = client.measurement(7)
    assert ([state.requestId for state in found.requests], found.next) == (["r1", "r1"], None)
    assert script.asked == ["GET /measurements/7?after=0"] * 2 + ["GET /measurements/7?after=4"]


def test_health_is_told_when_it_is_bad(registry: Make) -> None:
    """A registry that can serve nobody answers 503 and says how it is; an error in its place is an error."""
    client, _ = registry(httpx.Response(503, json=HEALTH), HEALTH, httpx.Response(503, json=BUSY))
    assert client.health().queued == client.health().queued == 3
    with pytest.raises(AnswerError, match="try again"):
        client.health()


@pytest.mark.parametrize("base_url", ["http://r/prefix", "http://r/prefix/"])
def test_base_url_may_have_a_path(registry: Make, base_url: str) -> None:
    """A registry behind a path is reached, with or without a slash at the end."""
    client, script = registry(STATE, base_url=base_url)
    client.status("r1")
    assert script.asked == ["GET /prefix/promptingservice/request/r1"]


def test_client_closes_its_connections() -> None:
    """At the end of the block the connections are closed."""
    with RegistryClient("http://registry") as client:
        pass
    assert client._http.is_closed
    assert client._prompts.is_closed


@pytest.mark.parametrize("key", ["gp_0a1b2c3d_secret", "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2ln-_8"])
def test_the_key_goes_to_the_registry_alone(key: str) -> None:
    """An LLM, whose code somebody else may have written, never gets the API key or the JWT."""
    with RegistryClient("http://registry", api_key=f" {key}\n") as client:
        assert client._http.headers["Authorization"] == f"Bearer {key}"
        assert "Authorization" not in client._prompts.headers


@pytest.mark.parametrize("key", ["", " ", "gp_ü", "gp_1\nX-Tenant: other", "two words"])
def test_what_can_be_no_key_is_refused(key: str) -> None:
    """A text that no header can have is refused before anything is sent, and is not repeated in the error."""
    with pytest.raises(BadSettings, match=r"^API key: is empty, or has characters that no key has$"):
        RegistryClient("http://registry", api_key=key)
