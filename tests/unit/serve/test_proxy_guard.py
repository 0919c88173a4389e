"""Requests that did not come through a HAProxy of the cluster: refused, on every path and in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from deployments.serve.proxy_guard import ProxyGuard
from tests.support.fake_registry import FakeRegistry

SECRET = "5e" * 32
HEADER = b"x-greenprompt-proxy"


class Seen:
    """An app that keeps the scopes that reach it."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)


def scope_of(kind: str, *values: bytes, path: str = "/x") -> Scope:
    others = [(b"host", b"a"), (b"x-greenprompt-source", b"192.0.2.1")]
    return {"type": kind, "path": path, "headers": [*others, *((HEADER, value) for value in values)]}


async def answered(app: Any, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("a body was read before the secret was checked")

    await ProxyGuard(app, SECRET)(scope, receive, send)
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_haproxys_request_passes_without_the_secret(kind: str) -> None:
    """The app gets the request with all its headers but the secret, so that it can neither log it nor pass it on."""
    app, scope = Seen(), scope_of(kind, SECRET.encode())
    assert await answered(app, scope) == []
    (seen,) = app.scopes
    assert seen == {**scope, "headers": [header for header in scope["headers"] if header[0] != HEADER]}


@pytest.mark.parametrize(
    "values",
    [
        (),
        (b"",),
        (b"0" * 64,),
        (SECRET.encode() + b"0",),
        (SECRET.encode()[:-1],),
        (SECRET.upper().encode(),),
        ("é".encode() * 32,),
        (SECRET.encode(), b"0" * 64),
        (SECRET.encode(), SECRET.encode()),
    ],
)
async def test_all_others_are_refused(values: tuple[bytes, ...]) -> None:
    """No secret, another, part of it, several: the app is not called, no body is read, the connection is closed."""
    app = Seen()
    start, body = await answered(app, scope_of("http", *values))
    assert app.scopes == []
    assert start["status"] == 403
    assert (b"connection", b"close") in start["headers"]
    assert b'"code":"not_through_proxy"' in body["body"]
    assert SECRET.encode() not in body["body"]
    (closed,) = await answered(app, scope_of("websocket", *values))
    assert closed["type"] == "websocket.close"
    assert app.scopes == []


async def test_a_refusal_has_openais_form_below_v1() -> None:
    """Clients of OpenAI's API understand why."""
    _, body = await answered(Seen(), scope_of("http", path="/token/v1/completions"))
    assert b'"error":{' in body["body"]
    assert b"not_through_proxy" in body["body"]


async def test_the_server_itself_needs_no_secret() -> None:
    """The app hears of its server's start and end."""
    app = Seen()
    await answered(app, {"type": "lifespan"})
    assert [scope["type"] for scope in app.scopes] == ["lifespan"]


async def test_nothing_of_the_ingress_is_before_the_guard() -> None:
    """A request without the secret is not even audited: its address is what the caller claims. The call never runs."""
    registry = FakeRegistry()
    config = IngressConfig(ModelSources(True, (), Path("/")), ())
    app = build_app(config, registry.call, guard=lambda app: ProxyGuard(app, SECRET))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as http:
        for path in ("/", "/healthz", "/machines", "/openapi.json", "/unknown"):
            answer = await http.get(path, headers={"x-greenprompt-source": "192.0.2.1"})
            assert (answer.status_code, answer.json()["code"]) == (403, "not_through_proxy")
        assert (await http.get("/openapi.json", headers={HEADER.decode(): SECRET})).status_code == 200
