"""What a web page may do at the ingress and at a wrapper: change nothing, and read nothing under another name."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments.models.sources import ModelSources
from deployments.serve.browsers import HEADERS, READING, BrowserGuard
from deployments.serve.http_app import IngressConfig, build_app
from registry.errors import UnknownMachine
from registry.settings import Settings, load_settings
from tests.support.fake_registry import TOKEN, FakeRegistry

HOSTS = ("registry.example", "llm.example.")
OWN = "registry.example:8000"
REGISTRY = FakeRegistry()
APP = build_app(IngressConfig(ModelSources(True, (), Path("/")), (), hosts=HOSTS), REGISTRY.call)
FORM = "application/x-www-form-urlencoded"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers whatever reaches it."""
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


async def answer_of(
    app: Any, method: str, path: str, headers: dict[str, str] | list[tuple[str, str]]
) -> httpx.Response:
    """The answer to a request with exactly these headers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
    }
    await app(scope | {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80)}, receive, send)
    body = b"".join(message["body"] for message in sent[1:])
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


# --- hosts -------------------------------------------------------------------------------------------------

SERVED = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "localhost.:8000",
    "localhost:",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.8.9.1:1",
    "0.0.0.0:8000",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000",
    "[::FFFF:127.0.0.1]:8000",
    "192.0.2.7:8000",
    "192.0.2.7.",
    "[2001:DB8::7]:8000",
    "[fe80::1%25eth0]:8000",
    "registry.example",
    "Registry.Example:443",
    "registry.example.:8000",
    "llm.example",
    socket.gethostname(),
    f"{socket.gethostname().upper()}:8000",
]
NOT_ALLOWED = [
    "evil.example",
    "evil.example:8000",
    "registry.example.evil.example",
    "evil-registry.example",
    "sub.registry.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost..",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "127.0.0.256",
]
BAD = [
    "",
    " ",
    ".",
    ":8000",
    "::1",
    "[::1",
    "[::1]8000",
    "[::1]:80:80",
    "[]",
    "localhost:port",
    "localhost:123456",
    "localhost:-1",
    "user@localhost",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost,evil.example",
    "localhost evil.example",
    "localhost/",
    "localhost/evil.example",
    "http://localhost",
    "localhost?",
    "localhost#",
    "localhost\\evil.example",
    "localhost\n",
    "localhost\t",
    "localhost%00",
    "löcalhost",
    "a" * 301,
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("host", "status", "code"),
    [(host, 200, None) for host in SERVED]
    + [(host, 421, "host_not_allowed") for host in NOT_ALLOWED]
    + [(host, 400, "bad_host") for host in BAD]
    + [("[fe80::zz]", 400, "bad_host"), ("[1.2.3.4]", 421, "host_not_allowed"), ("[::1::]", 421, "host_not_allowed")],
)
async def test_hosts(host: str, status: int, code: str | None, method: str) -> None:
    """Own names and addresses are served however they are spelt; others are refused, and the setting is named."""
    answer = await answer_of(BrowserGuard(echo, HOSTS), method, "/x", {"Host": host})
    assert (answer.status_code, answer.json().get("code")) == (status, code)
    assert ("http.allowed_hosts" in answer.text) == (status == 421)


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("POST", []),
        ("POST", [("X-Forwarded-Host", "localhost")]),
        ("GET", [("Host", "localhost"), ("Host", "localhost")]),
        ("GET", [("Host", "localhost"), ("Host", "evil.example")]),
        ("GET", [("Host", "evil.example"), ("Host", "localhost")]),
    ],
)
async def test_one_host_header_is_needed(method: str, headers: list[tuple[str, str]]) -> None:
    """No Host header where something changes, or a second one, is refused: servers differ in which one they believe."""
    answer = await answer_of(BrowserGuard(echo, HOSTS), method, "/x", headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_host")


async def test_a_health_check_without_a_host_is_served() -> None:
    """Load balancers ask by HTTP/1.0 without a Host; no browser does."""
    assert (await answer_of(BrowserGuard(echo, HOSTS), "GET", "/healthz", [])).status_code == 200


async def test_forwarded_hosts_are_not_believed() -> None:
    """A page can set no Host header, but others: they open nothing."""
    headers = {"Host": "evil.example", "X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
    assert (await answer_of(BrowserGuard(echo, HOSTS), "GET", "/x", headers)).status_code == 421


@pytest.mark.parametrize(
    ("http", "hosts"),
    [
        ("{}", ("127.0.0.1",)),
        ("{host: Head.example, haproxy: false}", ("head.example",)),
        (
            "{public_url: 'https://LLM.example/registry', allowed_hosts: [Other.example]}",
            ("llm.example", "other.example"),
        ),
        ("{public_url: 'http://bücher.example:8000'}", ("xn--bcher-kva.example",)),
        ("{public_url: 'http://[fd00::1]:8000'}", ("fd00::1",)),
    ],
)
def test_hosts_of_the_settings(tmp_path: Path, http: str, hosts: tuple[str, ...]) -> None:
    """What is published, listened on, or allowed is served."""
    path = tmp_path / "config.yaml"
    path.write_text(f"http: {http}\naccess: {{keys: true}}")
    assert set(load_settings(path).served_hosts) >= set(hosts)


@pytest.mark.parametrize("host", ["http://x", "x:80", "x/", "", "*", "*.example", "[::1]", "x.", "bücher.example"])
def test_odd_hosts_in_the_settings_are_refused(host: str) -> None:
    """An entry that no request could match is an error."""
    with pytest.raises(ValueError):
        Settings(http={"allowed_hosts": (host,)})  # type: ignore[arg-type]


# --- origins -----------------------------------------------------------------------------------------------

FROM: list[tuple[dict[str, str], bool]] = [
    ({}, True),
    ({"Origin": f"http://{OWN}"}, True),
    ({"Origin": f"HTTP://{OWN.upper()}"}, True),
    ({"Origin": f"https://{OWN}"}, True),  # behind a server for TLS, which the app can't see
    ({"Origin": f"http://{OWN}", "Sec-Fetch-Site": "same-origin"}, True),
    ({"Sec-Fetch-Site": "none"}, True),
    ({"Referer": "http://evil.example/page"}, True),
    ({"Sec-Fetch-Mode": "cors"}, True),  # Node's fetch
    ({"Origin": "null"}, False),
    ({"Origin": ""}, False),
    ({"Origin": "http://evil.example"}, False),
    ({"Origin": "http://registry.example"}, False),
    ({"Origin": "http://registry.example:8001"}, False),
    ({"Origin": "http://localhost:8000"}, False),
    ({"Origin": f"http://{OWN}.evil.example"}, False),
    ({"Origin": f"http://{OWN}/"}, False),
    ({"Origin": f"http://evil.example@{OWN}"}, False),
    ({"Origin": f"http://{OWN} http://evil.example"}, False),
    ({"Origin": f"chrome-extension://{OWN}"}, False),
    ({"Origin": f"file://{OWN}"}, False),
    ({"Origin": OWN}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False),
    ({"Sec-Fetch-Site": "same-site"}, False),
    ({"Sec-Fetch-Site": "same-party"}, False),
    ({"Origin": f"http://{OWN}", "Sec-Fetch-Site": "same-site"}, False),
    ({"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, False),
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "QUERY"])
@pytest.mark.parametrize(("headers", "passes"), FROM, ids=[str(headers) for headers, _ in FROM])
async def test_origins(method: str, headers: dict[str, str], passes: bool) -> None:
    """Pages of other origins change nothing; programs, own pages, and everything that only reads are not concerned."""
    answer = await answer_of(BrowserGuard(echo, HOSTS), method, "/x", {"Host": OWN} | headers)
    if passes or method in READING:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", "http://localhost", 200),
        ("localhost:80", "http://localhost", 200),
        ("localhost", "http://localhost:80", 200),
        ("localhost", "https://localhost:443", 200),
        ("localhost", "http://localhost:443", 403),
        ("localhost:443", "http://localhost", 403),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("[::1]", "http://[::1]:80", 200),
        ("[::1]:8000", "http://[::1]:8001", 403),
        ("127.0.0.1:8000", "http://localhost:8000", 403),
        ("localhost:8080", "http://localhost:80", 403),
    ],
)
async def test_ports_of_origins(host: str, origin: str, status: int) -> None:
    """An origin has a port; the one of its scheme may be left out."""
    answer = await answer_of(BrowserGuard(echo, ()), "POST", "/x", {"Host": host, "Origin": origin})
    assert answer.status_code == status


async def test_each_of_several_origins_counts() -> None:
    """A second header hides nothing."""
    origins = [("Host", OWN), ("Origin", f"http://{OWN}"), ("Origin", "http://evil.example")]
    assert (await answer_of(BrowserGuard(echo, HOSTS), "POST", "/x", origins)).status_code == 403


@pytest.mark.parametrize(("path", "shape"), [("/t/v1/completions", "openai"), ("/t/process_prompt", "ours")])
async def test_refusals_have_the_shape_of_their_path(path: str, shape: str) -> None:
    """Below /v1 a refusal is OpenAI's error, elsewhere ours."""
    answer = await answer_of(BrowserGuard(echo, HOSTS), "POST", path, {"Host": OWN, "Origin": "null"})
    found = answer.json()["error"] if shape == "openai" else answer.json()
    assert found["code"] == "cross_origin"


# --- the routes of the ingress -----------------------------------------------------------------------------


def changing_routes() -> Iterator[tuple[str, str]]:
    """Each method and path of the ingress that may change something; fails at a kind of route that is unknown here."""
    for route in APP.routes:
        assert isinstance(route, Route)
        path = re.sub(r"\{[^}]+\}", "a", route.path)
        yield from ((method, path) for method in (route.methods or set()) - READING)


CHANGING = sorted(changing_routes())


def test_changing_routes_are_found() -> None:
    """The walk finds the routes that are known to change something."""
    assert {
        ("POST", "/promptingservice/request"),
        ("DELETE", "/promptingservice/request/a"),
        ("POST", "/machines/a/drain"),
        ("POST", "/process_prompt"),
    } <= set(CHANGING)
    documented = {(m.upper(), re.sub(r"\{[^}]+\}", "a", p)) for p, item in APP.openapi()["paths"].items() for m in item}
    assert {(method, path) for method, path in documented if method not in READING} == set(CHANGING)


@pytest.mark.parametrize(("method", "path"), CHANGING)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": OWN, "Origin": "http://evil.example"}, 403),
        ({"Host": OWN, "Origin": "null"}, 403),
        ({"Host": OWN, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": OWN, "Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, 421),
    ],
)
async def test_every_route_that_changes_something_is_guarded(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """No route of the ingress lets a foreign page change something, nor DNS rebinding; the registry hears nothing."""
    before = len(REGISTRY.calls)
    assert (await answer_of(APP, method, path, headers)).status_code == status
    assert len(REGISTRY.calls) == before


OF_THE_PROMPTING_SERVICE = ("/promptingservice/", "/process_prompt")


@pytest.mark.parametrize(("method", "path"), CHANGING)
@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"Content-Length": "0"}, True),
        ({"Content-Length": "2", "Content-Type": "application/json"}, True),
        ({"Content-Length": "2", "Content-Type": "Application/JSON; charset=utf-8"}, True),
        ({"Content-Length": "2"}, False),
        ({"Transfer-Encoding": "chunked"}, False),
        ({"Content-Length": "2", "Content-Type": "text/plain"}, False),
        ({"Content-Length": "2", "Content-Type": "text/plain; application/json"}, False),
        ({"Content-Length": "2", "Content-Type": "application/json5"}, False),
        ({"Content-Length": "2", "Content-Type": "multipart/form-data; boundary=a"}, False),
        # What a browser that is too old to send Origin does for a form, even for an empty one:
        ({"Content-Length": "0", "Content-Type": FORM}, False),
        ({"Content-Length": "0", "Content-Type": "text/plain"}, False),
    ],
)
async def test_every_body_is_json(method: str, path: str, headers: dict[str, str], passes: bool) -> None:
    """What changes something takes no form; the Prompting Service's paths, whose client sends no type, take any."""
    answer = await answer_of(APP, method, path, {"Host": OWN} | headers)
    if passes or path.startswith(OF_THE_PROMPTING_SERVICE):
        assert answer.status_code not in (403, 415, 421)
    else:
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


# --- headers -----------------------------------------------------------------------------------------------


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=APP, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/machines", {"Origin": "http://evil.example"}, 200),
        ("GET", "/openapi.json", {}, 200),
        ("POST", "/machines/a/drain", {}, 200),
        ("GET", "/get_status", {"Authorization": httpx.BasicAuth("lease", TOKEN)._auth_header}, 307),
        ("GET", "/get_status", {}, 401),
        ("GET", "/nowhere", {}, 404),
        ("PUT", "/machines", {}, 405),
        ("OPTIONS", "/machines", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, 405),
        ("GET", "/measurements/0", {}, 422),
        ("GET", "/machines", {"Host": "evil.example"}, 421),
        ("DELETE", "/machines/a/drain", {"Origin": "null"}, 403),
    ],
)
async def test_every_answer_has_the_headers(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """Each answer says what a browser may do with it: not embed, guess its type, keep it, or show it to other pages."""
    answer = await http.request(method, path, headers=headers)
    assert answer.status_code == status
    for name, value in HEADERS:
        assert answer.headers.get_list(name.decode()) == [value.decode()]
    assert [name for name in answer.headers if name.startswith("access-control-")] == []
    if status == 403:
        assert answer.json()["code"] == "cross_origin"


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError(), 500), (UnknownMachine("x", "there are none"), 404)]
)
async def test_errors_have_the_headers(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """So does an answer to a fault of our own."""
    monkeypatch.setattr(REGISTRY, "error", error)
    answer = await http.get("/machines")
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (status, "nosniff")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_no_page_loads_from_elsewhere(http: httpx.AsyncClient, path: str) -> None:
    """FastAPI's own pages, which load scripts of a content network, are off."""
    assert (await http.get(path)).status_code == 404


async def test_an_app_behind_it_can_allow_no_other_origin() -> None:
    """What vLLM's app says of CORS goes to nobody; a header that an answer has itself stays."""

    async def page(_request: object) -> PlainTextResponse:
        return PlainTextResponse("x", headers={"cache-control": "no-cache", "content-security-policy": "default-src *"})

    cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"])
    app = Starlette(routes=[Route("/x", page)], middleware=[cors])
    headers = {"Host": OWN, "Origin": "http://evil.example"}
    assert (await answer_of(app, "GET", "/x", headers)).headers["access-control-allow-origin"]
    guarded = BrowserGuard(app, HOSTS)
    answer = await answer_of(guarded, "GET", "/x", headers)
    assert [name for name in answer.headers if name.startswith("access-control-")] == []
    assert answer.headers.get_list("cache-control") == ["no-cache"]
    assert answer.headers.get_list("content-security-policy") == ["default-src *"]
    asks = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = await answer_of(guarded, "OPTIONS", "/x", asks)
    assert [name for name in answer.headers if name.startswith("access-control-")] == []


# --- what is no HTTP request -------------------------------------------------------------------------------


async def hello(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Host": "evil.example"}, False),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, False),
    ],
)
def test_websockets_are_guarded(headers: dict[str, str], passes: bool) -> None:
    """Browsers let any page open a WebSocket and read it, so it is like a request that changes something."""
    client = TestClient(BrowserGuard(Starlette(routes=[WebSocketRoute("/x", hello)]), ()))
    if passes:
        with client.websocket_connect("ws://localhost/x", headers=headers) as connection:
            assert connection.receive_text() == "hello"
    else:
        with (
            pytest.raises(WebSocketDisconnect) as refused,
            client.websocket_connect("ws://localhost/x", headers=headers),
        ):
            pass
        assert refused.value.code == 1008


async def test_lifespan_is_passed_on() -> None:
    """Serve starts and stops the app behind the guard as without it."""
    scopes: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        scopes.append(scope)

    async def never(*_: object) -> Any:
        raise AssertionError

    await BrowserGuard(app, ())({"type": "lifespan"}, never, never)
    assert scopes == [{"type": "lifespan"}]
