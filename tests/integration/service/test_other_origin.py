"""A hostile web page in a real browser, before the ingress with a real service: it reads and changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.store.migrations.tables import AUDIT, METADATA
from registry.wire.words import Role
from tests.integration.service.test_audit import rows, send
from tests.integration.service.test_identities import BODIES
from tests.support.app_server import served
from tests.support.browser import QUIET, installed_chromium
from tests.support.keyed_registry import Scene, keyed_scene
from tests.support.service_world import ServiceWorld

PAGE = (Path(__file__).resolve().parents[2] / "support" / "hostile_page.html").read_text()
EVIL = "evil.example"
"""A name of the page's author; the browser finds it on this machine."""
PUBLIC = {"/", "/healthz"}
"""Paths that need no key."""
LIMIT_S = 180.0
"""Time limit of one page, seconds; it takes 20 s on two processors."""
SANDBOX = "sandbox allow-scripts allow-forms"
"""A policy that gives a page the origin ``null``."""


@dataclass
class Seen:
    """A request that came to the registry, and its answer's status; 0: none."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    code: str = ""


@dataclass
class Server:
    """The registry on a port, and before it the pages of the attacker, whose server has the name at first.

    With ``app`` None it is the attacker's server alone.
    """

    app: ASGIApp | None
    port: int = 0
    page: str = ""
    policy: str = ""
    seen: list[Seen] = field(default_factory=list)
    report: asyncio.Future[list[dict[str, str]]] = field(default_factory=asyncio.Future)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/attacker/report":
            await self._take_report(receive)
            await _answer(send, b"")
        elif scope["path"] == "/attacker/page":
            await _answer(send, self.page.encode(), self.policy)
        elif self.app is not None:
            await self._serve(self.app, scope, receive, send)
        else:
            await _answer(send, b"")

    async def _take_report(self, receive: Receive) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if not self.report.done():
            self.report.set_result(json.loads(body))

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        one = Seen(scope.get("method", "WebSocket"), scope["path"], headers)
        self.seen.append(one)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                one.status = message["status"]
            elif message["type"] == "websocket.close":
                one.status = 403  # as the server answers a handshake that is closed before it is accepted
            elif one.status >= 400 and not one.code and message.get("body"):
                with suppress(ValueError):
                    one.code = json.loads(message["body"]).get("code", "")
            elif message["type"] == "websocket.accept":
                one.status = 101
            await send(message)

        await app(scope, receive, noting)


async def _answer(send: Send, body: bytes, policy: str = "") -> None:
    headers = [(b"content-type", b"text/html")] + [(b"content-security-policy", policy.encode())] * bool(policy)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    """Listen on a free port of 127.0.0.1."""
    async with served(server, ws="websockets-sansio") as server.port:
        yield server


@asynccontextmanager
async def browsing(url: str, profile: Path) -> AsyncIterator[None]:
    """Have a page open in Chromium."""
    names = f"--host-resolver-rules=MAP {EVIL} 127.0.0.1,EXCLUDE 127.0.0.1,EXCLUDE localhost,MAP * ~NOTFOUND"
    command = [installed_chromium(), *QUIET, names, f"--user-data-dir={profile}", url]
    with (profile.parent / "chromium.log").open("w") as log:
        browser = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            await browser.wait()


def stored(folder: Path) -> dict[str, list[Any]]:
    """All rows of the registry's database but the audit's."""
    with closing(sqlite3.connect(folder / "registry.db")) as database:
        tables = [table.name for table in METADATA.sorted_tables if table is not AUDIT]
        return {name: sorted(database.execute(f"SELECT * FROM {name}"), key=repr) for name in tables}


@dataclass
class Attack:
    """What a page tried: ``report`` is what it saw, ``registry`` what came to the registry."""

    calls: list[dict[str, str]]
    registry: Server
    report: list[dict[str, str]]
    scene: Scene
    before: dict[str, list[Any]]
    after: dict[str, list[Any]]

    def came(self) -> set[tuple[str, str]]:
        return {(one.method, one.path) for one in self.registry.seen}

    def read(self) -> list[dict[str, str]]:
        """Attempts in which the page got a text or a status of the registry's."""
        nothing = ("opaque 0", "load", "error", "silence", "sent", "refused", "tried")
        return [each for each in self.report if each["text"] or not each["outcome"].endswith(("Error", *nothing))]


def calls_of(document: dict[str, Any], scene: Scene, key_id: str) -> list[dict[str, str]]:
    """Each method of each path of the OpenAPI document, with ids that exist and bodies that are accepted."""
    names = {"request_id": scene.request_id, "measurement_id": 7, "machine_id": "a", "key_id": key_id}
    return [
        {"method": method.upper(), "path": path.format(**names), "body": json.dumps(BODIES.get(path, {}))}
        for path, item in document["paths"].items()
        for method in item
    ]


async def attack(world: ServiceWorld, folder: Path, page: str, target: str, *, keys: bool, policy: str = "") -> Attack:
    """Open the page at ``page``, which attacks the registry at ``target``: URLs with ``{own}`` and ``{registry}``."""
    async with keyed_scene(world, {"s": 0.0}, keys=keys) as scene:
        victim = scene.make("victim", Role.VIEWER)
        document = (await scene.http.get("/openapi.json")).json()
        calls = calls_of(document, scene, victim)
        app: ASGIApp = scene.http._transport.app  # type: ignore[attr-defined]
        async with serving(Server(app, policy=policy)) as registry, serving(Server(None, policy=policy)) as attacker:
            ports = {"own": attacker.port, "registry": registry.port}
            plan = {"base": target.format(**ports), "calls": calls, "key": scene.keys["operator"]}
            attacker.page = registry.page = PAGE.replace("PLAN", json.dumps(plan), 1)
            scene.service.keys.note_used()  # the scene has used some
            before = stored(folder)
            async with browsing(page.format(**ports) + "/attacker/page", folder / "profile"):
                reports = (registry.report, attacker.report)
                done, _ = await asyncio.wait(reports, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
                assert done, f"no report of the page: {(folder / 'chromium.log').read_text()[-3000:]}"
            (report,) = done
            registry.seen = [one for one in registry.seen if one.path != "/favicon.ico"]
            await send(scene)
            return Attack(calls, registry, report.result(), scene, before, stored(folder))


HERE, THERE = "http://127.0.0.1:{own}", "http://127.0.0.1:{registry}"
FOREIGN = {
    "other port": (HERE, THERE, False, ""),
    # Cookies are sent to all ports of a host. The page puts the operator's key into some.
    "other port, keys": (HERE, THERE, True, ""),
    "other name": ("http://localhost:{own}", THERE, False, ""),
    "other site": (f"http://{EVIL}:{{own}}", "http://localhost:{registry}", False, ""),
    "other site, keys": (f"http://{EVIL}:{{own}}", THERE, True, ""),
    "no origin": (HERE, THERE, False, SANDBOX),
}
"""The page's own address, the registry's, whether it asks for keys, and the policy of the page."""


@pytest.fixture(autouse=True)
def _a_browser_is_there() -> None:
    installed_chromium()


ALWAYS = ("other site", "other port, keys")
"""The origins that `make test` tries, too: each takes ten seconds of a browser's time. `make test-long` tries all."""


@pytest.mark.parametrize(
    "origin", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in FOREIGN]
)
async def test_a_page_of_another_origin(world: ServiceWorld, tmp_path: Path, origin: str) -> None:
    """Each way to send each call changes nothing, and the page reads no answer, even if it has the operator's key."""
    page, target, keys, policy = FOREIGN[origin]
    tried = await attack(world, tmp_path, page, target, keys=keys, policy=policy)
    # It did try: what a page may send has come, what needs a question first was only asked.
    for call in tried.calls:
        method = call["method"] if call["method"] in ("GET", "POST") else "OPTIONS"
        assert (method, call["path"]) in tried.came()
    assert not {method for method, _ in tried.came()} - {"GET", "POST", "OPTIONS", "WebSocket"}
    assert {each["how"] for each in tried.report} >= {"cors", "no-cors", "iframe", "form text/plain", "WebSocket"}
    assert tried.read() == []
    assert not {each["how"] for each in tried.report if each["outcome"] == "load"} & {"img", "script", "link"}
    assert tried.after == tried.before
    for one in tried.registry.seen:
        if one.method == "POST":
            assert (one.status, one.code) == (403, "cross_origin"), one
        elif one.method in ("OPTIONS", "WebSocket"):
            assert one.status >= 400, one
        elif keys and one.path not in PUBLIC:
            assert one.status == 401, one
        assert not one.headers.get("authorization", "").startswith("Bearer"), one
    if origin == "other port, keys":
        assert any(tried.scene.keys["operator"] in one.headers.get("cookie", "") for one in tried.registry.seen)
    posts = sum(one.method == "POST" for one in tried.registry.seen)
    assert sum(row.count for row in rows(tried.scene) if row.code == "cross_origin") == posts


@pytest.mark.parametrize(
    "keys", [pytest.param(False, marks=pytest.mark.long, id="no keys"), pytest.param(True, id="keys")]
)
async def test_a_page_after_dns_rebinding(world: ServiceWorld, tmp_path: Path, keys: bool) -> None:
    """A page whose name has become the registry's is of the same origin for the browser. It reads only refusals."""
    name = f"http://{EVIL}:{{registry}}"
    tried = await attack(world, tmp_path, name, name, keys=keys)
    assert tried.came() >= {(call["method"], call["path"]) for call in tried.calls}
    assert any(one.headers.get("authorization", "").startswith("Bearer") for one in tried.registry.seen)
    assert {one.status for one in tried.registry.seen if one.method != "WebSocket"} == {421}
    assert {one.status for one in tried.registry.seen if one.method == "WebSocket"} == {403}
    for each in tried.read():
        assert each["outcome"] == "basic 421", each
        assert json.loads(each["text"])["code"] == "host_not_allowed", each
    assert tried.after == tried.before
    refused = sum(row.count for row in rows(tried.scene) if row.code == "host_not_allowed")
    # A 421 of /process_prompt, which changes nothing, is not audited.
    assert refused == sum(
        one.method in ("POST", "DELETE") and one.path != "/process_prompt" for one in tried.registry.seen
    )
