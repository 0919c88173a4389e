"""What the audit has after calls over HTTP, with the real service and its keys behind the ingress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from deployments.serve import audit, identities
from deployments.serve.client_address import FORWARDED_HEADER, SOURCE_HEADER
from registry.errors import RegistryUnavailable
from registry.service.audit import ROWS, ROWS_OF_ONE, Audit
from registry.store.rows import AuditRow
from registry.wire.words import RequestStatus, Role
from tests.support.keyed_registry import FRONT, LLM, OLD_CLIENT, REQUEST, Scene, keyed_scene
from tests.support.service_world import ServiceWorld

SOURCE, FORWARDED = SOURCE_HEADER.decode(), FORWARDED_HEADER.decode()
HERE, STRANGER = "127.0.0.1", "192.0.2.1"


@pytest.fixture
async def scene(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """A registry with keys, whose refused calls are sent when a test says so: see ``sent``."""
    now = {"s": 1000.0}
    monkeypatch.setattr(identities, "monotonic", lambda: now["s"])
    monkeypatch.setattr(audit, "monotonic", lambda: now["s"])
    async with keyed_scene(world, now) as scene:
        yield scene


def rows(scene: Scene) -> list[AuditRow]:
    return [stored.row for stored in scene.service._store.audit().rows]


async def sent(scene: Scene) -> list[AuditRow]:
    """Send the refused calls, and return the rows that are new."""
    before = len(rows(scene))
    await send(scene)
    return rows(scene)[before:]


async def send(scene: Scene) -> None:
    trail = trail_of(scene)
    if trail._sending is not None:
        trail._sending.cancel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "SEND_EVERY_S", 0.0)
        await trail._send()


def trail_of(scene: Scene) -> audit.AuditTrail:
    trail = scene.http._transport.app.middleware_stack  # type: ignore[attr-defined]
    assert isinstance(trail, audit.AuditTrail)
    return trail


def key_id(scene: Scene, caller: str) -> str:
    return scene.keys[caller].split("_")[1]


async def test_each_change_has_its_row(scene: Scene) -> None:
    """Who, when, from where, what, about what, and the outcome; at the time of the change."""
    now_s = scene.world.clock.now_s
    client, operator = key_id(scene, "client"), key_id(scene, "operator")
    posted = AuditRow("POST", REQUEST, 201, None, client, Role.CLIENT, "lab", HERE, scene.request_id, now_s)
    assert rows(scene) == [posted]
    where = {"headers": {SOURCE: OLD_CLIENT}}
    assert (await scene.ask("POST", "/machines/a/drain", "operator", **where)).status_code == 200
    assert (await scene.ask("DELETE", "/machines/a/drain", "operator")).status_code == 200
    made = (await scene.ask("POST", "/keys", "operator", json={"role": "client", "tenant": "lab"})).json()["id"]
    assert (await scene.ask("DELETE", f"/keys/{made}", "operator")).status_code == 204
    path = f"{REQUEST}/{scene.request_id}"
    assert (await scene.ask("DELETE", path, "operator")).status_code == 204
    seen = [(r.method, r.path, r.status, r.key_id, r.tenant, r.source, r.subject) for r in rows(scene)[1:]]
    assert seen == [
        ("POST", "/machines/{machine_id}/drain", 200, operator, None, OLD_CLIENT, "a"),
        ("DELETE", "/machines/{machine_id}/drain", 200, operator, None, HERE, "a"),
        ("POST", "/keys", 201, operator, "lab", HERE, made),
        ("DELETE", "/keys/{key_id}", 204, operator, "lab", HERE, made),
        ("DELETE", REQUEST + "/{request_id}", 204, operator, "lab", HERE, scene.request_id),
    ]
    assert {(r.at_s, r.count, r.code) for r in rows(scene)} == {(now_s, 1, None)}


async def test_a_withdrawal_has_its_row(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A POST whose client gets no answer is accepted, and its requests are ended: both with the caller of the POST."""
    wait = asyncio.Event()

    async def granted(_: object) -> None:
        wait.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(scene.service, "granted", granted)
    where = {"json": {"measurementId": 8, "llms": [LLM, LLM]}, "headers": {SOURCE: "10.1.2.3"}}
    post = asyncio.create_task(scene.ask("POST", REQUEST, "client", **where))
    await wait.wait()
    post.cancel()  # as Serve does when the client hangs up
    with pytest.raises(asyncio.CancelledError):
        await post
    first, second = (each.request_id for each in scene.service.archive.requests_of(("lab", 8)))
    await scene.service.wait_for_change(second, 10.0, RequestStatus.QUEUED)
    posted = AuditRow("POST", REQUEST, 201, None, key_id(scene, "client"), Role.CLIENT, "lab", "10.1.2.3", first)
    posted = replace(posted, at_s=scene.world.clock.now_s)
    ended = replace(posted, method="withdraw", path=REQUEST + "/{request_id}", status=204)
    assert rows(scene)[1:] == [posted, ended, replace(ended, subject=second)]


@pytest.mark.parametrize(
    ("source", "forwarded", "shown"),
    [
        (FRONT, OLD_CLIENT, OLD_CLIENT),
        (FRONT, f"{STRANGER}, {OLD_CLIENT}", OLD_CLIENT),  # the client itself wrote the first one
        (STRANGER, OLD_CLIENT, STRANGER),  # no trusted proxy: what it names is not read
        (FRONT, f"{OLD_CLIENT}, unknown", None),
        (FRONT, "gp_0a1b2c3d_secret", None),
        (FRONT, "", None),
        (FRONT, FRONT, None),
    ],
)
async def test_an_address_is_the_clients(scene: Scene, source: str, forwarded: str, shown: str | None) -> None:
    """Behind a trusted proxy it is the one that the proxy names. Nobody else can name one; if it is unclear, none is.

    This holds for accepted and for refused calls.
    """
    claims = {"X-Forwarded-For": "10.9.9.9", "X-Real-IP": "10.9.9.9", "Forwarded": "for=10.9.9.9"}
    headers = {**claims, SOURCE: source, FORWARDED: forwarded}
    assert (await scene.ask("POST", "/machines/a/drain", "operator", headers=headers)).status_code == 200
    assert (rows(scene)[-1].path, rows(scene)[-1].source) == ("/machines/{machine_id}/drain", shown)
    assert (await scene.ask("GET", "/audit", "wrong", headers=headers)).status_code == 401
    assert [(row.status, row.source) for row in await sent(scene)] == [(401, shown)]


async def test_what_changes_nothing_has_no_row(scene: Scene) -> None:
    """Reads, a keep-alive, and calls that were made before."""
    body = {"json": {"measurementId": 9, "llms": [LLM]}, "headers": {"Idempotency-Key": "once"}}
    path = f"{REQUEST}/{scene.request_id}"
    calls = [
        ("POST", REQUEST, "client", body),
        ("DELETE", path, "client", {}),
        ("POST", "/machines/a/drain", "operator", {}),
    ]
    for method, where, caller, options in calls:
        assert (await scene.ask(method, where, caller, **options)).is_success
    before = rows(scene)
    for method, where, caller, options in calls:
        assert (await scene.ask(method, where, caller, **options)).is_success
    assert (await scene.ask("POST", f"{path}/keepalive", "client")).is_success
    assert (await scene.ask("GET", "/machines", "viewer")).is_success
    assert (await scene.ask("GET", "/machines/unknown", "client")).status_code == 404
    assert (await scene.ask("GET", f"{REQUEST}/unknown", "operator")).status_code == 404
    assert (await scene.ask("GET", "/get_status", "nobody")).status_code == 401
    assert [row.path for row in await sent(scene)] == ["/get_status"], "a refused identity has a row on every path"
    assert rows(scene)[:-1] == before


async def test_refused_calls_have_rows(scene: Scene) -> None:
    """Those of a stranger, of a revoked key, of a role that may not; and errors of calls that change something."""
    path = f"{REQUEST}/{scene.request_id}"
    asked: list[tuple[str, str, str, dict[str, Any]]] = [
        ("GET", "/machines", "nobody", {}),
        ("GET", "/nothing/at/all?key=x", "wrong", {}),
        ("GET", "/machines", "revoked", {}),
        ("DELETE", path, "viewer", {}),
        ("DELETE", path, "other", {}),
        ("GET", path, "other", {}),
        ("POST", f"{path}/keepalive", "other", {}),
        ("POST", "/machines/nowhere/drain", "operator", {}),
        ("POST", REQUEST, "client", {"json": {"measurementId": 0}}),
        ("POST", "/keys", "operator", {"json": {}, "headers": {"Origin": "https://evil.example"}}),
    ]
    for method, where, caller, options in asked:
        assert not (await scene.ask(method, where, caller, **options)).is_success
    scene.now["s"] += 30.0
    found = await sent(scene)
    ids = {key_id(scene, caller): caller for caller in ("revoked", "viewer", "other", "operator", "client")}
    assert [(r.method, r.path, r.status, r.code, ids.get(r.key_id or ""), r.subject) for r in found] == [
        ("GET", "/machines", 401, "key_needed", None, None),
        ("GET", None, 401, "key_refused", None, None),
        ("GET", "/machines", 401, "key_refused", "revoked", None),
        ("DELETE", REQUEST + "/{request_id}", 403, "not_allowed", "viewer", scene.request_id),
        ("DELETE", REQUEST + "/{request_id}", 404, "unknown_request", "other", scene.request_id),
        ("GET", REQUEST + "/{request_id}", 404, "unknown_request", "other", scene.request_id),
        ("POST", REQUEST + "/{request_id}/keepalive", 404, "unknown_request", "other", scene.request_id),
        ("POST", "/machines/{machine_id}/drain", 404, "unknown_machine", "operator", "nowhere"),
        ("POST", REQUEST, 422, "invalid_field", "client", None),
        ("POST", "/keys", 403, "cross_origin", None, None),
    ]
    assert {row.at_s for row in found} == {scene.world.clock.now_s - 30.0}, "the time of the call"


async def test_wrong_keys_make_few_rows(scene: Scene) -> None:
    """A thousand wrong keys, at many paths and from many addresses, make a bounded number of rows; all are counted."""
    calls = 1000
    for number in range(calls):
        headers = {"Authorization": f"Bearer gp_{number:08x}_{'x' * 43}", SOURCE: f"10.1.{number % 7}.{number % 50}"}
        path = ("/machines", "/llms", f"/keys/{number:08x}", f"/no/{number}")[number % 4]
        answer = await scene.http.request(("GET", "DELETE", f"X{number}")[number % 3], path, headers=headers)
        assert answer.status_code == 401
    found = await sent(scene)
    assert sum(row.count for row in found) == calls
    assert len(found) == ROWS + 1  # all have the same code
    assert {row.code for row in found} == {"key_refused"}
    assert await sent(scene) == []
    one = {"Authorization": f"Bearer gp_{'0' * 8}_{'x' * 43}"}
    for number in range(calls // 10):
        await scene.http.request("DELETE", "/keys/ffffffff", headers=one, params={"n": number})
    assert [(row.count, row.source) for row in await sent(scene)] == [(calls // 10, HERE)]


async def test_a_key_can_not_fill_the_audit(scene: Scene) -> None:
    """Refused calls of one key about many ids are counted in few rows; other keys still get their own."""
    for number in range(100):
        assert (await scene.ask("DELETE", f"{REQUEST}/{number}", "client")).status_code == 404
    assert (await scene.ask("DELETE", f"{REQUEST}/1", "other")).status_code == 404
    found = await sent(scene)
    assert [row.subject for row in found] == [*map(str, range(ROWS_OF_ONE)), None, "1"]
    assert found[ROWS_OF_ONE].count == 100 - ROWS_OF_ONE


async def test_refused_calls_wait_for_the_registry(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the registry does not answer, they are counted on."""
    answers = [RegistryUnavailable("restarting"), None]
    add = Audit.add_refusals

    def refuse(self: Audit, given: Any) -> None:
        error = answers.pop(0)
        if error is not None:
            scene.now["s"] += 60.0
            raise error
        add(self, given)

    monkeypatch.setattr(Audit, "add_refusals", refuse)
    await scene.ask("GET", "/machines", "nobody")
    (row,) = await sent(scene)
    assert (row.count, row.at_s) == (1, scene.world.clock.now_s - 60.0)


async def test_they_are_sent_by_themselves(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first refused call starts the clock."""
    monkeypatch.setattr(audit, "SEND_EVERY_S", 0.001)
    await scene.ask("GET", "/machines", "nobody")
    sending = trail_of(scene)._sending
    assert sending is not None
    await asyncio.wait_for(sending, 10.0)
    assert rows(scene)[-1].code == "key_needed"


async def test_strangers_choose_no_id(scene: Scene) -> None:
    """A call that was refused before its key was checked, or without a valid one, has no id of the caller's choice."""
    path = f"{REQUEST}/chosen"
    before_the_key: list[tuple[dict[str, Any], str]] = [
        ({"headers": {"Origin": "https://evil.example"}}, "cross_origin"),
        ({"headers": {"Host": "evil.example"}}, "host_not_allowed"),
        ({"headers": {"Host": "/"}}, "bad_host"),
    ]
    for options, code in before_the_key:
        for caller in ("nobody", "wrong", "operator"):
            assert (await scene.ask("DELETE", path, caller, **options)).json()["code"] == code
    form = {"headers": {"Content-Type": "text/plain"}, "content": "{}"}
    assert (await scene.ask("POST", "/machines/chosen/drain", "operator", **form)).status_code == 415
    for caller in ("nobody", "wrong", "revoked", "expired"):
        assert (await scene.ask("DELETE", path, caller)).status_code == 401
    found = await sent(scene)
    assert sum(row.count for row in found) == 14
    assert {row.subject for row in found} == {None}
    assert {row.key_id for row in found} == {None, key_id(scene, "revoked"), key_id(scene, "expired")}


async def test_a_trusted_client_is_seen_behind_noise(scene: Scene) -> None:
    """Clients without a key that poll all the time hide neither its refused calls, nor who tries wrong keys."""
    for number in range(ROWS + 10):
        await scene.ask("GET", "/machines", "nobody", headers={SOURCE: f"10.1.0.{number}"})
    drain = await scene.ask("POST", "/machines/a/drain", "", headers={SOURCE: OLD_CLIENT})
    assert drain.status_code == 403
    await scene.ask("GET", "/machines", "wrong", headers={SOURCE: STRANGER})
    found = [(row.code, row.path, row.source, row.tenant, row.subject) for row in await sent(scene)]
    assert found[-2:] == [
        ("not_allowed", "/machines/{machine_id}/drain", OLD_CLIENT, "old", "a"),
        ("key_refused", "/machines", STRANGER, None, None),
    ]


async def test_no_secret_is_in_the_audit(scene: Scene) -> None:
    """Neither keys nor tokens of leases, wherever a caller puts them; nor bodies and query strings."""
    token = "aB3_" + "x-9Z" * 9 + "xyz"
    secrets = [*scene.keys.values(), token[:43], "hf_" + "h" * 34, "s3cret"]
    await sent(scene)
    before = len(rows(scene))
    for caller in ("nobody", *scene.keys):
        for secret in secrets:
            for place in (f"{REQUEST}/{secret}", f"/keys/{secret}", f"/machines/{secret}/drain", f"/{secret}"):
                await scene.ask("DELETE", place, caller, params={"key": "s3cret"})
                await send(scene)  # each in its own minute: after a few calls of one caller, ids are left out anyway
            await scene.ask("POST", "/keys", caller, json={"role": "viewer", "name": "s3cret"})
            await scene.ask("POST", REQUEST, caller, json={"like": secret, "llms": [LLM]})
            await scene.ask("GET", "/machines", "", headers={"Authorization": secret, "X-Tenant": secret})
            await send(scene)
    seen = repr(rows(scene))
    assert len(rows(scene)) - before > len(secrets) * 7 * 5
    # An id in a path is kept if it can't be a secret of ours.
    assert "subject='s3cret'" in seen
    assert "/keys/s3cret" not in seen
    for secret in secrets[:-1]:
        assert secret[-30:] not in seen
    answer = await scene.ask("GET", "/audit", "operator")
    assert not [secret for secret in secrets[:-1] if secret in answer.text]


async def test_the_audit_comes_in_pages(scene: Scene) -> None:
    """Oldest first, with the filters of the page; `next` leads to the rest."""
    for _ in range(2):
        await scene.ask("POST", "/machines/a/drain", "operator")
        scene.world.clock.now_s += 60.0
        await scene.ask("DELETE", "/machines/a/drain", "operator")
    everything = (await scene.ask("GET", "/audit", "operator")).json()
    assert [each["number"] for each in everything["entries"]] == [1, 2, 3, 4, 5]
    assert everything["next"] is None
    paged: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = (await scene.ask("GET", "/audit", "operator", params={"limit": 2, "after": after})).json()
        paged += page["entries"]
        after = page["next"]
    assert paged == everything["entries"]
    wanted: dict[str, list[int]] = {
        "tenant=lab": [1],
        f"key={key_id(scene, 'operator')}": [2, 3, 4, 5],
        f"since={paged[2]['at']}": [3, 4, 5],
        f"before={paged[2]['at']}": [1, 2],
        f"since={paged[1]['at']}&before={paged[4]['at']}&key={key_id(scene, 'client')}": [1],
    }
    for query, numbers in wanted.items():
        found = (await scene.ask("GET", f"/audit?{query}", "operator")).json()["entries"]
        assert [each["number"] for each in found] == numbers, query


@pytest.mark.parametrize(
    "query", ["since=yesterday", "since=2026-13-01T00:00:00Z", "before=2026-01-01T00:00:00", "key=x", "tenant=a b"]
)
async def test_odd_filters_are_refused(scene: Scene, query: str) -> None:
    """A 422 that names the parameter."""
    answer = await scene.ask("GET", f"/audit?{query}", "operator")
    assert (answer.status_code, answer.json()["field"]) == (422, query.partition("=")[0])


async def test_without_keys_everybody_reads_it(world: ServiceWorld) -> None:
    """As everybody may do everything there; the rows have no key, and no id with which a request can be released."""
    async with keyed_scene(world, {"s": 0.0}, keys=False) as scene:
        await scene.ask("POST", "/machines/a/drain", "")
        await scene.ask("DELETE", "/machines/nowhere/drain", "")
        await scene.ask("DELETE", f"{REQUEST}/{scene.request_id}", "")
        await scene.ask("DELETE", f"{REQUEST}/{scene.request_id}s", "")
        await send(scene)
        assert rows(scene)[0].subject == scene.request_id
        answer = await scene.http.get("/audit")
        assert scene.request_id not in answer.text
        entry, *others = answer.json()["entries"]
        assert (entry["key"], entry["role"], entry["tenant"], entry["source"]) == (None, None, "default", HERE)
        assert [each["about"] for each in others] == ["a", None, "nowhere", None]


async def test_an_error_of_the_ingress_is_counted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that changes something and failed with a bug has a row, too."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(scene.service, "drain", broken)
    transport = httpx.ASGITransport(app=scene.http._transport.app, raise_app_exceptions=False)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        headers = {"Authorization": f"Bearer {scene.keys['operator']}"}
        answer = await http.post("/machines/a/drain", headers=headers)
    assert answer.status_code == 500
    (row,) = await sent(scene)
    assert (row.status, row.code, row.subject) == (500, json.loads(answer.text)["code"], "a")
