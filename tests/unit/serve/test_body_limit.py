"""Bodies that are too long: 413, and no more of them is kept than the limit."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments.models.sources import ModelSources
from deployments.serve.body_limit import BodyLimit
from deployments.serve.http_app import MAX_BODY_MIB, IngressConfig, build_app
from registry.wire.schemas import MAX_LLMCONFIG_BYTES
from tests.support.fake_registry import FakeRegistry

LIMIT = 1000
LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "org/tiny",
    "uses_chat_template": True,
    "args": {"prompting": {}, "deployment": {}},
}


class Reader:
    """An app that reads a body, as far as it comes, and answers with its length."""

    def __init__(self, *, early: bool = False, fails: bool = False) -> None:
        self.read = 0
        self.calls = 0
        self._early, self._fails = early, fails

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        if self._early:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                if self._fails:
                    raise RuntimeError("the client has gone")
                break
            self.read += len(message["body"])
            more = message.get("more_body", False)
        if not self._early:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(self.read).encode()})


async def posted(app: Reader, *chunks: bytes, length: bytes | None = None, path: str = "/x") -> list[Message]:
    """What is sent to a client whose body comes in these parts."""
    left = list(chunks)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await BodyLimit(app, lambda _path: LIMIT)(scope, receive, send)
    return sent


@pytest.mark.parametrize("chunks", [(b"",), (b"x" * LIMIT,), (b"x",) * LIMIT])
async def test_up_to_the_limit_all_is_read(chunks: tuple[bytes, ...]) -> None:
    """A body of exactly the limit passes, in one piece or in many."""
    app = Reader()
    sent = await posted(app, *chunks)
    assert (sent[0]["status"], sent[1]["body"]) == (200, str(sum(map(len, chunks))).encode())


async def test_an_announced_body_is_refused_at_once() -> None:
    """The app does not hear of a request whose Content-Length is too large, however it is written."""
    for length in (b"1001", b"0001001", b"9" * 5000):
        app = Reader()
        sent = await posted(app, b"x", length=length)
        assert (sent[0]["status"], app.calls) == (413, 0)
        assert json.loads(sent[1]["body"])["code"] == "body_too_large"
        assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize("fails", [False, True])
async def test_no_more_than_the_limit_is_kept(fails: bool) -> None:
    """A body that does not say how long it is ends at the limit, whatever the app makes of that."""
    app = Reader(fails=fails)
    sent = await posted(app, *(b"x" * 400,) * 10)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 413
    assert app.read == 800


async def test_an_answer_that_has_begun_goes_on() -> None:
    """If the app answers before it has read all, its answer stays whole."""
    app = Reader(early=True)
    sent = await posted(app, *(b"x" * 400,) * 10)
    assert [message.get("status") for message in sent] == [200, None]


async def test_errors_of_the_app_pass() -> None:
    """An app that fails for another reason still fails."""

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        await posted(broken, b"x")  # type: ignore[arg-type]


async def test_below_v1_it_is_openais_error() -> None:
    """OpenAI's clients understand the refusal."""
    sent = await posted(Reader(), b"", length=b"5000", path="/token/v1/chat/completions")
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), FakeRegistry().call)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        yield client


async def parts(mib: int) -> AsyncIterator[bytes]:
    yield b'{"measurementId": 1, "llms": ['
    for _ in range(mib):
        yield b" " * 2**20


async def test_the_ingress_has_a_limit(http: httpx.AsyncClient) -> None:
    """A POST of more than the limit gets 413, announced or not; prompts to the root may be longer."""
    path = "/promptingservice/request"
    announced = await http.post(path, content=b" " * (MAX_BODY_MIB * 2**20 + 1))
    unannounced = await http.post(path, content=parts(MAX_BODY_MIB + 1))
    assert [answer.status_code for answer in (announced, unannounced)] == [413, 413]
    credentials = ("lease", "none")
    prompt = await http.post("/process_prompt", content=b" " * (MAX_BODY_MIB * 2**20 + 1), auth=credentials)
    assert prompt.status_code == 403


async def test_an_llmconfig_has_a_limit(http: httpx.AsyncClient) -> None:
    """What is stored for months is no larger than it has to be; the error names the llmconfig."""
    large = {**LLM, "args": {"prompting": {"stop": ["x" * MAX_LLMCONFIG_BYTES]}, "deployment": {}}}
    answer = await http.post("/promptingservice/request", json={"measurementId": 1, "llms": [LLM, large]})
    assert (answer.status_code, answer.json()["field"]) == (422, "llms[1]")
    assert "at most 262144 are stored" in answer.json()["message"]
