"""What the settings allow a JWT, to the last byte and second; a request with a wrong JWT has no other identity."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deployments.serve.identities import KeyGuard, TrustedClients, key_of
from deployments.serve.issuer_keys import IssuerKey, IssuerKeys, parse_keys
from deployments.serve.jwt_identities import MAX_HEADER, MAX_JWT, JWTIdentities
from registry.access_errors import JWTRefused
from tests.support.oidc import at, claims, jwks, settings, signed


def identities(**changes: Any) -> JWTIdentities:
    """A check of JWTs with the usual keys."""
    found = settings(**changes)

    async def read() -> Sequence[IssuerKey]:
        return parse_keys(jwks(), found.algorithms)

    return JWTIdentities(found, IssuerKeys(found.issuer, read))


@pytest.mark.parametrize(
    ("header", "more", "problem"),
    [
        (1, MAX_JWT - 4, "no valid JWT"),
        (1, MAX_JWT - 3, "longer than 8 KiB"),
        (MAX_HEADER, 1, "no valid JWT"),
        (MAX_HEADER + 1, 1, "header is longer than 1 KiB"),
    ],
)
async def test_a_jwt_of_the_largest_size_is_looked_at(header: int, more: int, problem: str) -> None:
    """One byte more is refused for its size."""
    with pytest.raises(JWTRefused, match=problem):
        await identities().identity(f"{'x' * header}.b.{'x' * more}")


async def test_an_identity_has_the_subject_and_the_end_of_its_jwt() -> None:
    """A subject may have 255 characters, the most that OpenID Connect allows."""
    given = claims(sub="x" * 255)
    key = await identities().identity(signed(given))
    assert (key.key_id.partition("#")[2], key.expires_s) == ("x" * 255, given["exp"])


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
