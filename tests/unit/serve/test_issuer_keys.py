from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt import PyJWK
from jwt.algorithms import ECAlgorithm
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from deployments.serve import issuer_keys
from deployments.serve.issuer_keys import (
    AGAIN_S,
    EARLY_S,
    KEPT_S,
    MAX_BYTES,
    MAX_KEYS,
    OLD_S,
    IssuerKey,
    IssuerKeys,
    parse_keys,
)
from deployments.serve.issuer_keys import issuer_keys as keys_of
from registry.access_errors import JWTNotChecked
from registry.errors import BadSettings
from registry.oidc_settings import OIDCSettings
from tests.support.app_server import served
from tests.support.fake_counters import ManualClock
from tests.support.oidc import Website, ec_key, jwk, jwks, part, rsa_key, settings
from tests.support.tls_front import made_certificates

CONFIGURATION = "/realms/lab/.well-known/openid-configuration"
KEYS = "/realms/lab/keys"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    clock = ManualClock()
    monkeypatch.setattr(issuer_keys, "monotonic", clock)
    return clock


class Issuer:
    """A website of an issuer at ``url``, with a configuration and keys."""

    def __init__(self, port: int, site: Website) -> None:
        self.site = site
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


async def test_a_slow_issuer_has_a_time_limit(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of the keys ends after READ_S, also if the issuer sends a byte now and then."""
    monkeypatch.setattr(issuer_keys, "READ_S", 0.05)

    async def read() -> Sequence[IssuerKey]:
        await asyncio.Event().wait()
        return []

    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await IssuerKeys("https://idp.example", read).fitting("r1", "RS256")
    assert "Timeout" in logs[0]["reason"]


class SlowIssuer:
    """The keys of an issuer that answers with ``answer`` when ``ready`` is set, or not at all if it is None."""

    def __init__(self) -> None:
        self.answer: bytes | None = jwks()
        self.ready = asyncio.Event()
        self.keys = IssuerKeys("https://idp.example", self._read)

    async def _read(self) -> Sequence[IssuerKey]:
        await self.ready.wait()
        if self.answer is None:
            raise OSError("no answer")
        return parse_keys(self.answer, ["RS256"])

    async def call(self, key_id: str = "r1") -> asyncio.Task[list[PyJWK]]:
        """Begin to ask for a key, and return the task, which is done unless it waits for the issuer."""
        task = asyncio.create_task(self.keys.fitting(key_id, "RS256"))
        await asyncio.sleep(0)
        return task


@pytest.fixture
async def slow(clock: ManualClock) -> SlowIssuer:
    """An issuer whose keys were read just now, and which has become slow."""
    slow = SlowIssuer()
    slow.ready.set()
    assert len(await slow.keys.fitting("r1", "RS256")) == 1
    slow.ready.clear()
    return slow


async def test_a_forged_kid_delays_no_new_key(slow: SlowIssuer, clock: ManualClock) -> None:
    """A JWT whose key the issuer had not when somebody made the registry ask is not refused: it may come again."""
    slow.ready.set()
    clock.now_s += AGAIN_S
    assert await slow.keys.fitting("forged", "RS256") == []
    slow.answer = jwks(jwk(rsa_key(), "r2"))
    clock.now_s += 1
    with pytest.raises(JWTNotChecked, match="try again in 14 s"):
        await slow.keys.fitting("r2", "RS256")
    clock.now_s += 14
    assert len(await slow.keys.fitting("r2", "RS256")) == 1


WITHOUT_KEYS: dict[str, bytes] = {
    "none": b'{"keys": []}',
    "its private part is published": jwks({**jwk(rsa_key(), "r1"), "d": "AQAB"}),
    "only another algorithm": jwks(jwk(ec_key(), "r1", alg="ES256")),
}


@pytest.mark.parametrize("name", WITHOUT_KEYS)
async def test_the_last_key_can_be_withdrawn(slow: SlowIssuer, clock: ManualClock, name: str) -> None:
    """An issuer without usable keys is not one that can't be reached: its old key is refused, and the log says why."""
    slow.answer = WITHOUT_KEYS[name]
    slow.ready.set()
    clock.now_s += OLD_S + 1
    with capture_logs() as logs:
        assert await slow.keys.fitting("r1", "RS256") == []
    assert "all JWTs are refused" in logs[-1]["event"]


async def test_keys_are_read_again_before_callers_have_to_wait(slow: SlowIssuer, clock: ManualClock) -> None:
    """From EARLY_S on, a read begins, and callers use the keys that they have."""
    clock.now_s += EARLY_S + 1
    assert len((await slow.call()).result()) == 1
    slow.answer = b'{"keys": []}'
    slow.ready.set()
    assert slow.keys._reading is not None
    await slow.keys._reading
    assert await (await slow.call()) == []


async def test_a_slow_issuer_withdraws_keys_in_time(slow: SlowIssuer, clock: ManualClock) -> None:
    """If the keys are older than OLD_S, callers wait for the issuer's answer, so a withdrawn key is not used."""
    clock.now_s += KEPT_S - 10
    calls = [await slow.call(), await slow.call()]
    assert not any(each.done() for each in calls)
    slow.answer = b'{"keys": []}'
    slow.ready.set()
    assert await asyncio.gather(*calls) == [[], []]


async def test_nobody_waits_for_an_issuer_that_has_just_failed(slow: SlowIssuer, clock: ManualClock) -> None:
    """While an issuer does not answer, its keys are used at once; the next attempts are in the background."""
    slow.answer = None
    clock.now_s += OLD_S + 1
    first = await slow.call()
    slow.ready.set()
    assert len(await first) == 1
    slow.ready.clear()
    clock.now_s += AGAIN_S
    for _ in range(3):
        assert len((await slow.call()).result()) == 1
    assert slow.keys._reading is not None
    assert not slow.keys._reading.done()
    slow.ready.set()
    await slow.keys._reading


async def test_a_bounded_number_of_callers_waits(
    slow: SlowIssuer, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above MAX_WAITING, a JWT with an unknown key is a 503 at once; a known key needs no wait."""
    monkeypatch.setattr(issuer_keys, "MAX_WAITING", 3)
    clock.now_s += AGAIN_S
    waiting = [await slow.call(f"forged{number}") for number in range(3)]
    for _ in range(2):
        with pytest.raises(JWTNotChecked, match="too many callers wait"):
            (await slow.call("forged")).result()
    assert len((await slow.call()).result()) == 1
    assert not any(each.done() for each in waiting)
    waiting[0].cancel()
    await asyncio.sleep(0)
    waiting.append(await slow.call("forged"))
    assert not waiting[-1].done(), "a caller that hangs up makes room"
    slow.ready.set()
    assert await asyncio.gather(*waiting[1:]) == [[]] * 3


ODD: dict[str, tuple[tuple[str, bytes, int, tuple[bytes, bytes] | None], str]] = {
    "redirected": ((KEYS, b"", 302, (b"location", b"https://evil.example/keys")), "set access.oidc.jwks_url"),
    "redirected to itself": ((CONFIGURATION, b"", 307, (b"location", b"/other")), "is redirected"),
    "an error": ((KEYS, jwks(), 404, None), "answers 404"),
    "too long": ((KEYS, b" " * (MAX_BYTES + 1), 200, None), "more than 256 KiB"),
    "compressed": ((KEYS, gzip.compress(jwks()), 200, (b"content-encoding", b"gzip")), "compressed"),
    "no JSON": ((KEYS, b"<html>", 200, None), "no JSON"),
    "no UTF-8": ((KEYS, b"\xff", 200, None), "no JSON"),
    "deep JSON": ((KEYS, b"[" * 100_000, 200, None), "no JSON"),
    "a name twice": ((KEYS, b'{"keys": [], "keys": []}', 200, None), "occurs twice"),
    "no object": ((KEYS, b"[]", 200, None), "no JSON object"),
    "no list": ((KEYS, b'{"keys": {}}', 200, None), "no list"),
    "too many keys": ((KEYS, jwks(*[{}] * (MAX_KEYS + 1)), 200, None), "100 are allowed"),
    "another issuer": ((CONFIGURATION, b'{"issuer": "https://evil.example"}', 200, None), "correct access.oidc.issuer"),
}


async def test_what_an_issuer_must_not_answer(issuer: Issuer) -> None:
    """Such answers give no keys; the log has the reason, and redirects are not followed."""
    for name, ((path, body, status, header), reason) in ODD.items():
        issuer.configure()
        issuer.site.serve(path, body, status, *([] if header is None else [header]))
        await no_keys(issuer, name, reason)
    assert set(issuer.site.asked) == {CONFIGURATION, KEYS}


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


async def test_keys_of_an_issuer_on_this_machine_come_directly(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read without encryption, so no proxy of the environment may see or change them."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert len(await keys_of(issuer.settings()).fitting("r1", "RS256")) == 1


NAMED: dict[str | None, str] = {
    "https://evil.example/keys": "another host",
    "http://127.0.0.1:1/keys": "another host",
    "http://evil.example/keys": "must begin with https://",
    "file:///etc/passwd": "needs a host",
    None: "needs a host",
}


async def test_a_configuration_names_no_other_host(issuer: Issuer) -> None:
    """The keys must be on the issuer's host; another one is named by the operator, not by an answer."""
    for url, reason in NAMED.items():
        issuer.configure(jwks_uri=url)
        await no_keys(issuer, url, reason)
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
            jwk(rsa_key(), "encrypts", use="enc"),
            jwk(rsa_key(), "signs", key_ops=["sign"]),
            jwk(rsa_key(), "other", alg="RS512"),
            jwk(rsa_key("short", 1024), "short"),
            jwk(rsa_key(), "long", n=part(b"\xff" * 1025)),
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
    assert [each[:2] for each in found] == [("good", "RS256")]


async def test_keys_may_be_in_a_file(clock: ManualClock, tmp_path: Path) -> None:
    """A file is read like a URL, and again when it is old."""
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks())
    keys = keys_of(settings(jwks_file=str(file)))
    assert len(await keys.fitting("r1", "RS256")) == 1
    file.write_bytes(jwks(jwk(rsa_key(), "r2")))
    clock.now_s += AGAIN_S
    assert len(await keys.fitting("r2", "RS256")) == 1


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("jwks_file", None, "No such file"),
        ("jwks_file", "{}", "no list"),
        ("jwks_file", '{"keys": []}', "no key for RS256, ES256"),
        ("jwks_file", " " * (MAX_BYTES + 1), "more than 256 KiB"),
        ("ca_file", None, "No such file"),
        ("ca_file", "no certificate", "needs certificates"),
    ],
)
def test_a_start_needs_the_files(tmp_path: Path, field: str, text: str | None, problem: str) -> None:
    """A file that can't be used is an error of `up`, which names the setting."""
    file = tmp_path / "file"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadSettings, match=rf"access\.oidc\.{field}: .*{problem}"):
        issuer_keys.require_files(settings(**{field: str(file)}))


async def test_a_file_that_every_user_can_change_is_not_used(clock: ManualClock, tmp_path: Path) -> None:
    """Who can change the keys can sign JWTs of an operator. The error is one of `up`, and of each read."""
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks())
    file.chmod(0o666)
    changed = settings(jwks_file=str(file))
    with pytest.raises(BadSettings, match=r"every user of this machine can write to it; run `chmod o-w`"):
        issuer_keys.require_files(changed)
    with pytest.raises(JWTNotChecked):
        await keys_of(changed).fitting("r1", "RS256")


async def test_any_failure_is_an_issuer_that_is_not_reached(clock: ManualClock) -> None:
    """An error of a library, for instance of a proxy's URL, does not end the ingress's background task."""

    async def read() -> Sequence[IssuerKey]:
        raise ImportError("socksio is missing")

    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await IssuerKeys("https://idp.example", read).fitting("r1", "RS256")
    assert logs[0]["reason"] == "ImportError: socksio is missing"


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
        changing = tmp_path / "changing.crt"
        changing.write_text(certifi.contents())
        keys = keys_of(settings(jwks_url=url, ca_file=str(changing)))
        with pytest.raises(JWTNotChecked):
            await keys.fitting("r1", "RS256")
        changing.write_bytes(ca_file.read_bytes())
        clock.now_s += AGAIN_S
        assert len(await keys.fitting("r1", "RS256")) == 1, "the file was read again"
    assert site.asked == ["/keys"] * 2
