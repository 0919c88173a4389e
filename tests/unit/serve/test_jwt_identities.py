from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deployments.serve import issuer_keys, jwt_identities
from deployments.serve.identities import KeyGuard, TrustedClients, key_of, named, refused_key_id
from deployments.serve.issuer_keys import AGAIN_S, IssuerKey, IssuerKeys, parse_keys
from deployments.serve.jwt_identities import MAX_HEADER, MAX_JWT, JWTIdentities
from registry.access_errors import JWTNotChecked, JWTRefused
from registry.oidc_settings import SigningAlgorithm
from registry.store.rows import APIKey
from tests.support.fake_counters import ManualClock
from tests.support.oidc import (
    ISSUER,
    PrivateKey,
    at,
    claims,
    ec_key,
    jwk,
    jwks,
    part,
    rsa_key,
    settings,
    signed,
    unsigned,
)


def identities(keys: bytes | Callable[[], bytes], **changes: Any) -> JWTIdentities:
    """A check of JWTs by these keys (JWKS), or by those that a function returns at each read."""
    found = settings(**changes)

    async def read() -> Sequence[IssuerKey]:
        return parse_keys(keys if isinstance(keys, bytes) else keys(), found.algorithms)

    return JWTIdentities(found, IssuerKeys(found.issuer, read))


@cache
def usual() -> JWTIdentities:
    """The check that most tests use, with its keys read once."""
    return identities(jwks())


class Guarded:
    """A guard of keys with JWTs, around an app that says who called. The registry is never asked."""

    def __init__(self, keys: bytes | Callable[[], bytes], *, wrong_a_minute: int | None = None, **changes: Any) -> None:
        self.scopes: list[Scope] = []

        async def call(*_args: Any) -> None:
            pytest.fail("the registry was asked")

        jwts = identities(keys, **changes)
        self.guard = KeyGuard(self.app, call, TrustedClients({}), wrong_a_minute=wrong_a_minute, jwts=jwts)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self._noting), base_url="http://127.0.0.1")

    async def _noting(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await self.guard(scope, receive, send)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = key_of(scope)
        assert key is not None
        await JSONResponse([key.key_id, key.role, key.tenant])(scope, receive, send)

    async def get(self, *tokens: str) -> httpx.Response:
        return await self.http.get("/machines", headers=[("authorization", f"Bearer {token}") for token in tokens])


@pytest.fixture
def guarded() -> Guarded:
    return Guarded(jwks())


ACCEPTED: dict[str, Callable[[], str]] = {
    "RS256": signed,
    "ES256": lambda: signed(key=ec_key(), algorithm="ES256", kid="e1"),
    "several audiences": lambda: signed(claims(aud=["account", "greenprompt"])),
    "no kid, one key for its algorithm": lambda: signed(kid=None),
    "type of an access token": lambda: signed(typ="application/at+jwt"),
    "no type": lambda: signed(typ=None),
    "- and _ in base64": lambda: signed(claims(more="~~~~~?????")),
    "role as text": lambda: signed(claims(groups="llm-users")),
    "clocks differ by less than the leeway": lambda: signed(at(iat=5, nbf=5)),
    "expired within the leeway": lambda: signed(at(exp=-2)),
    "exp at the end of the year 9999": lambda: signed(claims(exp=253_402_300_799)),
}


@pytest.mark.parametrize("name", ACCEPTED)
async def test_a_good_jwt_identifies_its_caller(guarded: Guarded, name: str) -> None:
    """Role and tenant come from the claims, and the id from issuer and subject. The registry is not asked."""
    answer = await guarded.get(ACCEPTED[name]())
    assert (answer.status_code, answer.text) == (200, f'["{ISSUER}#ann","client","lab"]')


KEYS: dict[str, Callable[[], PrivateKey]] = {
    "R": rsa_key,
    "P": rsa_key,
    "ES256": ec_key,
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", get_args(SigningAlgorithm))
async def test_every_algorithm_of_the_settings_can_be_used(algorithm: str) -> None:
    """Each has a key in a JWKS, which needs no field `alg`; the others' JWTs are refused then."""
    key = (KEYS.get(algorithm) or KEYS[algorithm[0]])()
    check = identities(jwks(jwk(key, "k")), algorithms=[algorithm])
    assert (await check.identity(signed(key=key, algorithm=algorithm, kid="k"))).tenant == "lab"
    other = "ES256" if algorithm != "ES256" else "RS256"
    with pytest.raises(JWTRefused, match=r"access\.oidc\.algorithms"):
        await check.identity(signed(key=ec_key() if other == "ES256" else rsa_key(), algorithm=other, kid="k"))


def _hs256_with_the_public_key() -> str:
    secret = rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'r1'})}.{part(claims())}"
    return f"{text}.{part(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def _changed_after_signing() -> str:
    header, _, signature = signed().split(".")
    return f"{header}.{part(claims(tenant='rivals'))}.{signature}"


def _with_header(**fields: Any) -> Callable[[], str]:
    return lambda: signed(**fields)


def _with_claims(**changes: Any) -> Callable[[], str]:
    return lambda: signed(claims(**changes))


def signed_text(claims_text: bytes, **headers: Any) -> str:
    """A JWT of the issuer with these claims, whatever they are."""
    text = f"{part({'alg': 'ES256', 'kid': 'e1', **headers})}.{part(claims_text)}"
    return f"{text}.{part(ECAlgorithm(SHA256).sign(text.encode(), ec_key()))}"


_NOT_UNDERSTOOD = "its header has one of the fields crit, b64, zip, enc"
_NO_ROLE = "its claim groups gives no role"
_TENANT = "its claim tenant (access.oidc.tenant_claim) is no name of a tenant"
ATTACKS: dict[str, tuple[Callable[[], str], str]] = {
    # the signature
    "alg none": (lambda: unsigned({"alg": "none", "kid": "r1"}, ""), "access.oidc.algorithms"),
    "HS256 with the public key": (_hs256_with_the_public_key, "access.oidc.algorithms"),
    "another algorithm of the right key": (lambda: signed(algorithm="RS512"), "access.oidc.algorithms"),
    "an allowed algorithm, but the key of another": (lambda: signed(key=ec_key(), algorithm="ES256"), "no such key"),
    "alg as a list": (
        lambda: unsigned({"alg": ["RS256"], "kid": "r1"}),
        "access.oidc.algorithms",
    ),
    "another key": (lambda: signed(key=rsa_key("stranger")), "signature is wrong"),
    "no signature": (lambda: signed().rpartition(".")[0] + ".", "signature is wrong"),
    "changed after signing": (_changed_after_signing, "signature is wrong"),
    "unknown kid": (_with_header(kid="r2"), "no such key"),
    "kid with a path": (_with_header(kid="../../../../dev/null"), "no such key"),
    "kid of SQL": (_with_header(kid="x' UNION SELECT 'r1"), "no such key"),
    "kid as a list": (lambda: unsigned({"alg": "RS256", "kid": ["r1"]}), "kid is no text"),
    "its own key": (
        lambda: signed(key=rsa_key("stranger"), jwk=jwk(rsa_key("stranger"), "r1")),
        "names a key of its own",
    ),
    "its own key is empty": (_with_header(jwk={}), "names a key of its own"),
    "URL of its own keys": (_with_header(jku="https://evil.example/jwks"), "names a key of its own"),
    "URL of its own certificate": (_with_header(x5u="https://evil.example/x"), "names a key of its own"),
    "its own certificate": (_with_header(x5c=["AAAA"]), "names a key of its own"),
    "critical extension": (
        lambda: unsigned({"alg": "RS256", "kid": "r1", "crit": ["x"], "x": 1}),
        _NOT_UNDERSTOOD,
    ),
    "compressed": (_with_header(zip="DEF"), _NOT_UNDERSTOOD),
    "compressed in no way": (_with_header(zip=None), _NOT_UNDERSTOOD),
    "encrypted": (_with_header(enc="A256GCM"), _NOT_UNDERSTOOD),
    "says how its claims are encoded": (lambda: signed_text(json.dumps(claims()).encode(), b64=True), _NOT_UNDERSTOOD),
    "another type": (_with_header(typ="dpop+jwt"), "access.oidc.types"),
    "a type of another kind": (_with_header(typ="message/at+jwt"), "access.oidc.types"),
    "type as a number": (lambda: unsigned({"alg": "RS256", "kid": "r1", "typ": 7}), "access.oidc.types"),
    # the text
    "too long": (_with_claims(more="x" * MAX_JWT), "longer than 8 KiB"),
    "garbage": (lambda: "a.b.c", "no valid JWT"),
    "empty parts": (lambda: "..", "no valid JWT"),
    "not ASCII": (lambda: "ä.ö.ü", "no valid JWT"),
    "header no object": (lambda: unsigned([1]), "no valid JWT"),
    "claims no object": (lambda: signed_text(b'"x"'), "no valid JWT"),
    "long header": (lambda: unsigned({"alg": "RS256", "x": "x" * MAX_HEADER}), "header is longer than 1 KiB"),
    "deep JSON": (lambda: signed_text(b"[" * 4000), "no valid JWT"),
    "a long number": (lambda: signed_text(b'{"iss":' + b"9" * 5000 + b"}"), "no valid JWT"),
    "a claim twice": (lambda: signed_text(b'{"iss":"x",' + json.dumps(claims())[1:].encode()), "no valid JWT"),
    "a name twice": (lambda: unsigned(b'{"alg":"none","alg":"RS256"}'), "no valid JWT"),
    "base64 with characters in between": (lambda: "!" + signed(), "no valid JWT"),
    # the claims
    "wrong iss": (_with_claims(iss="https://evil.example"), "claim iss"),
    "iss with a slash more": (_with_claims(iss=f"{ISSUER}/"), "claim iss"),
    "iss null": (lambda: signed_text(json.dumps({**claims(), "iss": None}).encode()), "no claim iss"),
    "no iss": (_with_claims(iss=None), "no claim iss"),
    "wrong aud": (_with_claims(aud="account"), "claim aud"),
    "aud list without us": (_with_claims(aud=["account", "greenprompt2"]), "claim aud"),
    "aud as an object": (_with_claims(aud={"greenprompt": 1}), "claim aud"),
    "no aud": (_with_claims(aud=None), "no claim aud"),
    "expired": (lambda: signed(at(exp=-60)), "it has expired"),
    "no exp": (_with_claims(exp=None), "no claim exp"),
    "exp as text": (_with_claims(exp="9999999999"), "exp is no time"),
    "exp true": (_with_claims(exp=True), "exp is no time"),
    "exp after the year 9999": (_with_claims(exp=253_402_300_800), "exp is no time"),
    "exp too late": (_with_claims(exp=10**400), "exp is no time"),
    "exp before 1970": (_with_claims(exp=-(10**400)), "exp is no time"),
    "exp without end": (_with_claims(exp=1e400), "no valid JWT"),
    "iat without end": (_with_claims(iat=1e400), "iat is no time"),
    "nbf without end": (_with_claims(nbf=1e400), "no valid JWT"),
    "nbf in the future": (lambda: signed(at(nbf=600)), "not valid yet"),
    "iat in the future": (lambda: signed(at(iat=600)), "not valid yet"),
    "no iat": (_with_claims(iat=None), "no claim iat"),
    "no sub": (_with_claims(sub=None), "no claim sub"),
    "empty sub": (_with_claims(sub=""), "claim sub"),
    "sub as a number": (_with_claims(sub=7), "claim sub"),
    "sub with a line break": (_with_claims(sub="ann\nroot"), "claim sub"),
    "sub not ASCII": (_with_claims(sub="änn"), "claim sub"),
    "long sub": (_with_claims(sub="x" * 256), "claim sub"),
    "bound to a key": (_with_claims(cnf={"jkt": "abc"}), "claim cnf"),
    "expired in 1970": (_with_claims(exp=0), "it has expired"),
    "bound to a certificate": (_with_claims(cnf={"x5t#S256": "abc"}), "claim cnf"),
    "bound to nothing": (_with_claims(cnf={}), "claim cnf"),
    "no role": (_with_claims(groups=None), _NO_ROLE),
    "unknown role": (_with_claims(groups=["staff"]), _NO_ROLE),
    "role as an object": (_with_claims(groups={"llm-users": True}), _NO_ROLE),
    "role as part of a text": (_with_claims(groups="staff llm-users"), _NO_ROLE),
    "two roles": (_with_claims(groups=["llm-users", "llm-admins"]), "several roles: client and operator"),
    "no tenant": (_with_claims(tenant=None), "no claim tenant"),
    "empty tenant": (_with_claims(tenant=""), _TENANT),
    "invalid tenant": (_with_claims(tenant="a b"), _TENANT),
    "tenant with a line break": (_with_claims(tenant="lab\n"), _TENANT),
    "tenant as a number": (_with_claims(tenant=7), _TENANT),
    "tenant as a list": (_with_claims(tenant=["lab"]), _TENANT),
    "long tenant": (_with_claims(tenant="x" * 65), _TENANT),
}
SIGNED_FOR_US = {"expired", *list(ATTACKS)[list(ATTACKS).index("bound to a key") :]}


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_wrong_jwt_is_refused(guarded: Guarded, name: str) -> None:
    """Each is a 401 with the reason, which repeats nothing of the JWT; only a JWT of the issuer for us has an id."""
    make, problem = ATTACKS[name]
    text = make()
    answer = await guarded.http.get("/machines", headers=[(b"authorization", f"Bearer {text}".encode())])
    assert (answer.status_code, answer.json()["code"]) == (401, "jwt_refused"), answer.text
    assert problem in answer.json()["message"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not [each for each in text.split(".") if len(each) > 3 and each in answer.text]
    assert refused_key_id(guarded.scopes[-1]) == (f"{ISSUER}#ann" if name in SIGNED_FOR_US else None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["iss", "aud", "sub", "iat", "nbf", "exp", "jti", "groups", "tenant", "alg", "typ", "kid", "b64"]
)


@given(given_claims=st.dictionaries(NAMES, JSON, max_size=3), headers=st.dictionaries(NAMES, JSON, max_size=2))
def test_no_jwt_is_an_unexpected_error(given_claims: dict[str, Any], headers: dict[str, Any]) -> None:
    """Whatever the issuer signs, and whatever a header says: the result is an identity, or a documented error."""
    text = signed_text(json.dumps({**claims(), **given_claims}).encode(), **headers)

    async def check() -> APIKey | None:
        try:
            return await usual().identity(text)
        except (JWTRefused, JWTNotChecked):  # the latter: a key that the issuer does not have, perhaps not yet
            return None

    key = asyncio.run(check())
    assert key is None or (key.key_id.startswith(f"{ISSUER}#") and key.tenant is not None)


async def test_claims_are_read_after_the_signature_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stranger puts there costs no work: of a forged JWT only the header is parsed."""
    parsed: list[str] = []
    check = jwt_identities._object

    def noting(text: str) -> dict[str, Any]:
        parsed.append(text)
        return check(text)

    monkeypatch.setattr(jwt_identities, "_object", noting)
    forged = signed(claims(more=[{}] * 1_500), key=rsa_key("stranger"))
    with pytest.raises(JWTRefused, match="signature is wrong"):
        await usual().identity(forged)
    assert parsed == [forged.partition(".")[0]]


async def test_two_headers_are_refused(guarded: Guarded) -> None:
    """Two Authorization headers are no identity, though each of them would be."""
    answer = await guarded.get(signed(), signed())
    assert (answer.status_code, answer.json()["code"]) == (401, "key_needed")


@pytest.mark.parametrize("text", ["", "x", "gp_a.b.c", "a.b", "a.b.c.d.e"])
async def test_what_is_no_jwt_is_no_key(guarded: Guarded, text: str) -> None:
    """Other texts get the answer that they get without an issuer."""
    answer = await guarded.get(text)
    assert (answer.status_code, answer.json()["code"]) == (401, "key_needed")


async def test_without_kid_one_key_must_be_meant() -> None:
    """If several keys fit, they are not tried one after another."""
    several = Guarded(jwks(jwk(rsa_key(), "r1"), jwk(rsa_key("other"), "r2")))
    assert "kid is missing" in (await several.get(signed(kid=None))).text
    assert (await several.get(signed())).status_code == 200
    twice = Guarded(jwks(jwk(rsa_key(), "r1"), jwk(rsa_key("other"), "r1")))
    assert "several keys with it" in (await twice.get(signed())).text


async def test_roles_other_than_clients_have_no_tenant() -> None:
    """As with API keys, operators and viewers belong to no tenant, whatever their claims say."""
    nested = Guarded(jwks(), role_claim=["realm_access", "roles"], tenant_claim=None, tenant="lab")
    for value, role, tenant in (
        ("llm-admins", "operator", "null"),
        ("guests", "viewer", "null"),
        ("llm-users", "client", '"lab"'),
    ):
        answer = await nested.get(signed(claims(realm_access={"roles": [value]}, tenant="rivals")))
        assert answer.text == f'["{ISSUER}#ann","{role}",{tenant}]'
    assert (await nested.get(signed(claims(realm_access=["llm-admins"])))).status_code == 401


async def test_a_role_is_held_to_its_calls(guarded: Guarded) -> None:
    """A viewer's JWT can't drain machines."""
    token = signed(claims(groups=["guests"]))
    answer = await guarded.http.post("/machines/a/drain", headers={"authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.json()["code"]) == (403, "not_allowed")


async def test_a_jwt_ends_at_its_exp(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted until exp and the leeway, and refused from then on."""
    token = signed(claims(exp=2_000_000_000))
    for now_s, status in ((2_000_000_009, 200), (2_000_000_010, 401)):
        monkeypatch.setattr(jwt_identities, "time", lambda now_s=now_s: now_s)
        assert (await guarded.get(token)).status_code == status


async def test_wrong_jwts_count_as_wrong_keys() -> None:
    """After some, wrong ones get 429. Good ones are accepted, and what the issuer has signed for us is no guess."""
    limited = Guarded(jwks(), wrong_a_minute=3)
    expired = signed(at(exp=-60))
    assert [(await limited.get(expired)).status_code for _ in range(5)] == [401] * 5
    wrong = signed(key=rsa_key("stranger"))
    assert [(await limited.get(wrong)).status_code for _ in range(5)] == [401] * 3 + [429] * 2
    assert (await limited.get(wrong)).json()["code"] == "too_many_wrong_keys"
    assert (await limited.get(signed())).status_code == 200


async def test_a_new_key_is_no_guess_while_the_issuer_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JWT whose key can't be looked up gets 503, however often it comes, and counts as no wrong key."""
    keys, clock = [jwks()], ManualClock()
    monkeypatch.setattr(issuer_keys, "monotonic", clock)
    limited = Guarded(lambda: keys[-1], wrong_a_minute=1)
    assert (await limited.get(signed())).status_code == 200
    keys.clear()
    clock.now_s += AGAIN_S
    rotated = signed(key=rsa_key("new"), kid="r2")
    for _ in range(3):
        answer = await limited.get(rotated)
        assert (answer.status_code, answer.json()["code"]) == (503, "jwt_not_checked")
        assert (answer.json()["retryable"], answer.headers["retry-after"]) == (True, "15")
    assert (await limited.get(signed(key=rsa_key("stranger")))).status_code == 401
    keys.append(jwks(jwk(rsa_key("new"), "r2")))
    clock.now_s += AGAIN_S
    assert (await limited.get(rotated)).status_code == 200


async def test_limits_are_for_groups_of_jwts(guarded: Guarded) -> None:
    """Users may be able to choose `sub`, so the JWTs of a tenant, or of another role, have one limit together."""

    async def name(**changes: Any) -> str:
        await guarded.get(signed(claims(**changes)))
        key = key_of(guarded.scopes[-1])
        assert key is not None
        return named(key)

    assert {await name(sub=f"repo:a:ref:{number}") for number in range(3)} == {"the group of all JWTs of tenant 'lab'"}
    assert await name(tenant="rivals") == "the group of all JWTs of tenant 'rivals'"
    assert await name(groups=["guests"]) == "the group of all JWTs of the role viewer"
