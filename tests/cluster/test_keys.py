"""API keys on a real registry: its operator makes them, clients use them, others get nothing."""

from __future__ import annotations

import json
import re
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from deployments.serve.jwt_identities import MAX_JWT
from greenprompt_client.answers import AnswerError
from greenprompt_client.client import RegistryClient
from registry.settings import OPERATOR_KEY
from tests.cluster import conftest
from tests.cluster.conftest import Ran, Registry, assert_no_secret_left, search_for_secrets, start, stop
from tests.support import oidc
from tests.support.app_server import served_in_thread
from tests.support.prompting_service_client import prompt_url
from tests.support.secret_search import JWT

pytestmark = pytest.mark.cluster

LLM = Callable[..., dict[str, Any]]
KEY = re.compile(r"gp_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """The URL of an issuer of JWTs."""
    site = oidc.Website()
    with served_in_thread(site) as (_, port):
        url = f"http://127.0.0.1:{port}"
        names = {"issuer": url, "jwks_uri": f"{url}/keys"}
        site.serve("/.well-known/openid-configuration", json.dumps(names).encode())
        site.serve("/keys", oidc.jwks())
        yield url


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, workspace: Path, issuer: str) -> Iterator[Registry]:
    """A registry that asks for keys or JWTs, and trusts the clients at one address of this machine."""
    folder = tmp_path_factory.mktemp("closed")
    accepted = oidc.settings(issuer=issuer).model_dump(mode="json", exclude_unset=True)
    access = {"keys": True, "trusted_clients": {"127.0.0.7": "old", "192.0.2.7": "old"}, "oidc": accepted}
    registry = start(folder, access=access, models={"local_roots": [str(workspace / "llms")]})
    registry.note_key((folder / "state" / OPERATOR_KEY).read_text())
    yield registry
    stop(registry)


def greenprompt(registry: Registry, *words: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; its operator's key is in the registry's state folder, unless ``key`` is given."""
    environment = {"GREENPROMPT_URL": registry.url} | ({} if key is None else {"GREENPROMPT_API_KEY": key})
    return conftest.greenprompt(*words, environment=environment, limit_s=60)


def new_key(registry: Registry, *options: str) -> str:
    file = str(registry.folder / "state" / "operator.key")
    made = greenprompt(registry, "keys", "create", "--key-file", file, *options)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert KEY.fullmatch(key)
    registry.note_key(key)
    return key


def test_a_lease_is_its_tenants_alone(closed: Registry, llm: LLM) -> None:
    """The holder gets the LLM; another tenant, and an operator, can't get its address; nobody without a key anything.

    The LLM itself needs no key, and never gets one.
    """
    ours, theirs = (new_key(closed, "--tenant", tenant, "--name", "a test") for tenant in ("lab", "rivals"))
    operator = (closed.folder / "state" / "operator.key").read_text()
    with RegistryClient(closed.url, api_key=ours) as client:
        (request_id,) = client.request(1, [llm("a")])
        with client.lease(request_id, timeout_s=300) as lease:
            closed.asked.add(request_id)
            closed.note_lease(lease.url)
            assert lease.prompt("What is a grid?")["usage"]["completion_tokens"] > 0
            assert "Authorization" not in lease._http.headers
            link = f"{closed.url}/promptingservice/request/{request_id}"
            bearer = {"Authorization": f"Bearer {theirs}"}
            for method, url in (("GET", link), ("DELETE", link), ("POST", f"{link}/keepalive")):
                assert httpx.request(method, url, timeout=60).status_code == 401
                assert httpx.request(method, url, headers=bearer, timeout=60).status_code == 404
            seen = httpx.get(link, headers={"Authorization": f"Bearer {operator}"}, timeout=60).json()
            assert (seen["status"], seen["url"], seen["address"]) == ("deployed", None, None)
            drain = httpx.post(f"{closed.url}/machines/{seen['machine']}/drain", headers=bearer, timeout=60)
            assert drain.status_code == 403


def _refusal(registry: Registry, key: str, *, within_s: float) -> str | None:
    """Call until the key is refused; return the code of the answer, None if it never was."""
    deadline_s = time.monotonic() + within_s
    with RegistryClient(registry.url, api_key=key) as client:
        while time.monotonic() < deadline_s:
            try:
                client.machines()
            except AnswerError as error:
                return error.answer_code
    return None


def test_the_operators_commands(closed: Registry) -> None:
    """Keys are listed without their texts, and revoked; a revoked key gets exit status 5."""
    file = closed.folder / "state" / "operator.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = new_key(closed, "--role", "viewer", "--name", "a screen", "--days", "1")
    assert greenprompt(closed, "status", key=key).returncode == 0
    listed = greenprompt(closed, "keys", "list", "--key-file", str(file))
    assert "a screen" in listed.stdout
    assert key.split("_", 2)[2] not in listed.stdout
    assert greenprompt(closed, "keys", "list", key=key).returncode == 5
    key_id = key.split("_")[1]
    assert greenprompt(closed, "keys", "revoke", key_id, "--key-file", str(file)).returncode == 0
    assert _refusal(closed, key, within_s=5) == "key_refused"
    nobody = greenprompt(closed, "status", key="")
    assert nobody.returncode == 2
    none = greenprompt(closed, "drain", "x", key="gp_1")
    assert (none.returncode, "is no API key (Bearer" in none.stderr) == (5, True)


def test_commands_take_a_jwt(closed: Registry, issuer: str) -> None:
    """It is given like a key, and may have 8 KiB; one of another issuer is refused."""
    long = oidc.signed(oidc.claims(iss=issuer, groups=["llm-admins"], more="x" * 5_600))
    closed.note_secret(JWT, long.rpartition(".")[2])
    assert 8_000 < len(long) <= MAX_JWT
    assert greenprompt(closed, "status", key=long).returncode == 0
    assert _refusal(closed, oidc.signed(), within_s=5) == "jwt_refused"


def test_the_prompting_services_client_is_known_by_its_address(closed: Registry, llm: LLM) -> None:
    """It can send no key, so it calls from a trusted address; the same calls from another address get 401."""
    body = {"measurementId": 3, "llms": [llm("a")]}
    url = f"{closed.url}/promptingservice/request"
    for address in ("127.0.0.7", "192.0.2.7"):
        for names in (["X-GreenPrompt-Source"], ["X-Forwarded-For"], ["X-GreenPrompt-Source", "X-Forwarded-For"]):
            spoofed = dict.fromkeys([*names, "X-Real-IP", "Forwarded"], address)
            assert httpx.post(url, json=body, headers=spoofed, timeout=60).status_code == 401, spoofed
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.7"), timeout=60) as old:
        request_id = old.post(url, json=body).json()["requests"][0]["requestId"]
        state = old.get(f"{url}/{request_id}", params={"wait": 1}).json()
        while state["status"] in ("queued", "deploying"):
            state = old.get(f"{url}/{request_id}", params={"wait": 1}).json()
        assert (state["status"], state["tenant"]) == ("deployed", "old")
        port = httpx.URL(closed.url).port
        assert port is not None
        prompt = prompt_url(state["address"], port=port)
        answer = old.post(prompt, json={"question": "Why?"}, follow_redirects=True)
        assert answer.status_code == 200
        assert old.delete(f"{url}/{request_id}").status_code == 204


def test_keys_survive_a_restart(closed: Registry) -> None:
    """The operator's key of the first start is still in force; no second one is made."""
    file = closed.folder / "state" / "operator.key"
    before = file.read_text()
    key = new_key(closed, "--role", "viewer")
    closed.process_named("ray::RegistryActor").kill()
    bearer = {"Authorization": f"Bearer {key}"}
    deadline_s = time.monotonic() + 60
    while (answer := httpx.get(f"{closed.url}/machines", headers=bearer, timeout=60)).status_code == 503:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert answer.status_code == 200
    assert file.read_text() == before


def test_a_killed_owner_takes_everything_along(closed: Registry) -> None:
    """A ``greenprompt up`` that is killed ends its cluster; the next command, a start that is refused, ends the rest.

    No secret was seen, and none is in a file that others can read.
    """
    ran = Ran(closed)
    search = search_for_secrets(closed, {"Authorization": f"Bearer {new_key(closed, '--role', 'operator')}"})
    closed.process.kill()
    closed.process.wait()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed_port, port = urlsplit(closed.url).port, taken.getsockname()[1]
        config = closed.folder / "config.yaml"
        config.write_text(config.read_text().replace(f"port: {closed_port}\n", f"port: {port}\n"))
        refused = greenprompt(closed, "up", "--config", str(config))
    assert (refused.returncode, "http.port" in refused.stderr) == (2, True), refused.stderr
    assert ran.left() == []
    assert_no_secret_left(closed, search)
