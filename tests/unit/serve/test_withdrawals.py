"""Requests of a POST that was not answered do not stay: nobody has their ids."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import stamina
from structlog.testing import capture_logs

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from deployments.serve.withdrawals import Withdrawals
from registry.errors import InternalError, QueueFull, RegistryError, RegistryUnavailable, StoreUnavailable
from tests.support.fake_registry import BASE, FakeRegistry

BODY: dict[str, Any] = {
    "measurementId": 1,
    "llms": [
        {
            "modeltyp": "text-generation",
            "model": f"org/{name}",
            "uses_chat_template": True,
            "args": {"prompting": {}, "deployment": {}},
        }
        for name in "ab"
    ],
}


class Unanswered(FakeRegistry):
    """Accepts a POST, and then fails with ``failure``, or (None) does not answer until the test ends."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.accepted = asyncio.Event()
        self.withdrawn = asyncio.Event()
        self.refusals: list[Exception] = []

    async def call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
        if method == "withdraw" and self.refusals:
            raise self.refusals.pop(0)
        answer = await super().call(method, *args, wait_s=wait_s)
        if method == "withdraw":
            self.withdrawn.set()
        if method == "request":
            self.accepted.set()
            if self.failure is not None:
                raise self.failure
            await asyncio.Event().wait()
        return answer


def client_of(registry: FakeRegistry) -> httpx.AsyncClient:
    app = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), registry.call)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url=BASE)


@pytest.fixture(autouse=True)
def no_pauses():
    with stamina.set_testing(True, attempts=4):
        yield


@pytest.mark.parametrize(
    "failure",
    [RegistryUnavailable("no answer within 30 s"), StoreUnavailable("gone"), InternalError("x"), ZeroDivisionError()],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("key", [None, "key-1"])
async def test_no_orphan_stays_when_the_ingress_gives_up(failure: Exception, key: str | None) -> None:
    """A POST that is answered 5xx leaves no request: both of its ids are withdrawn, with tenant and key."""
    registry = Unanswered(failure)
    headers = {"X-Tenant": "team-a"} | ({} if key is None else {"Idempotency-Key": key})
    async with client_of(registry) as http:
        answer = await http.post("/promptingservice/request", json=BODY, headers=headers)
        assert answer.status_code >= 500
        await registry.withdrawn.wait()
    (request, withdraw) = registry.calls
    assert withdraw[:2] == ("withdraw", ([new.request_id for new in request[1][1]], "team-a", key))
    assert [(row.method, row.status) for row in registry.audited] == [("POST", 201)] * 2, "the withdrawal has its POST"
    assert registry.requests == {}


async def test_no_orphan_stays_when_the_client_hangs_up() -> None:
    """A client that goes away while its POST is under way leaves no request."""
    registry = Unanswered()
    async with client_of(registry) as http:
        post = asyncio.create_task(http.post("/promptingservice/request", json=BODY))
        await registry.accepted.wait()
        assert len(registry.requests) == 2
        post.cancel()  # as Serve does when the connection is closed
        with pytest.raises(asyncio.CancelledError):
            await post
        await registry.withdrawn.wait()
    assert registry.requests == {}


async def test_a_refusal_withdraws_nothing() -> None:
    """A 4xx says that nothing was accepted: there is nothing to withdraw."""
    registry = Unanswered(QueueFull("this registry", 1))
    async with client_of(registry) as http:
        assert (await http.post("/promptingservice/request", json=BODY)).status_code == 429
    assert [method for method, _, _ in registry.calls] == ["request"]


async def test_withdrawal_outlasts_a_registry_that_is_away() -> None:
    """While the registry does not answer a withdrawal is tried again, and is logged with its ids."""
    registry = Unanswered()
    registry.refusals = [RegistryUnavailable("away")] * 3
    withdrawals = Withdrawals(registry.call)
    with capture_logs() as logs:
        withdrawals.begin(["r1"], "default", None)
        await withdrawals.over()
    assert registry.withdrawn.is_set()
    assert [(entry["log_level"], entry["request_ids"]) for entry in logs if "request_ids" in entry] == [
        ("info", ["r1"])
    ]


@pytest.mark.parametrize("failure", [RegistryUnavailable("away"), ZeroDivisionError()], ids=["away", "bug"])
async def test_withdrawal_that_fails_is_logged(failure: Exception) -> None:
    """What can't be withdrawn is an error in the log, with the ids and the reason: its owner does not end silently."""
    registry = Unanswered()
    registry.refusals = [failure] * 4
    withdrawals = Withdrawals(registry.call)
    with capture_logs() as logs:
        withdrawals.begin(["r1", "r2"], "default", None)
        await withdrawals.over()
    (entry,) = (entry for entry in logs if entry["log_level"] == "error")
    assert entry["request_ids"] == ["r1", "r2"]
    assert (isinstance(failure, RegistryError) and str(failure) in entry["reason"]) or "ZeroDivision" in entry["reason"]
