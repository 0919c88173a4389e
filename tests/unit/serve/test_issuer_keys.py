from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from deployments.serve import issuer_keys
from deployments.serve.issuer_keys import (
    AGAIN_S,
    KEPT_S,
    MAX_BYTES,
    MAX_KEYS,
    OLD_S,
    READ_S,
    parse_keys,
)
from deployments.serve.issuer_keys import issuer_keys as keys_of
from registry.access_errors import JWTNotChecked
from registry.oidc_settings import OIDCSettings
from tests.support.app_server import served
from tests.support.fake_counters import ManualClock
from tests.support.oidc import PrivateKey, Website, ec_key, jwk, jwks, part, rsa_key, settings
from tests.support.tls_front import made_certificates

CONFIGURATION = "/realms/lab/.well-known/openid-configuration"
KEYS = "/realms/lab/keys"
ED25519 = ed25519.Ed25519PrivateKey.generate()


class Issuer:
    """A website of an issuer at ``url``, with a configuration and keys."""

    def __init__(self, port: int, site: Website) -> None:
        self.site, self.port = site, port
        self.base = f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/realms/lab"
        self.configure()
        site.serve(KEYS, jwks())

    def configure(self, **changes: Any) -> None:
        given = {"issuer": self.url, "jwks_uri": f"{self.base}{KEYS}", **changes}
        self.site.serve(CONFIGURATION, json.dumps(given).encode())

    def settings(self, **changes: Any) -> OIDCSettings:
        return settings(issuer=self.url, **changes)


@pytest.fixture
async def issuer(clock: ManualClock) -> AsyncIterator[Issuer]:
    site = Website()
    async with served(site) as port:
        yield Issuer(port, site)


async def test_keys_are_found_by_the_issuer_and_kept(issuer: Issuer, clock: ManualClock) -> None:
    """The issuer's configuration says where the keys are. They are read once, and again when they are old."""
    keys = keys_of(issuer.settings())
    for _ in range(3):
        assert len(await keys.fitting("r1", "RS256")) == 1
        assert len(await keys.fitting(None, "ES256")) == 1
    assert issuer.site.asked == [CONFIGURATION, KEYS]
    clock.now_s += OLD_S + 1
    issuer.site.serve(KEYS, jwks(jwk(rsa_key(), "r2")))
    assert await keys.fitting("r1", "RS256") == [], "it was withdrawn"
    assert issuer.site.asked == [CONFIGURATION, KEYS] * 2
    assert len(await keys.fitting("r2", "RS256")) == 1
    assert await keys_of(issuer.settings(algorithms=["ES256"])).fitting("r2", "RS256") == []


async def test_an_unknown_kid_makes_few_requests(issuer: Issuer, clock: ManualClock) -> None:
    """Strangers can't make the registry call the issuer more often than once in AGAIN_S seconds."""
    keys = keys_of(issuer.settings(jwks_url=f"{issuer.base}{KEYS}"))
    for number in range(20):
        assert await keys.fitting(f"x{number}", "RS256") == []
    assert issuer.site.asked == [KEYS]
    clock.now_s += AGAIN_S
    issuer.site.serve(KEYS, jwks(jwk(rsa_key(), "r2")))
    assert len(await keys.fitting("r2", "RS256")) == 1, "a new key is found"
    for number in range(20):
        assert await keys.fitting(f"x{number}", "RS256") == []
    assert issuer.site.asked == [KEYS] * 2


async def test_an_issuer_that_never_answered_is_not_hammered(issuer: Issuer, clock: ManualClock) -> None:
    """Without keys each call is a 503 that says when to come back; the issuer is asked then."""
    keys = keys_of(issuer.settings())
    issuer.site.serve(KEYS, b"", 500)
    for _ in range(20):
        with pytest.raises(JWTNotChecked, match=r"try again in 15 s") as caught:
            await keys.fitting("r1", "RS256")
        assert (caught.value.http_status, caught.value.retryable) == (503, True)
    assert issuer.site.asked == [CONFIGURATION, KEYS]
    clock.now_s += AGAIN_S
    issuer.site.serve(KEYS, jwks())
    assert len(await keys.fitting("r1", "RS256")) == 1


async def test_keys_outlast_an_outage_for_a_while(issuer: Issuer, clock: ManualClock) -> None:
    """While the issuer can't be reached, its keys are used for KEPT_S seconds, and not longer."""
    keys = keys_of(issuer.settings())
    assert len(await keys.fitting("r1", "RS256")) == 1
    begin_s = clock.now_s
    issuer.site.serve(CONFIGURATION, b"", 503)
    for age_s in (OLD_S + 1, KEPT_S):
        clock.now_s = begin_s + age_s
        assert len(await keys.fitting("r1", "RS256")) == 1
    clock.now_s = begin_s + KEPT_S + AGAIN_S
    with pytest.raises(JWTNotChecked):
        await keys.fitting("r1", "RS256")


async def test_callers_share_one_read(issuer: Issuer) -> None:
    """Many first JWTs at once are one read, and a caller that hangs up does not end it."""
    keys = keys_of(issuer.settings())
    issuer.site.hold.clear()
    callers = [asyncio.create_task(keys.fitting("r1", "RS256")) for _ in range(10)]
    await issuer.site.was_asked.wait()
    callers[0].cancel()
    issuer.site.hold.set()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert all(isinstance(each, list) and len(each) == 1 for each in found[1:])
    assert issuer.site.asked == [CONFIGURATION, KEYS]


ODD: dict[str, tuple[tuple[str, bytes, int, tuple[bytes, bytes] | None], str]] = {
    "redirected": ((KEYS, b"", 302, (b"location", b"https://evil.example/keys")), "set access.oidc.jwks_url"),
    "redirected to itself": ((CONFIGURATION, b"", 307, (b"location", b"/other")), "is redirected"),
    "an error": ((KEYS, jwks(), 404, None), "answers 404"),
    "something else": ((KEYS, jwks(), 203, None), "answers 203"),
    "too long": ((KEYS, b" " * (MAX_BYTES + 1), 200, None), "more than 256 KiB"),
    "compressed": ((KEYS, gzip.compress(jwks()), 200, (b"content-encoding", b"gzip")), "compressed"),
    "no JSON": ((KEYS, b"<html>", 200, None), "the list of keys (JWKS) is no JSON"),
    "no UTF-8": ((KEYS, b"\xff", 200, None), "the list of keys (JWKS) is no JSON"),
    "deep JSON": ((KEYS, b"[" * 100_000, 200, None), "no JSON"),
    "a name twice": ((KEYS, b'{"keys": [], "keys": []}', 200, None), "occurs twice"),
    "no object": ((KEYS, b"[]", 200, None), "no JSON object"),
    "no list": ((KEYS, b'{"keys": {}}', 200, None), "no list"),
    "too many keys": ((KEYS, jwks(*[{}] * (MAX_KEYS + 1)), 200, None), "100 are allowed"),
    "an issuer without text": ((CONFIGURATION, b'{"issuer": null}', 200, None), "correct access.oidc.issuer"),
    "another issuer": ((CONFIGURATION, b'{"issuer": "https://evil.example"}', 200, None), "correct access.oidc.issuer"),
}


async def test_what_an_issuer_must_not_answer(issuer: Issuer) -> None:
    """Such answers give no keys; the log has the reason, and redirects are not followed."""
    for name, ((path, body, status, header), reason) in ODD.items():
        issuer.configure()
        issuer.site.serve(path, body, status, *([] if header is None else [header]))
        await no_keys(issuer, name, reason)
    assert set(issuer.site.asked) == {CONFIGURATION, KEYS}


async def test_an_answer_of_the_largest_size_is_used(issuer: Issuer) -> None:
    """It is asked for without compression, which would be refused."""
    issuer.site.serve(KEYS, jwks().ljust(MAX_BYTES))
    assert len(await keys_of(issuer.settings()).fitting("r1", "RS256")) == 1
    assert issuer.site.headers[b"accept-encoding"] == b"identity"
    assert issuer.site.headers[b"accept"] == b"application/json"


async def test_each_request_has_the_time_of_the_read(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, httpx would end it after 5 seconds."""
    clients: list[httpx.AsyncClient] = []

    class Noted(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            clients.append(self)

    monkeypatch.setattr(httpx, "AsyncClient", Noted)
    assert len(await keys_of(issuer.settings()).fitting("r1", "RS256")) == 1
    assert [each.timeout for each in clients] == [httpx.Timeout(READ_S)]


async def test_a_slash_at_the_end_of_an_issuer_counts(issuer: Issuer) -> None:
    """It is left out of the place of the configuration, but not of the comparison with the issuer."""
    issuer.configure(issuer=f"{issuer.url}/")
    await no_keys(issuer, "with a slash", "correct access.oidc.issuer, to the letter")
    assert len(await keys_of(settings(issuer=f"{issuer.url}/")).fitting("r1", "RS256")) == 1
    assert issuer.site.asked == [CONFIGURATION, CONFIGURATION, KEYS]


async def test_an_answer_without_end_is_not_read_to_its_end(clock: ManualClock) -> None:
    """The connection is closed when MAX_BYTES have come, so that the memory is bounded; the log has the reason."""
    sent = 0

    async def endless(_scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done() and sent < 100 * MAX_BYTES:
            await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})
            sent += 65536
        await gone

    async with served(endless) as port:
        with capture_logs() as logs, pytest.raises(JWTNotChecked):
            await keys_of(settings(jwks_url=f"http://127.0.0.1:{port}/keys")).fitting("r1", "RS256")
    assert "more than 256 KiB" in logs[0]["reason"]
    assert sent < 100 * MAX_BYTES


async def test_keys_on_this_machine_come_directly(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read without encryption, so no proxy of the environment may see or change them. Others need a proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for found in (issuer.settings(), settings(jwks_url=f"{issuer.base}{KEYS}")):
        assert len(await keys_of(found).fitting("r1", "RS256")) == 1
    assert issuer_keys._trust(httpx.URL(issuer.url), None).get_ca_certs() == [], "no certificates are needed"
    monkeypatch.setenv("HTTPS_PROXY", "ftp://127.0.0.1:1")
    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await keys_of(settings()).fitting("r1", "RS256")
    assert "Unknown scheme for proxy URL" in logs[0]["reason"]


NAMED: dict[str | None, str] = {
    "https://evil.example/keys": "another host",
    "http://127.0.0.1:1/keys": "another host",
    "http://localhost:{port}/realms/lab/keys": "another host",
    "https://127.0.0.1:{port}/realms/lab/keys": "another host",
    "http://evil.example/keys": "jwks_uri in {place} must begin with https://",
    "file:///etc/passwd": "jwks_uri in {place} needs a host",
    None: "jwks_uri in {place} needs a host",
}


async def test_a_configuration_names_no_other_host(issuer: Issuer) -> None:
    """The keys must be on the issuer's host; another one is named by the operator, not by an answer."""
    for url, reason in NAMED.items():
        issuer.configure(jwks_uri=url and url.format(port=issuer.port))
        await no_keys(issuer, url, reason.format(place=f"{issuer.base}{CONFIGURATION}"))
    assert set(issuer.site.asked) == {CONFIGURATION}


async def no_keys(issuer: Issuer, name: str | None, reason: str) -> None:
    """Check that the issuer gives no keys, for this reason."""
    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await keys_of(issuer.settings()).fitting("r1", "RS256")
    assert reason in logs[0]["reason"], name


def test_only_keys_that_are_meant_for_jwts_are_used() -> None:
    """Shared secrets, keys for encryption, published private keys, short keys and wrong curves are left out."""
    private = {**ECAlgorithm.to_jwk(ec_key(), as_dict=True), "kid": "private"}
    found = parse_keys(
        jwks(
            jwk(rsa_key(), "good"),
            {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
            {"kty": "oct", "kid": "secret for RS256", "k": "c2VjcmV0", "alg": "RS256"},
            {**ECAlgorithm.to_jwk(ec_key().public_key(), as_dict=True), "kid": "no use"},
            jwk(rsa_key(), "encrypts", use="enc"),
            jwk(rsa_key(), "signs", key_ops=["sign"]),
            jwk(rsa_key(), "operations as a number", key_ops=7),
            jwk(rsa_key(), "operations as a text", key_ops="verify"),
            jwk(rsa_key(), "other", alg="RS512"),
            jwk(rsa_key("short", 1024), "short"),
            jwk(rsa_key(), "8193 bits", n=part(b"\1" + b"\xff" * 1024)),
            jwk(rsa_key(), "8192 bits", n=part(b"\xff" * 1024)),
            jwk(ec_key(), "curve", crv="P-384"),
            jwk(ec_key(), "point", x="AAAA"),
            jwk(ec.generate_private_key(ec.SECP384R1()), "curve of ES384"),
            {**jwk(rsa_key(), None), "kid": 7},
            {"kty": "RSA", "n": 7, "e": 7, "kid": "numbers"},
            {"kty": ["RSA"]},
            {"kty": "unheard of"},
            private,
            "text",  # type: ignore[arg-type]
        ),
        ["RS256", "ES256"],
    )
    assert [each[:2] for each in found] == [("good", "RS256"), ("no use", "ES256"), ("8192 bits", "RS256")]


def test_the_log_names_a_published_private_key() -> None:
    """The log tells the operator which key the issuer must replace: everybody can sign JWTs with it."""
    private = {**ECAlgorithm.to_jwk(ec_key(), as_dict=True), "kid": "private"}
    with capture_logs() as logs:
        assert parse_keys(jwks(private), ["ES256"]) == []
    event = "a key of the issuer of JWTs is not used, because its private part is published"
    assert logs == [{"event": event, "kid": "private", "log_level": "warning"}]


def test_an_issuer_may_have_100_keys() -> None:
    """One more is refused, see ``ODD``."""
    assert [each.key_id for each in parse_keys(jwks(*[{}] * 99, jwk(rsa_key(), "good")), ["RS256"])] == ["good"]


FIELDS = st.sampled_from(["kty", "crv", "x", "y", "n", "e", "alg", "use", "key_ops", "kid", "k", "p", "q"])
VALUES = st.sampled_from(
    [
        None,
        True,
        7,
        1e300,
        "",
        "AAAA",
        "!",
        "ä",
        "\0",
        "A" * 43,
        [],
        ["x"],
        {"a": 1},
        "P-384",
        "X25519",
        "EC",
        "OKP",
        "oct",
    ]
)


@given(data=st.data(), changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_an_odd_key_does_not_hide_another(data: st.DataObject, changes: dict[str, Any]) -> None:
    """Whatever the fields of a key are, it is left out or used, and the good one besides it is used."""
    keys: list[PrivateKey] = [rsa_key(), ec_key(), ED25519]
    odd = data.draw(st.sampled_from(keys))
    found = parse_keys(jwks(jwk(odd, "odd", **changes), jwk(rsa_key(), "good")), ["RS256", "ES256", "EdDSA"])
    assert ("good", "RS256") in [each[:2] for each in found]


async def test_the_certificate_of_an_issuer_is_checked(clock: ManualClock, tmp_path: Path) -> None:
    """Keys come from a server whose certificate is trusted: with ``ca_file``, only one of this CA."""
    ca_file, site = made_certificates(tmp_path), Website()
    site.serve("/keys", jwks())
    files = {"ssl_certfile": f"{tmp_path}/registry.crt", "ssl_keyfile": f"{tmp_path}/registry.key"}
    async with served(site, **files) as port:
        url = f"https://localhost:{port}/keys"
        assert len(await keys_of(settings(jwks_url=url, ca_file=str(ca_file))).fitting("r1", "RS256")) == 1
        for other in (None, certifi.where()):
            with capture_logs() as logs, pytest.raises(JWTNotChecked):
                await keys_of(settings(jwks_url=url, ca_file=other)).fitting("r1", "RS256")
            assert "CERTIFICATE_VERIFY_FAILED" in logs[0]["reason"]
        elsewhere = settings(jwks_url=f"https://127.0.0.1:{port}/keys", ca_file=str(ca_file))
        with capture_logs() as logs, pytest.raises(JWTNotChecked):
            await keys_of(elsewhere).fitting("r1", "RS256")
        assert "IP address mismatch" in logs[0]["reason"], "the certificate is another host's"
        assert len(issuer_keys._trust(httpx.URL(url), ca_file).get_ca_certs()) == 1, "no CA besides it is trusted"
        changing = tmp_path / "changing.crt"
        changing.write_text(certifi.contents())
        keys = keys_of(settings(jwks_url=url, ca_file=str(changing)))
        with pytest.raises(JWTNotChecked):
            await keys.fitting("r1", "RS256")
        changing.write_bytes(ca_file.read_bytes())
        clock.now_s += AGAIN_S
        assert len(await keys.fitting("r1", "RS256")) == 1, "the file was read again"
    assert site.asked == ["/keys"] * 2
