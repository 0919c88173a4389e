"""The proxies for TLS in configs/front, before HAProxy as Serve runs it and the real ingress."""

from __future__ import annotations

import os
import pwd
import re
import socket
import ssl
import time
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.launch.local_ray import free_ports
from greenprompt_client.answers import AnswerError
from greenprompt_client.client import RegistryClient
from registry.errors import BadSettings
from registry.wire.schemas import ErrorAnswer, RequestState
from tests.support.fake_registry import CREATED
from tests.support.tls_front import (
    ACCOUNT,
    CHANGES,
    FRONTS,
    KEY,
    LEASE,
    OLD_CLIENT,
    STRANGER,
    TOKEN,
    WRAPPER,
    Front,
    address_behind,
    changed_copy,
    made_certificates,
    running,
)

CLAIMS = ["X-Forwarded-For", "X-GreenPrompt-Forwarded", "X-GreenPrompt-Source", "X-Real-IP", "Forwarded"]
"""Headers by which a client may claim another address."""


def test_every_file_is_run() -> None:
    """Each file in configs/front is one of the proxies below."""
    assert {path.name for path in FRONTS.iterdir()} == CHANGES.keys()


def test_our_client_trusts_the_ca_it_is_given(front: Front) -> None:
    """With the CA's file the registry and the https address of a lease can be used."""
    front.registry.requests["r"] = RequestState(
        requestId="r", llmconfig={}, status="deployed", measurementId=1, url=f"{front.url}{LEASE}", address=None,
        link=f"{front.url}/promptingservice/request/r", createdAt=CREATED,
    )  # fmt: skip
    with RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client:
        assert [machine.machine for machine in client.machines()] == ["a"]
        with client.lease("r") as lease:
            assert lease.prompt("Why?") == {"answer": "because"}
    assert front.wrapper.heads[-1]["authorization"] == f"Bearer {TOKEN}"
    assert KEY not in str(front.wrapper.heads[-1])
    assert front.wrapper.heads[-1]["host"] == front.url.removeprefix("https://")


def test_without_the_ca_the_error_says_what_to_do(front: Front) -> None:
    """A certificate that is not trusted is one error at once, with the remedy; nothing is sent."""
    begun_s, calls = time.monotonic(), len(front.registry.calls)
    with RegistryClient(front.url, api_key=KEY) as client:
        for call in (client.machines, lambda: client.release("r"), lambda: client.drain("a")):
            with pytest.raises(BadSettings, match=r"certificate is not trusted: .* GREENPROMPT_CA_FILE") as caught:
                call()
            assert str(caught.value).startswith(front.url)
    assert time.monotonic() - begun_s < 2, "no attempt is repeated"
    assert len(front.registry.calls) == calls


def test_nobody_can_claim_to_be_a_trusted_client(front: Front) -> None:
    """The client's own address counts, whatever its headers say; a trusted client is known through the front."""
    with front.http(OLD_CLIENT) as old:
        assert old.get("/machines").status_code == 200
        assert old.get("/machines", headers=dict.fromkeys(CLAIMS, STRANGER)).status_code == 200
    with front.http(STRANGER) as stranger:
        assert stranger.get("/machines").status_code == 401
        for value in (OLD_CLIENT, f"{OLD_CLIENT}, 127.0.0.1", f"127.0.0.1, {OLD_CLIENT}", f"{OLD_CLIENT},", "::1"):
            for headers in ([(name, value)] for name in CLAIMS):
                assert stranger.get("/machines", headers=headers).status_code == 401
                assert stranger.get("/machines", headers=[*headers, *headers]).status_code == 401
            assert stranger.get("/machines", headers=[(name, value) for name in CLAIMS]).status_code == 401
            dropped = {"X-Forwarded-For": value, "Connection": "close, X-Forwarded-For, X-GreenPrompt-Source"}
            assert stranger.get("/machines", headers=dropped).status_code == 401
    # Not through the front: its address has no header to name another one, and anybody on this machine has it.
    behind = address_behind(front)
    for source in ("127.0.0.1", STRANGER):
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(base_url=behind, transport=transport, timeout=10) as around:
            assert around.get("/machines").status_code == 401
            if source == STRANGER:
                claimed = dict.fromkeys(CLAIMS, OLD_CLIENT)
                assert around.get("/machines", headers=claimed).status_code == 401


def test_the_audit_has_the_address_of_the_client(front: Front) -> None:
    """Through the front and past it: nobody can have another address in the audit than their own."""
    claimed = dict.fromkeys(CLAIMS, OLD_CLIENT) | {"Authorization": f"Bearer {KEY}"}
    past = httpx.Client(
        base_url=address_behind(front), transport=httpx.HTTPTransport(local_address=STRANGER), timeout=10
    )
    for http in (front.http(STRANGER), past):
        with http:
            assert http.post("/machines/a/drain", headers=claimed).status_code == 200
        assert front.registry.audited.pop().source == STRANGER
    # The front's own machine: its address says nothing about the client.
    with httpx.Client(base_url=address_behind(front), timeout=10) as http:
        assert http.post("/machines/a/drain", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert front.registry.audited.pop().source is None


@pytest.mark.parametrize("host", ["other.example", "registry.example:443", "unknown.example"])
def test_another_host_is_no_success(front: Front, host: str) -> None:
    """A name that the certificate has, but the registry does not know, gets the registry's 421, not an empty 200."""
    calls, sni = len(front.registry.calls), {"sni_hostname": "other.example"}
    with front.http() as http:
        for method, path in (
            ("DELETE", "/promptingservice/request/r"),
            ("POST", "/machines/a/drain"),
            ("GET", "/llms"),
        ):
            headers = {"Host": host, "Authorization": f"Bearer {KEY}"}
            answer = http.request(method, path, headers=headers, extensions=sni)
            assert answer.status_code == 421
            assert ErrorAnswer.model_validate(answer.json()).code == "host_not_allowed"
    assert len(front.registry.calls) == calls


def test_a_lease_with_an_http_address_is_refused(front: Front) -> None:
    """If http.public_url is not set to the front's URL, our client sends no prompt in clear, and says what to set."""
    front.registry.requests["c"] = RequestState(
        requestId="c", llmconfig={}, status="deployed", measurementId=1, url=f"{address_behind(front)}{LEASE}",
        address=None, link=f"{front.url}/promptingservice/request/c", createdAt=CREATED,
    )  # fmt: skip
    reached = len(front.wrapper.heads)
    with (
        RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client,
        pytest.raises(BadSettings, match=r"^http\.public_url: "),
        client.lease("c") as lease,
    ):
        lease.prompt("Why?")
    assert len(front.wrapper.heads) == reached
    assert front.registry.calls[-1][0] == "release"


@pytest.mark.parametrize("name", CHANGES)
def test_ipv4_and_ipv6(name: str, tmp_path: Path) -> None:
    """As they are, the files listen on both."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    ca, (port, back) = made_certificates(tmp_path), free_ports(2)
    config = changed_copy(name, tmp_path, port=port, back=back)
    text = config.read_text().replace("\tbind 127.0.0.1\n", "")
    config.write_text(text.replace(f"bind 127.0.0.1:{port} ", f"bind :::{port} v4v6 "))
    with running(name, config):
        trust = ssl.create_default_context(cafile=ca)
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=6), timeout=10) as http:
            for address in ("127.0.0.1", "[::1]"):
                url, sni = f"https://{address}:{port}/machines", {"sni_hostname": "localhost"}
                assert http.get(url, extensions=sni).status_code in (502, 503)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_haproxy_gives_up_roots_rights(tmp_path: Path) -> None:
    """The process that reads requests runs as Debian's user haproxy, in a folder without files."""
    try:
        user = pwd.getpwnam("haproxy")
    except KeyError:
        pytest.skip("there is no user haproxy; Debian's package makes it")
    ca, (port, back) = made_certificates(tmp_path), free_ports(2)
    config = changed_copy("haproxy.cfg", tmp_path, keep=ACCOUNT, port=port, back=back)
    with running("haproxy.cfg", config):
        trust = ssl.create_default_context(cafile=ca)
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=8), timeout=10) as http:
            assert http.get(f"https://localhost:{port}/machines").status_code == 503
        (process,) = (child for child in psutil.Process().children() if str(config) in child.cmdline())
        assert set(process.uids()) == {user.pw_uid}
        assert set(process.gids()) == {user.pw_gid}
        assert Path(f"/proc/{process.pid}/root").readlink() == Path("/var/lib/haproxy")


def test_caddys_failures_are_logged_without_their_requests(tmp_path: Path) -> None:
    """Also without answers of its own, when Caddy writes a line for each failure."""
    made_certificates(tmp_path)
    port, back = free_ports(2)
    config = changed_copy("Caddyfile", tmp_path, port=port, back=back)
    config.write_text(re.sub(r"\n\thandle_errors (?s:.*)", "}\n", config.read_text()))
    with running("Caddyfile", config) as log:
        trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=8), timeout=10) as http:
            assert http.get(f"https://localhost:{port}{LEASE}/v1").status_code == 502
        written = log.read_text()
    assert "connection refused" in written
    assert "s3cret" not in written


def test_no_token_is_logged(front: Front) -> None:
    """Also failures leave no token in what the front writes. While the registry is away, the answer says: try again."""
    with front.http() as http:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert http.get(f"{LEASE}/v1").status_code == 200
        assert http.get(f"{WRAPPER}/v1", headers=bearer).status_code == 200
        with (
            http.stream("POST", f"{LEASE}/stream", json={}) as answer,
            http.stream("POST", f"{WRAPPER}/stream", json={}, headers=bearer),
        ):
            front.wrapper.more.clear()
            next(answer.iter_raw())
        front.behind.kill()
        front.behind.wait()
        away = http.get(f"{LEASE}/v1", headers={"Authorization": f"Bearer {KEY}"})
        assert http.get(f"{WRAPPER}/v1", headers=bearer).status_code in (502, 503)
    front.wrapper.more.set()
    assert away.status_code in (502, 503)
    assert ErrorAnswer.model_validate(away.json()).retryable
    with RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client, pytest.raises(AnswerError) as caught:
        client.machines()
    assert caught.value.passing
    written = front.log.read_text()
    assert "s3cret" not in written
    assert KEY[12:] not in written
