"""The HTTP ingress around a registry that is a stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from deployments.serve.http_app import build_app
from tests.support.fake_registry import FakeRegistry
from tests.support.ingress_calls import CONFIG


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def http(registry: FakeRegistry) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(CONFIG, registry.call))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
