"""An OpenID Connect issuer for tests: its keys, its JWTs, and its website, which can misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.types import Receive, Scope, Send

from registry.oidc_settings import OIDCSettings

ISSUER = "https://idp.example/realms/lab"
AUDIENCE = "greenprompt"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@cache
def rsa_key(name: str = "rsa", bits: int = 2048) -> rsa.RSAPrivateKey:
    """The RSA key of this name, the same in the whole run."""
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str = "ec") -> ec.EllipticCurvePrivateKey:
    """The P-256 key of this name, the same in the whole run."""
    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: PrivateKey, key_id: str | None, **fields: Any) -> dict[str, Any]:
    """The public part of a key, as in a JWKS."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        found = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, rsa.RSAPrivateKey):
        found = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        found = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**found, "use": "sig", **({} if key_id is None else {"kid": key_id}), **fields}


def jwks(*keys: dict[str, Any]) -> bytes:
    """A JWKS; without arguments, of the keys ``r1`` (RSA) and ``e1`` (P-256)."""
    return json.dumps({"keys": keys or (jwk(rsa_key(), "r1", alg="RS256"), jwk(ec_key(), "e1"))}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """The claims of a client of the tenant ``lab``, for five minutes; None leaves a claim out."""
    now_s = int(time.time())
    given = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ann",
        "iat": now_s,
        "exp": now_s + 300,
        "groups": ["staff", "llm-users"],
        "tenant": "lab",
    }
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def at(**offsets_s: float) -> dict[str, Any]:
    """The claims of ``claims``, with these times, each as seconds from now."""
    return claims(**{name: time.time() + offset_s for name, offset_s in offsets_s.items()})


def signed(
    given: dict[str, Any] | None = None,
    *,
    key: PrivateKey | None = None,
    algorithm: str = "RS256",
    kid: Any = "r1",
    **headers: Any,
) -> str:
    """A JWT, by default a good one; ``kid`` None leaves that header out."""
    if kid is not None:
        headers["kid"] = kid
    return jwt.encode(claims() if given is None else given, key or rsa_key(), algorithm, headers)


def part(value: Any) -> str:
    """A part of a JWT: JSON (or bytes) in base64url without padding."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def unsigned(header: Any, signature: str = "AAAA") -> str:
    """A text with the form of a JWT: this header, good claims, and no valid signature."""
    return f"{part(header)}.{part(claims())}.{signature}"


def settings(**changes: Any) -> OIDCSettings:
    """The settings of a registry that accepts the issuer's JWTs."""
    given = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "role_claim": ["groups"],
        "roles": {"client": ["llm-users"], "operator": ["llm-admins"], "viewer": ["guests"]},
        "tenant_claim": ["tenant"],
    }
    return OIDCSettings.model_validate({**given, **changes})


class Website:
    """The ASGI app of an issuer. It answers when ``hold`` is set.

    ``asked``: the paths of all requests; ``headers``: those of the last one.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: dict[bytes, bytes] = {}
        self.answers: dict[str, tuple[int, bytes, list[tuple[bytes, bytes]]]] = {}
        self.was_asked = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    def serve(self, path: str, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        """Answer requests for a path from now on in this way."""
        self.answers[path] = status, body, list(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; 500 for a path that is not served."""
        assert scope["type"] == "http"
        self.asked.append(scope["path"])
        self.headers = dict(scope["headers"])
        self.was_asked.set()
        await self.hold.wait()
        status, body, headers = self.answers.get(scope["path"], (500, b"", []))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
