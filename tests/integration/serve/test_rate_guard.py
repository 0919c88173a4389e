"""How often callers may call: the real HTTP app, with its guard of keys, around a registry that is a stand-in."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.models.sources import ModelSources
from deployments.serve import audit, identities, rates
from deployments.serve.client_address import FORWARDED_HEADER, SOURCE_HEADER
from deployments.serve.http_app import IngressConfig, build_app
from registry.access_errors import KeyRefused
from registry.access_settings import AccessSettings, RateSettings
from registry.http_settings import HTTPSettings
from registry.store.rows import APIKey, AuditRow
from registry.wire.words import Role
from tests.support.fake_counters import ManualClock
from tests.support.fake_registry import FakeRegistry

LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "org/tiny",
    "uses_chat_template": True,
    "args": {"prompting": {}, "deployment": {}},
}
BODY = {"measurementId": 1, "llms": [LLM]}
REQUEST = "/promptingservice/request"
KNOWN = {"aaaaaaaa": "lab", "bbbbbbbb": "lab", "cccccccc": "rivals"}
"""Tenants by the ids of their keys."""
REVOKED = "dddddddd"


class KeyedRegistry(FakeRegistry):
    """A registry that knows a few keys; ``looked_up``: the ids that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up: list[str] = []
        self.refusals: asyncio.Queue[list[tuple[AuditRow, float]]] = asyncio.Queue()

    def _identify(self, key_id: str, secret_sha256: str) -> APIKey:
        self.looked_up.append(key_id)
        if key_id == REVOKED:
            raise KeyRefused("it was revoked", key_id)
        if key_id not in KNOWN:
            raise KeyRefused("it is not known here")
        return APIKey(key_id, Role.CLIENT, KNOWN[key_id], "", secret_sha256, 0.0)

    def _add_refusals(self, rows: list[tuple[AuditRow, float]]) -> None:
        self.refusals.put_nowait(rows)


def key(key_id: str) -> dict[str, str]:
    return {"authorization": f"Bearer gp_{key_id}_{'x' * 43}"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    clock = ManualClock()
    for module in (identities, rates):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.fixture
def registry() -> KeyedRegistry:
    return KeyedRegistry()


Ingress = Callable[..., Callable[[str], httpx.AsyncClient]]


@pytest.fixture
async def ingress(registry: KeyedRegistry, clock: ManualClock) -> AsyncIterator[Ingress]:
    """Makes an ingress; returns a function that makes a client of it with this address."""
    async with AsyncExitStack() as stack:
        clients: list[httpx.AsyncClient] = []

        def make(*, keys: bool = False, proxies: tuple[str, ...] = (), **limits: int | None) -> Any:
            config = IngressConfig(
                ModelSources(True, (), Path("/")),
                (),
                access=AccessSettings.model_validate(
                    {"keys": True, "trusted_clients": {"10.0.7.0/24": "old"}} if keys else {"insecure": True}
                ),
                trusted_proxies=HTTPSettings.model_validate({"trusted_proxies": proxies}).trusted_proxies,
                rates=RateSettings(**limits),
            )
            app = build_app(config, registry.call)

            def client(address: str) -> httpx.AsyncClient:
                transport = httpx.ASGITransport(app=app, client=(address, 1))
                clients.append(httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1"))
                stack.push_async_callback(clients[-1].aclose)
                return clients[-1]

            return client

        yield make


async def statuses(http: httpx.AsyncClient, count: int, path: str = "/llms", **headers: str) -> list[int]:
    return [(await http.get(path, headers=headers)).status_code for _ in range(count)]


# --- calls -------------------------------------------------------------------------------------------------


async def test_a_caller_that_calls_too_often_is_told_when_to_go_on(ingress: Ingress, clock: ManualClock) -> None:
    """The answer has the project's form, names the setting and the remedy; a second later the caller is served."""
    http = ingress(calls_per_second=3)("10.0.0.9")
    assert await statuses(http, 3) == [200] * 3
    refused = await http.get("/llms")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json() == {
        "code": "too_many_calls",
        "message": "the address 10.0.0.9 has reached the limit rates.calls_per_second: 3; call less often (a GET of a "
        "request can wait for news: ?wait=30), and try again in 1 s",
        "retryable": True,
    }
    assert refused.headers["x-content-type-options"] == "nosniff"
    clock.now_s += 1
    assert await statuses(http, 1) == [200]


async def test_a_refused_call_reaches_no_registry(ingress: Ingress, registry: KeyedRegistry) -> None:
    """Above the limit, a call costs the registry's actor nothing; public paths are counted like others."""
    http = ingress(keys=True, calls_per_second=3)("10.0.0.9")
    assert await statuses(http, 10, "/healthz") == [200] * 3 + [429] * 7
    assert [method for method, *_ in registry.calls] == ["health"] * 3


async def test_callers_do_not_limit_each_other(ingress: Ingress) -> None:
    """Other addresses are served, and of IPv6 other networks; the addresses of one /64 are one caller."""
    client = ingress(calls_per_second=2)
    assert await statuses(client("10.0.0.9"), 3) == [200, 200, 429]
    assert await statuses(client("10.0.0.10"), 1) == [200]
    found = [(await statuses(client(f"2001:db8::{number}"), 1))[0] for number in range(1, 5)]
    assert found == [200, 200, 429, 429]
    assert await statuses(client("2001:db8:0:1::1"), 1) == [200]


async def test_without_keys_this_machine_is_not_counted(ingress: Ingress) -> None:
    """Its callers may do everything anyway, and benchmarks call often."""
    client = ingress(calls_per_second=1, posts_per_minute=1)
    assert await statuses(client("127.0.0.1"), 20) == [200] * 20
    assert await statuses(client("::1"), 20) == [200] * 20
    named = {SOURCE_HEADER.decode(): "10.0.0.9"}  # HAProxy of this machine passes on another one's call
    assert await statuses(client("127.0.0.1"), 2, **named) == [200, 429]


async def test_a_client_behind_a_proxy_is_counted_by_its_own_address(ingress: Ingress) -> None:
    """A trusted proxy names its clients; another proxy is one caller, and so is another machine's HAProxy."""
    client = ingress(proxies=("10.0.9.1/32",), calls_per_second=1)
    source, forwarded = SOURCE_HEADER.decode(), FORWARDED_HEADER.decode()
    for last in (1, 2, 3):
        one = {source: "10.0.9.1", forwarded: f"10.0.5.{last}"}
        assert await statuses(client("127.0.0.1"), 2, **one) == [200, 429]
    other = [{source: "10.0.9.2", forwarded: f"10.0.6.{last}"} for last in (1, 2)]
    assert [(await statuses(client("127.0.0.1"), 1, **each))[0] for each in other] == [200, 429]
    through = [{source: f"10.0.6.{last}"} for last in (1, 2)]
    assert [(await statuses(client("10.0.8.8"), 1, **each))[0] for each in through] == [200, 429]


async def test_keys_have_limits_of_their_own(ingress: Ingress) -> None:
    """Callers behind one address are told apart by their keys; made-up keys use up nobody's limit."""
    http = ingress(keys=True, calls_per_second=2)("10.0.0.9")
    assert await statuses(http, 3, **key("aaaaaaaa")) == [200, 200, 429]
    assert await statuses(http, 3, **key("00000000")) == [401] * 3
    assert await statuses(http, 3, **key("bbbbbbbb")) == [200, 200, 429]
    assert "the API key bbbbbbbb has" in (await http.get("/llms", headers=key("bbbbbbbb"))).json()["message"]
    assert await statuses(http, 3, "/healthz") == [200, 200, 429]


async def test_many_addresses_do_not_push_out_the_count_of_a_key(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and addresses are counted apart: the memory for addresses may be full."""
    monkeypatch.setattr(rates, "MOST_CALLERS", 3)
    client = ingress(keys=True, calls_per_second=2)
    http = client("10.0.0.9")
    assert await statuses(http, 2, **key("aaaaaaaa")) == [200, 200]
    for last in range(10, 20):
        assert await statuses(client(f"10.0.0.{last}"), 1, "/healthz") == [200]
    assert await statuses(http, 1, **key("aaaaaaaa")) == [429]


@pytest.mark.parametrize("keys", [True, False])
async def test_a_caller_above_its_limit_can_keep_and_release_its_leases(ingress: Ingress, keys: bool) -> None:
    """A wild program of a tenant does not keep the others from that; all other calls are refused."""
    http = ingress(keys=keys, calls_per_second=1)("10.0.0.9")
    headers = key("aaaaaaaa") if keys else {}
    answer = await http.post(REQUEST, json=BODY, headers=headers)
    link = f"{REQUEST}/{answer.json()['requests'][0]['requestId']}"
    assert await statuses(http, 2, link, **headers) == [429, 429]
    other = [("PUT", link), ("POST", f"{link}/keepalives"), ("DELETE", REQUEST), ("POST", REQUEST)]
    assert {(await http.request(*call, headers=headers)).status_code for call in other} == {429}
    assert [(await http.post(f"{link}/keepalive", headers=headers)).status_code for _ in range(3)] == [200] * 3
    assert [(await http.delete(link, headers=headers)).status_code for _ in range(3)] == [204] * 3


async def test_limits_can_be_off(ingress: Ingress) -> None:
    """Null in the settings is no limit."""
    http = ingress(keys=True, calls_per_second=None, posts_per_minute=None, wrong_keys_per_minute=None)("10.0.0.9")
    assert await statuses(http, 700, **key("aaaaaaaa")) == [200] * 700
    assert {await post(http, **key("aaaaaaaa")) for _ in range(400)} == {201}
    assert {(await statuses(http, 1, **key(f"{number:08x}")))[0] for number in range(100)} == {401}


# --- POSTs -------------------------------------------------------------------------------------------------


async def post(http: httpx.AsyncClient, **headers: str) -> int:
    return (await http.post(REQUEST, json=BODY, headers=headers)).status_code


async def test_made_up_tenants_do_not_fill_the_queue(
    ingress: Ingress, registry: KeyedRegistry, clock: ManualClock
) -> None:
    """Without keys anybody can name any tenant, and each tenant gets turns: so an address has a limit for all."""
    client = ingress(posts_per_minute=5)
    http = client("10.0.0.9")
    assert [await post(http, **{"x-tenant": f"t{number}"}) for number in range(50)] == [201] * 5 + [429] * 45
    assert len(registry.requests) == 5
    refused = await http.post(REQUEST, json=BODY)
    assert refused.json()["message"] == (
        "the address 10.0.0.9 has reached the limit rates.posts_per_minute: 5; put several LLMs into one POST, and try "
        "again in 60 s"
    )
    assert refused.headers["retry-after"] == "60"
    assert await statuses(http, 1) == [200], "reads are served"
    assert await post(client("10.0.0.10")) == 201
    clock.now_s += 60
    assert await post(http) == 201


async def test_a_tenant_has_one_limit_for_all_its_keys(ingress: Ingress) -> None:
    """More keys, or addresses of trusted clients, are not more turns; another tenant behind the address has its own."""
    client = ingress(keys=True, posts_per_minute=2)
    http = client("10.0.0.9")
    assert [await post(http, **key(which)) for which in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa")] == [201, 201, 429]
    assert await post(http, **key("cccccccc")) == 201
    assert [await post(client(f"10.0.7.{last}")) for last in (1, 2, 3)] == [201, 201, 429]


# --- wrong keys --------------------------------------------------------------------------------------------


async def test_guesses_are_not_looked_up_for_long(
    ingress: Ingress, registry: KeyedRegistry, clock: ManualClock
) -> None:
    """After some wrong keys a minute, unknown ones of this address are refused at once; good keys in use are not."""
    client = ingress(keys=True, wrong_keys_per_minute=5)
    http = client("10.0.0.9")
    assert await statuses(http, 1, **key("aaaaaaaa")) == [200]
    registry.looked_up.clear()
    found = [(await statuses(http, 1, **key(f"{number:08x}")))[0] for number in range(100)]
    assert found == [401] * 5 + [429] * 95
    assert len(registry.looked_up) == 5
    refused = await http.get("/llms", headers=key("bbbbbbbb"))
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_wrong_keys"), "it was not in use"
    assert refused.json()["message"] == (
        "too many wrong API keys or JWTs came from this address (rates.wrong_keys_per_minute: 5); check yours, and "
        "try again in 60 s"
    )
    assert refused.headers["retry-after"] == "60"
    clock.now_s += 30  # the answer about the good key has to be asked for again
    assert await statuses(http, 1, **key("aaaaaaaa")) == [200]
    assert await statuses(client("10.0.0.10"), 1, **key("bbbbbbbb")) == [200]
    clock.now_s += 30
    assert await statuses(http, 1, **key("bbbbbbbb")) == [200]


async def test_after_a_restart_no_key_is_in_use(ingress: Ingress) -> None:
    """An ingress that has just started knows no key: a good one waits until the address may send unknown keys again."""
    used = ingress(keys=True, wrong_keys_per_minute=1)("10.0.0.9")
    assert await statuses(used, 1, **key("aaaaaaaa")) == [200]
    restarted = ingress(keys=True, wrong_keys_per_minute=1)("10.0.0.9")
    assert await statuses(restarted, 1, **key("00000000")) == [401]
    assert await statuses(restarted, 1, **key("aaaaaaaa")) == [429]


async def test_guesses_stay_in_the_audit(
    ingress: Ingress, registry: KeyedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were not looked up are counted, too, with the address that they came from."""
    monkeypatch.setattr(audit, "SEND_EVERY_S", 0.01)
    http = ingress(keys=True, wrong_keys_per_minute=1)("10.0.0.9")
    await asyncio.gather(*(http.get("/llms", headers=key(f"{number:08x}")) for number in range(5)))
    counted: Counter[tuple[int, str | None, str | None]] = Counter()
    while counted.total() < 5:
        for row, _ in await asyncio.wait_for(registry.refusals.get(), 10):
            counted[row.status or 0, row.code, row.source] += row.count
    assert counted == {(401, "key_refused", "10.0.0.9"): 1, (429, "too_many_wrong_keys", "10.0.0.9"): 4}


async def test_a_revoked_key_is_no_guess(ingress: Ingress, clock: ManualClock) -> None:
    """Programs that still use a revoked key do not close their address to new keys."""
    http = ingress(keys=True, wrong_keys_per_minute=2)("10.0.0.9")
    for _ in range(10):
        clock.now_s += 2.5
        assert await statuses(http, 1, **key(REVOKED)) == [401]
    assert await statuses(http, 1, **key("aaaaaaaa")) == [200]


# --- defaults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [True, False])
async def test_a_prompting_service_meets_no_limit(ingress: Ingress, clock: ManualClock, keys: bool) -> None:
    """100 POSTs at once, each request polled every second, and 16 prompts at a time by the old redirect."""
    http = ingress(keys=keys)("10.0.0.9")
    headers = key("aaaaaaaa") if keys else {}
    posted = [await http.post(REQUEST, json=BODY, headers=headers) for _ in range(100)]
    assert {answer.status_code for answer in posted} == {201}
    links = [f"{REQUEST}/{answer.json()['requests'][0]['requestId']}" for answer in posted]
    for _ in range(3):
        clock.now_s += 1
        assert {(await http.get(link, headers=headers)).status_code for link in links} == {200}
        redirected = [await http.post("/process_prompt", auth=("lease", "t0ken")) for _ in range(16)]
        assert {answer.status_code for answer in redirected} == {307}
