"""What the settings allow a JWT, to the last byte and second; a request with a wrong JWT has no other identity."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from jwt import PyJWK
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deployments.serve.identities import KeyGuard, TrustedClients, key_of
from deployments.serve.issuer_keys import IssuerKey, IssuerKeys, parse_keys
from deployments.serve.jwt_identities import JWTIdentities
from registry.access_errors import JWTRefused
from registry.store.rows import APIKey
from registry.wire.words import Role
from tests.support.oidc import ISSUER, at, claims, jwk, jwks, rsa_key, settings, signed


def identities(**changes: Any) -> JWTIdentities:
    """A check of JWTs with the usual keys."""
    found = settings(**changes)

    async def read() -> Sequence[IssuerKey]:
        return parse_keys(jwks(), found.algorithms)

    return JWTIdentities(found, IssuerKeys(found.issuer, read))


@pytest.mark.parametrize(
    ("header", "more", "problem"),
    [
        (1, 8188, "no valid JWT"),
        (1, 8189, "longer than 8 KiB"),
        (1024, 1, "no valid JWT"),
        (1025, 1, "header is longer than 1 KiB"),
    ],
)
async def test_a_jwt_of_the_largest_size_is_looked_at(header: int, more: int, problem: str) -> None:
    """One byte more is refused for its size."""
    with pytest.raises(JWTRefused, match=problem):
        await identities().identity(f"{'x' * header}.b.{'x' * more}")


@pytest.mark.parametrize("subject", ["x", "x" * 255])
async def test_an_identity_has_the_subject_and_the_end_of_its_jwt(subject: str) -> None:
    """A subject may have 255 characters, the most that OpenID Connect allows."""
    given = claims(sub=subject)
    key = await identities().identity(signed(given))
    assert key == APIKey(f"{ISSUER}#{subject}", Role.CLIENT, "lab", "", "", 0.0, given["exp"])
    assert isinstance(key.expires_s, float)


async def test_the_keys_are_those_of_the_settings(tmp_path: Path) -> None:
    """The ingress gives a check of JWTs no other keys."""
    (tmp_path / "jwks.json").write_bytes(jwks())
    check = JWTIdentities(settings(jwks_file=str(tmp_path / "jwks.json")))
    assert (await check.identity(signed())).tenant == "lab"


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
async def test_a_short_key_checks_no_jwt() -> None:
    """Lists of keys are read without short ones; with one of them, the check of a JWT fails as well."""
    short = rsa_key("short", 1024)

    async def read() -> Sequence[IssuerKey]:
        return [IssuerKey("r1", "RS256", PyJWK(jwk(short, "r1"), "RS256"))]

    with pytest.raises(JWTRefused, match="no valid JWT"):
        await JWTIdentities(settings(), IssuerKeys(ISSUER, read)).identity(signed(key=short))


@pytest.mark.parametrize(
    ("leeway_s", "accepted", "refused"),
    [
        (0, {}, {"iat": 50}),
        (0, {}, {"nbf": 50}),
        (0, {}, {"exp": -1}),
        (50, {"iat": 45}, {"iat": 95}),
        (50, {"nbf": 45}, {"nbf": 95}),
        (50, {"exp": -10}, {"exp": -51}),
    ],
)
async def test_clocks_differ_by_the_leeway_of_the_settings(
    leeway_s: int, accepted: dict[str, float], refused: dict[str, float]
) -> None:
    """Not by another time, for each of the three claims."""
    check = identities(leeway_s=leeway_s)
    assert (await check.identity(signed(at(**accepted)))).tenant == "lab"
    with pytest.raises(JWTRefused, match=r"not valid yet|has expired"):
        await check.identity(signed(at(**refused)))


@pytest.mark.parametrize(
    ("types", "accepted", "refused"),
    [
        (["at+jwt"], ["at+jwt", "application/AT+JWT"], ["JWT", None]),
        (["JWT"], ["jwt", None], ["at+jwt"]),
        (["Lab+JWT"], ["lab+jwt"], ["JWT", "at+jwt", None]),
    ],
)
async def test_only_the_types_of_the_settings_are_accepted(
    types: list[str], accepted: list[str | None], refused: list[str | None]
) -> None:
    """With only ``at+jwt``, an ID token is no access token. A JWT without a type has the type JWT."""
    check = identities(types=types)
    for kind in accepted:
        assert (await check.identity(signed(typ=kind))).tenant == "lab"
    for kind in refused:
        with pytest.raises(JWTRefused, match=r"access\.oidc\.types"):
            await check.identity(signed(typ=kind))


@pytest.mark.parametrize(
    ("scheme", "exp_s", "code"),
    [("Bearer", -60, "jwt_refused"), ("DPoP", 300, "key_needed"), ("Basic", 300, "key_needed")],
)
async def test_a_wrong_jwt_is_no_trusted_client(scheme: str, exp_s: float, code: str) -> None:
    """A request with a JWT is refused for it, also from a network whose clients need none. Its scheme is Bearer."""

    async def call(*_args: Any) -> None:
        pytest.fail("the registry was asked")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        key = key_of(scope)
        assert key is not None
        await JSONResponse(key.tenant)(scope, receive, send)

    trusted = TrustedClients({ip_network("127.0.0.0/8"): "old"})
    transport = httpx.ASGITransport(app=KeyGuard(app, call, trusted, jwts=identities()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        assert (await http.get("/machines")).json() == "old"
        assert (await http.get("/machines", headers={"authorization": f"Bearer {signed()}"})).json() == "lab"
        answer = await http.get("/machines", headers={"authorization": f"{scheme} {signed(at(exp=exp_s))}"})
    assert (answer.status_code, answer.json()["code"]) == (401, code)
