"""The Prompting Service's own client against the ingress: what it sends is taken, and its prompts find their lease."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from deployments.models.sources import ModelSources
from deployments.serve.app import told_to_clients
from deployments.serve.http_app import IngressConfig, build_app
from registry.service.old_address import old_address, old_address_problems
from registry.settings import Settings
from tests.support.fake_registry import BASE, ENDED, TOKEN, FakeRegistry
from tests.support.prompting_service_client import prompt_url

RECORDED = (
    b"POST /promptingservice/request HTTP/1.1\r\n"
    b"Host: 127.0.0.1:8000\r\n"
    b"User-Agent: python-requests/2.34.2\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Length: 278\r\n"
    b"\r\n"
    b'{"measurementId":1234,"llms":[{"modeltyp":"text-generation","model":"TinyLlama/TinyLlama-1.1B-Chat-v1.0",'
    b'"uses_chat_template":true,"args":{"prompting":{"max_new_tokens":256,"do_sample":true,"temperature":0.7},'
    b'"deployment":{"torch_dtype":"torch.bfloat16","device_map":"auto"}}}]}'
)
"""What the client puts on the wire for a POST."""

REQUEST = "/promptingservice/request"
PROMPT = b'{"question": "What does a prompt cost?"}'


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def http(registry: FakeRegistry) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), registry.call)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE) as client:
        yield client


def recorded() -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of the recorded request."""
    head, body = RECORDED.split(b"\r\n\r\n", 1)
    line, *lines = head.decode().split("\r\n")
    method, path, _ = line.split()
    return method, path, dict(each.split(": ") for each in lines), body


def test_the_recording_is_what_requests_sends() -> None:
    """The recorded bytes are what ``requests.post(url, data=text)`` makes: no Content-Type, the text as it is."""
    method, path, headers, body = recorded()
    sent = requests.Session().prepare_request(requests.Request(method, f"{BASE}{path}", data=body.decode()))
    assert set(headers) - {"Host"} == set(sent.headers)
    assert headers["Content-Length"] == sent.headers["Content-Length"]
    assert "Content-Type" not in sent.headers
    assert sent.body == body.decode()


async def test_recorded_request_is_accepted(http: httpx.AsyncClient) -> None:
    """The client's own bytes are answered 201 with the contract's fields."""
    method, path, headers, body = recorded()
    answer = await http.request(method, path, headers=headers, content=body)
    assert answer.status_code == 201
    (accepted,) = answer.json()["requests"]
    assert accepted["llmconfig"] == json.loads(body)["llms"][0]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense", ""])
async def test_json_is_json_whatever_its_type(http: httpx.AsyncClient, content_type: str | None) -> None:
    """On the Prompting Service's paths a body that is JSON is accepted under any Content-Type, and under none."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await http.post(REQUEST, content=recorded()[3], headers=headers)
    assert answer.status_code == 201


# --- the URL that the client builds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "address"),
    [
        ("http://127.0.0.1:8000", "lease:t-_0@127.0.0.1"),
        ("http://llm.example:8000", "lease:t-_0@llm.example"),
        ("https://llm.example/registry", "lease:t-_0@llm.example"),
        ("http://[::1]:8000", "lease:t-_0@[::1]"),
        ("http://[fd00::7]:8000", "lease:t-_0@[fd00::7]"),
    ],
)
def test_address_is_an_authority(base_url: str, address: str) -> None:
    """``address`` has the token and the host, and neither scheme nor port nor path."""
    assert old_address(base_url, "t-_0") == address


@pytest.mark.parametrize(
    ("host", "node", "address"),
    [
        ("127.0.0.1", "10.0.0.5", "lease:t@127.0.0.1"),
        ("0.0.0.0", "10.0.0.5", "lease:t@10.0.0.5"),
        ("::", "fd00::7", "lease:t@[fd00::7]"),
    ],
)
def test_address_has_a_host_that_clients_reach(host: str, node: str, address: str) -> None:
    """Where the registry listens on every interface, the address has the head's own IP address, IPv6 in brackets."""
    settings = told_to_clients(
        Settings.model_validate({"http": {"host": host, "haproxy": False}, "access": {"keys": True}}), node
    )
    assert old_address(settings.base_url, "t") == address
    assert old_address_problems(settings.base_url) == ()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/process_prompt"),
        ("[::1]", "http://[::1]:8000/process_prompt"),
    ],
)
def test_clients_turn_the_token_into_credentials(host: str, url: str) -> None:
    """Of the URL that the client builds, ``requests`` and ``httpx`` send the token as Basic credentials."""
    built = prompt_url(old_address(f"http://{host}:8000", TOKEN))
    assert built == f"http://lease:{TOKEN}@{host}:8000/process_prompt"
    basic = "Basic " + base64.b64encode(f"lease:{TOKEN}".encode()).decode()
    by_requests = requests.Request("POST", built, data="{}").prepare()
    assert by_requests.headers["Authorization"] == basic
    with httpx.Client(transport=httpx.MockTransport(lambda sent: httpx.Response(200, json=dict(sent.headers)))) as http:
        answer = http.post(built, content="{}")
    assert answer.json()["authorization"] == basic
    assert answer.request.url.copy_with(username=None, password=None) == url


@pytest.mark.parametrize(
    ("base_url", "why"),
    [
        ("http://127.0.0.1:8000", None),
        ("http://127.0.0.1:8000/", None),
        ("http://[::1]:8000", None),
        ("http://127.0.0.1:8001", "listens on port 8001"),
        ("http://llm.example", "listens on port 80"),
        ("https://llm.example:8000", "TLS only"),
        ("https://llm.example", "TLS only"),
        ("http://llm.example:8000/registry", "below a path"),
    ],
)
def test_where_the_client_can_not_work_it_is_said(base_url: str, why: str | None) -> None:
    """Where nothing of ours answers at http://<host>:8000/process_prompt a note says so, and why."""
    problems = old_address_problems(base_url)
    assert len(problems) == (why is not None)
    assert all(why is not None and why in problem and "use url" in problem for problem in problems)


# --- prompts at the root -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("GET", "/get_status"), ("POST", "/process_prompt")])
async def test_holder_is_redirected_to_its_lease(http: httpx.AsyncClient, method: str, path: str) -> None:
    """With the token as credentials the answer is a 307 to the same path below the lease's url."""
    answer = await http.request(method, path, auth=("lease", TOKEN), content=PROMPT if method == "POST" else b"")
    assert (answer.status_code, answer.headers["location"]) == (307, f"{BASE}/wrappers/a-0/{TOKEN}{path}")
    assert answer.content == b""


async def test_redirect_keeps_method_and_body() -> None:
    """A client that follows the redirect sends its POST, with its body, to the lease's url."""
    ingress = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), FakeRegistry().call)
    seen: list[tuple[str, str, bytes]] = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        if not scope["path"].startswith("/wrappers/"):
            await ingress(scope, receive, send)
            return
        body = (await receive())["body"]
        seen.append((scope["method"], scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    transport = httpx.ASGITransport(app=route)
    async with httpx.AsyncClient(transport=transport, follow_redirects=True) as http:
        answer = await http.post(f"http://lease:{TOKEN}@127.0.0.1:8000/process_prompt", content=PROMPT)
    assert answer.status_code == 200
    assert seen == [("POST", f"/wrappers/a-0/{TOKEN}/process_prompt", PROMPT)]


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [
        (None, 401, "no_credentials"),
        ("Bearer t0ken", 401, "no_credentials"),
        ("Basic", 401, "no_credentials"),
        ("Basic %%%", 401, "no_credentials"),
        ("Basic " + base64.b64encode(b"no colon").decode(), 401, "no_credentials"),
        ("Basic " + base64.b64encode(b"lease:\xff").decode(), 401, "no_credentials"),
        ("Basic " + base64.b64encode(b"lease:made-up").decode(), 403, "no_such_lease"),
        ("Basic " + base64.b64encode(b"lease:").decode(), 403, "no_such_lease"),
        ("Basic " + base64.b64encode(f"lease:{ENDED}".encode()).decode(), 410, "lease_ended"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/get_status"), ("POST", "/process_prompt")])
async def test_others_are_refused_as_at_the_lease(
    http: httpx.AsyncClient, method: str, path: str, authorization: str | None, status: int, code: str
) -> None:
    """Without readable credentials 401, which asks for Basic; an unknown token 403; that of an ended lease 410."""
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await http.request(method, path, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers.get("www-authenticate", "").startswith("Basic") == (status == 401)


async def test_root_says_what_is_here(http: httpx.AsyncClient) -> None:
    """GET / is a small page that names the API's documentation; what it names is there."""
    answer = await http.get("/")
    assert answer.status_code == 200
    assert (await http.get(answer.json()["openapi"])).json()["info"]["title"] == answer.json()["service"]
    assert (await http.get(answer.json()["api"])).status_code == 200


# --- FastAPI's own form of a 422 ---------------------------------------------------------------------------


class Plain(BaseModel):
    number: int
    names: list[str]


async def test_detail_is_what_fastapi_says() -> None:
    """A 422 has the very ``detail`` list that FastAPI itself would have answered, beside our own fields."""
    plain, ours = FastAPI(), FastAPI()
    for app in (plain, ours):

        @app.post("/")
        async def post(body: Plain) -> None:
            pass

    from deployments.serve.http_errors import _on_invalid

    ours.exception_handler(RequestValidationError)(_on_invalid)
    for content in (b"", b"{", b"[]", b'{"number": "x", "names": [1, {"deep": null}]}', b'{"names": "a"}'):
        details = []
        for app in (plain, ours):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE) as http:
                answer = await http.post("/", content=content, headers={"Content-Type": "application/json"})
                assert answer.status_code == 422
                details.append(answer.json()["detail"])
        assert details[0] == details[1]


@pytest.mark.parametrize(
    "value", [b"1e999", b'"\\ud800"', b"[" * 600 + b"]" * 600], ids=["infinity", "half a character", "deep"]
)
async def test_detail_leaves_out_what_json_can_not_hold(http: httpx.AsyncClient, value: bytes) -> None:
    """An input that no JSON can carry back is left out of ``detail``: the answer is a 422, not a 500."""
    answer = await http.post(REQUEST, content=b'{"llms": [], "measurementId": ' + value + b"}")
    assert answer.status_code == 422
    assert ["body", "measurementId"] in [problem["loc"] for problem in answer.json()["detail"]]


async def test_what_is_refused_later_has_a_detail_too(http: httpx.AsyncClient) -> None:
    """An argument that vLLM can't take is found after FastAPI's own checks; its 422 has the same form."""
    body = json.loads(recorded()[3])
    body["llms"][0]["args"]["prompting"]["surprise"] = 1
    answer = (await http.post(REQUEST, json=body)).json()
    (problem,) = answer["detail"]
    assert problem["loc"] == ["body", "llms", 0, "args", "prompting", "surprise"]
    assert problem["msg"] == answer["message"]
