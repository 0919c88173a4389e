"""Leases over real HTTP, with the token in the path or in a header: the openai package, our client, and strangers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Receive, Scope, Send

from deployments.models.sources import ModelSources
from deployments.serve import wrapper_app
from deployments.serve.wrapper_app import WrapperReplica
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper
from greenprompt_client.answers import AnswerError
from greenprompt_client.held_lease import HeldLease
from registry.settings import EnergySettings, WrapperSettings
from registry.wire.lease_token import lease_headers, split_url
from registry.wire.schemas import RequestState
from tests.support.app_server import served_in_thread
from tests.support.prompt_gate import GRANT, LLMCONFIG, Wrapper

ROOT = "/wrappers/a-0"
TOKEN, OLD = "lease_0123456789abcdef", "0ld-t0ken"
STATE = RequestState(
    requestId="r", llmconfig=LLMCONFIG, status="deployed", measurementId=1, address=None, link="", createdAt=""
)
CHAT: Any = {"model": "org/tiny", "messages": [{"role": "user", "content": "Why?"}]}


@dataclass
class Lease:
    """A lease of a replica with a fake engine, and what was sent to it."""

    base_url: str
    wrapper: Wrapper
    token: str = TOKEN
    paths: list[str] = field(default_factory=list)
    given: list[str | None] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.base_url}/{self.token}"

    def bind(self, token: str) -> None:
        self.token = token
        self.wrapper.bind(replace(GRANT, token=token))


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lease]:
    wrapper = Wrapper()

    async def init(replica: Any, _config: WrapperConfig, _show_warm: Callable[[bool], None]) -> None:
        replica._prompts = wrapper.app

    monkeypatch.setattr(wrapper_app, "Gauge", lambda *_, **__: None)
    monkeypatch.setattr(LLMWrapper, "__init__", init)
    monkeypatch.delattr(LLMWrapper, "__del__")  # Serve awaits it, Python's collector can't
    config = WrapperConfig("a-0", 0, WrapperSettings(), EnergySettings(), ModelSources(True, (), tmp_path), tmp_path)
    replica: Any = WrapperReplica.__new__(WrapperReplica)
    with pytest.raises(StopIteration):
        replica.__init__(config).send(None)
    app = replica.__serve_build_asgi_app__()

    async def as_serve(scope: Scope, receive: Receive, send: Send) -> None:
        made.paths.append(scope["raw_path"].decode())
        made.given.append(dict(scope["headers"]).get(b"authorization", b"").decode() or None)
        await app({**scope, "root_path": ROOT}, receive, send)

    with served_in_thread(as_serve, log_level="error", ws="none") as (_, port):
        made = Lease(f"http://127.0.0.1:{port}{ROOT}", wrapper)
        made.bind(TOKEN)
        yield made


def test_our_client_sends_no_token_in_a_path(lease: Lease, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of our client has the token in the header alone, and so none is in what httpx logs."""
    caplog.set_level(logging.DEBUG)
    with httpx.Client(trust_env=False) as http:
        held = HeldLease(STATE, lease.url, http)
        assert held.prompt("Why?")["answer"] == lease.wrapper.engine.text
        assert (held.base_url, held.token) == (lease.base_url, TOKEN)
        lease.wrapper.gate.unbind("released")
        with pytest.raises(AnswerError, match="lease_ended") as ended:
            held.prompt("Why?")
    assert (lease.paths, lease.given) == ([f"{ROOT}/process_prompt"] * 2, [f"Bearer {TOKEN}"] * 2)
    assert "/wrappers/a-0/process_prompt" in caplog.text
    assert TOKEN not in caplog.text + str(ended.value)


def test_our_client_uses_the_path_with_an_older_registry(lease: Lease) -> None:
    """A lease whose token is from an older registry is prompted by the path, without a header."""
    lease.bind(OLD)
    with httpx.Client(trust_env=False) as http:
        held = HeldLease(STATE, lease.url, http)
        assert held.prompt("Why?")["answer"] == lease.wrapper.engine.text
    assert (held.base_url, held.token) == (lease.url, None)
    assert (lease.paths, lease.given) == ([f"{ROOT}/{OLD}/process_prompt"], [None])


@pytest.mark.parametrize(("below", "key"), [("", TOKEN), (f"/{TOKEN}", "none"), (f"/{TOKEN}", TOKEN)])
def test_the_openai_package_takes_the_token_as_its_key(lease: Lease, below: str, key: str) -> None:
    """It needs a base URL and a key: the token is the key, or a part of the URL. No key reaches the engine."""
    with openai.OpenAI(base_url=f"{lease.base_url}{below}/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == lease.wrapper.engine.text
        lease.wrapper.gate.unbind("expired")
        with pytest.raises(openai.APIStatusError, match="has ended") as ended:
            client.chat.completions.create(**CHAT)
    assert (ended.value.status_code, ended.value.code) == (410, "lease_ended")
    (scope,) = lease.wrapper.engine.scopes
    assert b"authorization" not in dict(scope["headers"])


@pytest.mark.parametrize("key", ["none", "lease_of-another", "gp_0a1b2c3d_secret"])
def test_the_openai_package_with_another_key_is_refused(lease: Lease, key: str) -> None:
    """Without the token in its URL, the package gets a 403 for every other key."""
    with (
        openai.OpenAI(base_url=f"{lease.base_url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError, match="no lease has this URL or token") as refused,
    ):
        client.chat.completions.create(**CHAT)
    assert refused.value.code == "no_such_lease"
    assert lease.wrapper.engine.scopes == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"Origin": "http://evil.example"}, 403), ({"Host": "evil.example"}, 421)],
)
def test_a_header_does_not_pass_the_guard(lease: Lease, headers: Mapping[str, str], status: int) -> None:
    """A foreign web page that knows the token can't send it in a header either."""
    base_url, token = split_url(lease.url)
    answer = httpx.post(
        f"{base_url}/process_prompt",
        json={"question": "Why?"},
        headers={**lease_headers(token), **headers},
        trust_env=False,
    )
    assert (answer.status_code, answer.headers["cache-control"]) == (status, "no-store")
