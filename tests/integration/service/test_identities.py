"""Every path for every kind of caller, over HTTP, with the real service and its keys behind the ingress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.models.sources import ModelSources
from deployments.serve import identities, jwt_identities
from deployments.serve.actor import RegistryActor
from deployments.serve.client_address import SOURCE_HEADER
from deployments.serve.http_app import IngressConfig, build_app
from registry.wire.words import Role
from tests.support import oidc
from tests.support.keyed_registry import LLM, OLD_CLIENT, REQUEST, Scene, keyed_scene
from tests.support.service_world import ServiceWorld

CALLERS = ("nobody", "wrong", "revoked", "expired", "other", "viewer", "client", "operator")

ROWS: dict[tuple[str, str], tuple[int, ...]] = {
    # nobody, a wrong, a revoked, an expired key; another tenant, a viewer, the client itself, an operator
    ("GET", "/"): (200,) * 8,
    ("GET", "/healthz"): (200,) * 8,
    ("GET", "/get_status"): (401,) * 8,
    ("POST", "/process_prompt"): (401,) * 8,
    ("POST", "/promptingservice/request"): (401, 401, 401, 401, 201, 403, 201, 403),
    ("GET", "/promptingservice/request/{request_id}"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("GET", "/promptingservice/request/{request_id}/events"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("POST", "/promptingservice/request/{request_id}/keepalive"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("DELETE", "/promptingservice/request/{request_id}"): (401, 401, 401, 401, 404, 403, 204, 204),
    ("GET", "/measurements/{measurement_id}"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("GET", "/measurements/{measurement_id}/report"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("GET", "/measurements/{measurement_id}/windows"): (401, 401, 401, 401, 404, 403, 200, 200),
    ("GET", "/machines"): (401, 401, 401, 401, 200, 200, 200, 200),
    ("GET", "/machines/{machine_id}"): (401, 401, 401, 401, 200, 200, 200, 200),
    ("POST", "/machines/{machine_id}/drain"): (401, 401, 401, 401, 403, 403, 403, 200),
    ("DELETE", "/machines/{machine_id}/drain"): (401, 401, 401, 401, 403, 403, 403, 200),
    ("GET", "/llms"): (401, 401, 401, 401, 200, 200, 200, 200),
    ("GET", "/audit"): (401, 401, 401, 401, 403, 403, 403, 200),
    ("GET", "/keys"): (401, 401, 401, 401, 403, 403, 403, 200),
    ("POST", "/keys"): (401, 401, 401, 401, 403, 403, 403, 201),
    ("DELETE", "/keys/{key_id}"): (401, 401, 401, 401, 403, 403, 403, 204),
}
BODIES: dict[str, Any] = {
    REQUEST: {"measurementId": 8, "llms": [LLM]},
    "/keys": {"role": "viewer", "name": "a screen"},
    "/process_prompt": {"question": "Why?"},
}
UNHEARD_OF = {("GET", "/nothing"): 404, ("PATCH", "/machines"): 405, ("DELETE", "/measurements/7"): 405}


@pytest.fixture
async def scene(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Scene]:
    now = {"s": 1000.0}
    monkeypatch.setattr(identities, "monotonic", lambda: now["s"])
    file = tmp_path / "jwks.json"
    file.write_bytes(oidc.jwks())
    async with keyed_scene(world, now, oidc=oidc.settings(jwks_file=str(file))) as scene:
        scene.keys["jwt"] = oidc.signed()
        yield scene


async def test_every_path_for_every_caller(scene: Scene) -> None:
    """Each path of the OpenAPI document has a row; a path without one fails here."""
    document = (await scene.http.get("/openapi.json")).json()
    paths = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert paths == set(ROWS)
    names = {"request_id": scene.request_id, "measurement_id": 7, "machine_id": "a"}
    # What ends something comes last: the calls before need it.
    for method, path in sorted(ROWS, key=lambda row: (row[0] == "DELETE", row)):
        row = ROWS[method, path]
        # A JWT of the tenant's is as good as its key.
        for caller, expected in [*zip(CALLERS, row, strict=True), ("jwt", row[CALLERS.index("client")])]:
            victim = scene.make("victim", Role.VIEWER) if "key_id" in path else ""
            body: dict[str, Any] = {"json": BODIES[path]} if path in BODIES else {}
            if caller == "operator":
                body["headers"] = {"X-Tenant": "lab"}  # an operator says whose measurement it means
            where = path.format(**names, key_id=victim)
            answer = await scene.ask(method, where, caller, **body)
            assert answer.status_code == expected, f"{caller}: {method} {where}: {answer.text}"
            if expected in (401, 403) and where not in ("/get_status", "/process_prompt"):
                assert answer.json()["code"] in ("key_needed", "key_refused", "not_allowed")
                assert scene.request_id not in answer.text


@pytest.mark.parametrize(("method", "path"), UNHEARD_OF)
async def test_unknown_paths_need_a_key_first(scene: Scene, method: str, path: str) -> None:
    """Who has no key does not learn which paths there are."""
    assert (await scene.ask(method, path, "nobody")).status_code == 401
    assert (await scene.ask(method, path, "operator")).status_code == UNHEARD_OF[method, path]


async def test_only_the_holder_gets_the_address(scene: Scene) -> None:
    """The address of a lease contains its token: its tenant gets it, an operator does not, and no cache keeps it."""
    own = await scene.ask("GET", f"{REQUEST}/{scene.request_id}", "client")
    assert own.json()["url"]
    assert own.headers["cache-control"] == "no-store"
    token = own.json()["url"].rsplit("/", 1)[1]
    for path in (f"{REQUEST}/{scene.request_id}", "/measurements/7"):
        answer = await scene.ask("GET", path, "operator", headers={"X-Tenant": "lab"})
        assert answer.status_code == 200
        assert token not in answer.text
    kept = await scene.ask("POST", f"{REQUEST}/{scene.request_id}/keepalive", "operator")
    assert (kept.status_code, kept.json()["url"], kept.json()["address"]) == (200, None, None)
    assert token in (await scene.ask("GET", "/measurements/7", "client")).text
    for path in ("/machines", "/llms", "/healthz", f"{REQUEST}/{scene.request_id}/events"):
        assert token not in (await scene.ask("GET", path, "operator")).text


async def test_the_tenant_is_that_of_the_key(scene: Scene) -> None:
    """A client can't act for another tenant by the header; its own name may be there."""
    body = {"measurementId": 9, "llms": [LLM]}
    refused = await scene.ask("POST", REQUEST, "client", json=body, headers={"X-Tenant": "rivals"})
    assert (refused.status_code, refused.json()["code"]) == (403, "other_tenant")
    accepted = await scene.ask("POST", REQUEST, "client", json=body, headers={"X-Tenant": "lab"})
    request_id = accepted.json()["requests"][0]["requestId"]
    assert scene.service.known(request_id).tenant == "lab"


async def test_measurements_of_two_tenants_may_have_one_number(scene: Scene) -> None:
    """Another tenant's measurement 7 is another measurement, and never joins the first one's machine."""
    accepted = await scene.ask("POST", REQUEST, "other", json={"measurementId": 7, "llms": [LLM]})
    assert accepted.status_code == 201
    seen = (await scene.ask("GET", "/measurements/7", "other")).json()
    assert [each["tenant"] for each in seen["requests"]] == ["rivals"]


async def test_keys_of_a_post_belong_to_their_tenant(scene: Scene) -> None:
    """Another tenant that repeats an Idempotency-Key gets requests of its own."""
    body = {"json": {"measurementId": 9, "llms": [LLM]}, "headers": {"Idempotency-Key": "once"}}
    own = (await scene.ask("POST", REQUEST, "client", **body)).json()["requests"][0]["requestId"]
    other = (await scene.ask("POST", REQUEST, "other", **body)).json()["requests"][0]["requestId"]
    assert own != other


async def test_nobody_repeats_anothers_request(scene: Scene) -> None:
    """``like`` may not name a request of another tenant; the answer is that of an unknown id."""
    told = []
    for like in (scene.request_id, "0" * 32):
        body = {"measurementId": 9, "llms": [LLM], "like": like}
        answer = await scene.ask("POST", REQUEST, "other", json=body)
        told.append((answer.status_code, answer.text.replace(like, "…")))
    assert told[0] == told[1]
    assert told[0][0] == 422


async def test_windows_of_anothers_request_are_unknown(scene: Scene) -> None:
    """A page of windows of one request answers alike for another tenant's request and for one that is unknown."""
    accepted = await scene.ask("POST", REQUEST, "other", json={"measurementId": 7, "llms": [LLM]})
    assert accepted.status_code == 201
    told = []
    for request_id in (scene.request_id, "0" * 32):
        answer = await scene.ask("GET", "/measurements/7/windows", "other", params={"request": request_id})
        told.append((answer.status_code, answer.text.replace(request_id, "…")))
    assert told[0] == told[1]
    assert told[0][0] == 404


async def test_a_poll_does_not_outlive_its_key(scene: Scene) -> None:
    """A key that is revoked during a long poll gets no answer at its end."""
    path = f"{REQUEST}/{scene.request_id}"
    poll = asyncio.create_task(scene.ask("GET", path, "client", params={"wait": 0.2, "seen": "deployed"}))
    await asyncio.sleep(0.05)
    scene.service.keys.revoke(scene.keys["client"].split("_")[1])
    scene.now["s"] += identities.BELIEVED_S
    answer = await poll
    assert (answer.status_code, answer.json()["code"]) == (401, "key_refused")


async def test_a_poll_does_not_outlive_its_jwt(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JWT that expires during a long poll gets no answer at its end."""
    path = f"{REQUEST}/{scene.request_id}"
    assert (await scene.ask("GET", path, "jwt")).status_code == 200
    poll = asyncio.create_task(scene.ask("GET", path, "jwt", params={"wait": 0.2, "seen": "deployed"}))
    await asyncio.sleep(0.05)
    monkeypatch.setattr(jwt_identities, "time", lambda: time.time() + 3600)
    answer = await poll
    assert (answer.status_code, answer.json()["code"]) == (401, "jwt_refused")
    assert "it has expired" in answer.json()["message"]


async def test_the_audit_names_issuer_and_subject(scene: Scene) -> None:
    """What a JWT changed can be found by its identity; no part of its text is stored."""
    await scene.ask("POST", REQUEST, "jwt", json={"measurementId": 8, "llms": [LLM]})
    found = await scene.ask("GET", "/audit", "operator", params={"key": f"{oidc.ISSUER}#ann"})
    entries = [(each["key"], each["role"], each["tenant"]) for each in found.json()["entries"]]
    assert entries == [(f"{oidc.ISSUER}#ann", "client", "lab")]
    stored = repr(scene.service._store.audit().rows)
    assert not [part for part in scene.keys["jwt"].split(".") if part in stored]
    for odd in ("ann", "gp_1", f"{oidc.ISSUER}#", f"{oidc.ISSUER}#a\nb", f"ftp://idp.example#{'x' * 9}"):
        assert (await scene.ask("GET", "/audit", "operator", params={"key": odd})).status_code == 422


async def test_the_use_of_keys_is_stored_later(scene: Scene) -> None:
    """A call with a key writes nothing; the last use is stored from time to time, and survives a restart."""
    stored = {key.key_id: key.used_s for key in scene.service._store.api_keys()}
    assert (await scene.ask("GET", "/machines", "viewer")).status_code == 200
    assert {key.key_id: key.used_s for key in scene.service._store.api_keys()} == stored
    scene.service.keys.note_used()
    key_id = scene.keys["viewer"].split("_")[1]
    (used,) = [key.used_s for key in scene.service._store.api_keys() if key.key_id == key_id]
    assert used == scene.world.clock.now_s
    await scene.world.restart()
    (again,) = [key for key in scene.service.keys if key.key_id == key_id]
    assert again.used_s == used


async def test_wrong_keys_do_not_delay_good_ones(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a flood of wrong keys waits for the registry, a key that was good a moment ago is asked for at once.

    A wrong key is asked for once, and refused for a while.
    """
    asked: list[str] = []
    hold = asyncio.Event()
    identify = scene.service.keys.identify

    async def slow(_self: RegistryActor, key_id: str, secret_sha256: str) -> Any:
        asked.append(key_id)
        if key_id.startswith("ff"):
            await hold.wait()
        return identify(key_id, secret_sha256)

    monkeypatch.setattr(RegistryActor, "identify", slow)
    assert (await scene.ask("GET", "/machines", "viewer")).status_code == 200
    scene.now["s"] += identities.BELIEVED_S
    wrong = [f"Bearer gp_ff{number:06x}_{'x' * 43}" for number in range(50)]
    flood = [asyncio.create_task(scene.http.get("/machines", headers={"Authorization": key})) for key in wrong]
    await asyncio.sleep(0.05)
    assert (await scene.ask("GET", "/machines", "viewer")).status_code == 200
    assert sum(key_id.startswith("ff") for key_id in asked) == identities.STRANGERS_AT_ONCE
    hold.set()
    assert {answer.status_code for answer in await asyncio.gather(*flood)} == {401}
    count = len(asked)
    assert (await scene.http.get("/machines", headers={"Authorization": wrong[0]})).status_code == 401
    assert len(asked) == count


async def test_a_revoked_key_is_refused_within_five_seconds(scene: Scene) -> None:
    """The ingress uses the registry's answer again for a while, and asks then."""
    assert (await scene.ask("GET", "/machines", "viewer")).status_code == 200
    key_id = scene.keys["viewer"].split("_")[1]
    assert (await scene.ask("DELETE", f"/keys/{key_id}", "operator")).status_code == 204
    assert identities.BELIEVED_S < 5
    scene.now["s"] += identities.BELIEVED_S
    answer = await scene.ask("GET", "/machines", "viewer")
    assert (answer.status_code, answer.json()["code"]) == (401, "key_refused")
    assert "was revoked" in answer.json()["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_key_is_shown_once_and_stored_nowhere(scene: Scene, tmp_path: Path) -> None:
    """The answer of the POST has it; neither the list nor the database does."""
    made = await scene.ask("POST", "/keys", "operator", json={"role": "client", "tenant": "lab", "days": 30})
    text = made.json()["key"]
    assert (await scene.http.get("/machines", headers={"Authorization": f"bearer {text}"})).status_code == 200
    listed = await scene.ask("GET", "/keys", "operator")
    secret = text.split("_", 2)[2]
    assert secret not in listed.text
    (found,) = [key for key in listed.json() if key["id"] == made.json()["id"]]
    assert (found["tenant"], found["role"], found["revokedAt"]) == ("lab", "client", None)
    assert found["usedAt"] is not None
    stored = scene.service._store.api_keys()
    assert text not in repr(stored)
    assert secret not in repr(stored)


@pytest.mark.parametrize(
    "body",
    [
        {"role": "client"},
        {"role": "viewer", "tenant": "lab"},
        {"role": "operator", "tenant": "lab"},
        {"role": "client", "tenant": "a b"},
        {"role": "root"},
        {"role": "viewer", "days": 0},
        {"role": "viewer", "name": "a\nb"},
        {"role": "viewer", "secret": "mine"},
    ],
)
async def test_odd_keys_are_refused(scene: Scene, body: dict[str, Any]) -> None:
    """A key needs a role, and exactly a client's has a tenant."""
    assert (await scene.ask("POST", "/keys", "operator", json=body)).status_code == 422


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic bGVhc2U6eA==", "Bearer gp_1", "Bearer gp_00000000_" + "x" * 42, "x" * 8000, "ü"],
)
async def test_what_is_no_key_is_refused(scene: Scene, value: str) -> None:
    """Anything else in the header is refused, also from a trusted client, and never repeated in the answer."""
    trusted = (SOURCE_HEADER, OLD_CLIENT.encode())
    answer = await scene.http.get("/machines", headers=[(b"authorization", value.encode()), trusted])
    assert (answer.status_code, answer.json()["code"]) == (401, "key_needed")
    assert "is no API key" in answer.json()["message"]
    assert "is needed" in (await scene.http.get("/machines")).json()["message"]
    assert len(value) < 10 or value not in answer.text
    twice = [("Authorization", f"Bearer {scene.keys['viewer']}")] * 2
    assert (await scene.http.get("/machines", headers=twice)).status_code == 401


async def test_a_refused_body_is_not_read(scene: Scene) -> None:
    """A caller without a key can't make the ingress read a body."""
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x"

    left = body()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(left), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": REQUEST, "headers": headers, "client": ("127.0.0.1", 1)}
    await scene.http._transport.app(scope, receive, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == 401
    assert read == []


async def test_an_old_client_is_known_by_its_address(scene: Scene) -> None:
    """The Prompting Service's own client sends no key: its network has a tenant; others can't claim to be there."""
    source = SOURCE_HEADER.decode()
    body = {"measurementId": 9, "llms": [LLM]}
    accepted = await scene.http.post(REQUEST, json=body, headers={source: OLD_CLIENT})
    assert scene.service.known(accepted.json()["requests"][0]["requestId"]).tenant == "old"
    mapped = await scene.http.post(REQUEST, json=body, headers={source: f"::ffff:{OLD_CLIENT}"})
    assert mapped.status_code == 201
    for header in ({source: "10.0.5.8"}, {source: "x"}, {}, {source: f"{OLD_CLIENT}, 10.0.0.1"}):
        assert (await scene.http.post(REQUEST, json=body, headers=header)).status_code == 401
    twice = [(source, OLD_CLIENT), (source, OLD_CLIENT)]
    assert (await scene.http.post(REQUEST, json=body, headers=twice)).status_code == 401
    elsewhere = httpx.ASGITransport(app=scene.http._transport.app, client=("10.0.0.9", 1))  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=elsewhere, base_url="http://127.0.0.1") as neighbour:
        answer = await neighbour.post(REQUEST, json=body, headers={source: OLD_CLIENT})
    assert answer.status_code == 401, "the header counts only from a proxy on this machine"


async def test_without_keys_there_is_nothing_to_manage(world: ServiceWorld) -> None:
    """A registry for one machine has no keys; the answer says which setting asks for them."""
    config = IngressConfig(ModelSources(True, (), Path("/")), ())

    async def call(method: str, *args: object, wait_s: float = 0.0) -> Any:
        raise AssertionError(method)

    transport = httpx.ASGITransport(app=build_app(config, call))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for method, path in (("GET", "/keys"), ("DELETE", "/keys/x")):
            answer = await http.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (409, "keys_not_used")
