"""Tenants, from the header of a request to their turn in the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from registry.errors import BadSettings, QueueFull
from registry.settings import Settings, load_settings
from tests.support.fake_registry import FakeRegistry

REQUEST = "/promptingservice/request"
LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "org/tiny",
    "uses_chat_template": True,
    "args": {"prompting": {}, "deployment": {}},
}
BODY = {"measurementId": 1, "llms": [LLM]}


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def http(registry: FakeRegistry) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), registry.call)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("tenant", ["a", "Team-A_2.b", "x" * 64, ".", "0"])
async def test_tenant_is_passed_on(http: httpx.AsyncClient, registry: FakeRegistry, tenant: str) -> None:
    """The header's word reaches the registry as it is."""
    assert (await http.post(REQUEST, json=BODY, headers={"X-Tenant": tenant})).status_code == 201
    assert registry.calls[0][1][2] == tenant


async def test_no_header_is_the_default_tenant(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """Clients that know nothing of tenants are all one."""
    assert (await http.post(REQUEST, json=BODY)).status_code == 201
    assert registry.calls[0][1][2] == "default"


@pytest.mark.parametrize("tenant", ["", "x" * 65, "a b", "a/b", "ümlaut", "a,b", "a\tb", "*"])
async def test_odd_names_are_refused(http: httpx.AsyncClient, registry: FakeRegistry, tenant: str) -> None:
    """A header that can't be a tenant is a 422 that names it, and nothing is asked of the registry."""
    answer = await http.post(REQUEST, json=BODY, headers=[(b"X-Tenant", tenant.encode())])
    assert (answer.status_code, answer.json()["field"]) == (422, "x-tenant")
    assert registry.calls == []


async def test_full_queue_says_when_to_come_back(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A tenant that has as many requests waiting as it may is told so, and when to try again."""
    registry.error = QueueFull("tenant 'a'", 5)
    answer = await http.post(REQUEST, json=BODY, headers={"X-Tenant": "a"})
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert "tenant 'a'" in answer.json()["message"]
    assert int(answer.headers["retry-after"]) > 0


async def test_busy_registry_says_when_to_come_back(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A registry without a usable wrapper is a 503 that says when to look again; one that works says nothing."""
    registry.health = "starting"
    answer = await http.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
    assert int(answer.headers["retry-after"]) > 0
    registry.health = "ok"
    assert "retry-after" not in (await http.get("/healthz")).headers


def test_weights_reach_the_queue(tmp_path: Path) -> None:
    """What the configuration says of tenants is what decisions are made by."""
    path = tmp_path / "config.yaml"
    path.write_text("queue: {tenant_weights: {team-b: 0.5, team-a: 3}, max_queued_per_tenant: 7}")
    limits = load_settings(path).limits
    assert limits.tenant_weights == (("team-a", 3.0), ("team-b", 0.5))
    assert limits.max_queued_per_tenant == 7
    assert Settings().limits.tenant_weights == ()


@pytest.mark.parametrize("weights", ["{a: 0}", "{a: -1}", "{a: .inf}", "{a: .nan}", "{a b: 1}", "[a]", "{a: x}"])
def test_odd_weights_are_refused(tmp_path: Path, weights: str) -> None:
    """A weight that can't be one, or of somebody who can't ask, is an error that names the field."""
    path = tmp_path / "config.yaml"
    path.write_text(f"queue: {{tenant_weights: {weights}}}")
    with pytest.raises(BadSettings, match=r"queue\.tenant_weights"):
        load_settings(path)
