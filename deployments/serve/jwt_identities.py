"""Identifies callers by JWTs of an OpenID Connect issuer: checks a JWT, and finds its role and tenant."""

# D134: an OIDC issuer may identify callers

from __future__ import annotations

import base64
from time import time
from typing import Any

import jwt
from pydantic import TypeAdapter, ValidationError

from deployments.serve.issuer_keys import IssuerKeys, issuer_keys
from registry.access_errors import JWTRefused
from registry.oidc_settings import OIDCSettings
from registry.store.rows import APIKey
from registry.strict_yaml import json_object
from registry.wire.schemas import TenantName
from registry.wire.words import JWT_MARK, KEY_PREFIX, Role

MAX_JWT = 8192
"""Longest JWT, bytes. It is not parsed if it is longer."""

MAX_HEADER = 1024
"""Longest header of a JWT, bytes in base64. It is all that is parsed before the signature is checked."""

MAX_SUBJECT = 255
"""Longest `sub`, characters. Source: OpenID Connect Core 1.0, section 2."""

LATEST_S = 253_402_300_799
"""The end of the year 9999, UTC seconds: the latest `exp`."""

_FOREIGN_KEYS = ("jwk", "jku", "x5c", "x5u")
_NOT_UNDERSTOOD = ("crit", "b64", "zip", "enc")
_TENANT: TypeAdapter[str] = TypeAdapter(TenantName)
_PROBLEMS: dict[type[jwt.PyJWTError], str] = {
    jwt.InvalidIssuerError: "its claim iss is not the issuer of this registry",
    jwt.InvalidAudienceError: "its claim aud does not name this registry",
    jwt.ImmatureSignatureError: "it is not valid yet (claims iat and nbf); compare the clocks of issuer and registry",
    jwt.InvalidIssuedAtError: "its claim iat is no time",
    jwt.exceptions.InvalidSubjectError: "its claim sub is no text",
    jwt.InvalidSignatureError: "its signature is wrong",
}


def is_like_jwt(text: str) -> bool:
    """Whether a text could be a signed JWT: three parts, and not the prefix of API keys."""
    return text.count(".") == 2 and not text.startswith(KEY_PREFIX)


class JWTIdentities:
    """Identities of callers with a JWT.

    An identity is an ``APIKey`` that is stored nowhere. Its id is ``<iss>#<sub>``, and it expires with its JWT. No
    answer, error or log contains the text of a JWT.
    """

    def __init__(self, settings: OIDCSettings, keys: IssuerKeys | None = None) -> None:
        """``keys``: those of the issuer; None: as the settings say."""
        self._settings = settings
        self._keys = issuer_keys(settings) if keys is None else keys

    async def identity(self, text: str) -> APIKey:
        """Check a JWT, and return whom it identifies.

        Raises JWTRefused, JWTNotChecked. May wait for the issuer's keys, see ``IssuerKeys``.
        """
        if len(text) > MAX_JWT:
            raise JWTRefused(f"it is longer than {MAX_JWT // 1024} KiB")
        header, claims_part, _ = text.split(".")
        if len(header) > MAX_HEADER:
            raise JWTRefused(f"its header is longer than {MAX_HEADER // 1024} KiB")
        key = await self._key(_object(header))
        self._require_signed_for_us(text, key)
        claims = _object(claims_part)  # again, because PyJWT accepts names that occur twice, and infinity
        key_id = f"{self._settings.issuer}{JWT_MARK}{_subject(claims)}"
        if "cnf" in claims:  # RFC 7800: its sender has to prove to own a key, and nothing here checks such a proof
            raise JWTRefused("it is bound to a key of its owner (claim cnf); turn off DPoP or mTLS for it", key_id)
        expires_s = _seconds(claims["exp"])
        if expires_s + self._settings.leeway_s <= time():
            raise JWTRefused("it has expired", key_id)
        role = self._role(claims, key_id)
        tenant = self._tenant(claims, key_id) if role is Role.CLIENT else None
        return APIKey(key_id, role, tenant, "", "", 0.0, expires_s)

    async def _key(self, header: dict[str, Any]) -> jwt.PyJWK:
        """Return the key that a JWT says it is signed with. Raises JWTRefused, JWTNotChecked."""
        if any(name in header for name in _NOT_UNDERSTOOD):
            raise JWTRefused(f"its header has one of the fields {', '.join(_NOT_UNDERSTOOD)}")
        if any(name in header for name in _FOREIGN_KEYS):
            raise JWTRefused(f"its header names a key of its own ({', '.join(_FOREIGN_KEYS)})")
        kind, algorithm, key_id = header.get("typ", "JWT"), header.get("alg"), header.get("kid")
        # RFC 7515, section 4.1.9: a media type without "application/"
        if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in self._types():
            raise JWTRefused("access.oidc.types does not contain its type (header typ)")
        if algorithm not in self._settings.algorithms:
            raise JWTRefused("access.oidc.algorithms does not contain its algorithm (header alg)")
        if not isinstance(key_id, str | None):
            raise JWTRefused("its header kid is no text")
        found = await self._keys.fitting(key_id, algorithm)
        if not found:
            raise JWTRefused("its issuer has no such key (headers kid and alg)")
        if len(found) > 1:  # trying them all would let a caller choose the work
            raise JWTRefused("its header kid is missing, or the issuer has several keys with it")
        return found[0]

    def _types(self) -> set[str]:
        return {each.lower() for each in self._settings.types}

    def _require_signed_for_us(self, text: str, key: jwt.PyJWK) -> None:
        """Check signature, issuer, audience and begin of a JWT, and that it has an end. Raises JWTRefused."""
        try:
            jwt.decode(
                text,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=self._settings.leeway_s,
                options={
                    "require": ["iss", "aud", "sub", "iat", "exp"],
                    "enforce_minimum_key_length": True,
                    "verify_exp": False,  # checked last, so that the audit names the identity of an expired JWT
                },
            )
        except jwt.MissingRequiredClaimError as error:
            raise JWTRefused(f"it has no claim {error.claim}") from error
        except jwt.PyJWTError as error:
            problem = next((text for kind, text in _PROBLEMS.items() if isinstance(error, kind)), "it is no valid JWT")
            raise JWTRefused(problem) from error

    def _role(self, claims: dict[str, Any], key_id: str) -> Role:
        """Return the only role that the claims give. Raises JWTRefused."""
        name = _shown(self._settings.role_claim)
        given = _claim(claims, self._settings.role_claim)
        values = given if isinstance(given, list) else [given]
        roles = [role for role, wanted in self._settings.roles.items() if any(value in wanted for value in values)]
        if not roles:
            raise JWTRefused(f"its claim {name} gives no role (access.oidc.roles)", key_id)
        if len(roles) > 1:
            raise JWTRefused(f"its claim {name} gives several roles: {' and '.join(roles)} (access.oidc.roles)", key_id)
        return roles[0]

    def _tenant(self, claims: dict[str, Any], key_id: str) -> str:
        """Return the tenant of a client. Raises JWTRefused."""
        path = self._settings.tenant_claim
        if path is None:
            assert self._settings.tenant is not None  # the settings require one for clients
            return self._settings.tenant
        name, given = _shown(path), _claim(claims, path)
        if given is None:
            raise JWTRefused(f"it has no claim {name}, which would name the tenant (access.oidc.tenant_claim)", key_id)
        try:
            return _TENANT.validate_python(given, strict=True)
        except ValidationError as error:
            problem = f"its claim {name} (access.oidc.tenant_claim) is no name of a tenant"
            raise JWTRefused(f"{problem}: 1 to 64 letters, digits, '.', '_' and '-'", key_id) from error


def _object(part: str) -> dict[str, Any]:
    """Decode the header or the claims of a JWT. Raises JWTRefused. What base64 it accepts, ``jwt.decode`` checks."""
    try:
        return json_object(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode())
    except ValueError as error:
        raise JWTRefused("it is no valid JWT") from error


def _subject(claims: dict[str, Any]) -> str:
    """Return the claim sub. Raises JWTRefused."""
    subject: str = claims["sub"]
    if not (subject.isascii() and subject.isprintable() and 0 < len(subject) <= MAX_SUBJECT):
        raise JWTRefused(f"its claim sub is not 1 to {MAX_SUBJECT} printable ASCII characters")
    return subject


def _seconds(value: Any) -> float:
    """Return the claim exp. Raises JWTRefused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LATEST_S:
        raise JWTRefused("its claim exp is no time")
    return float(value)


def _claim(claims: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Return the claim at a path; None if there is none."""
    found: Any = claims
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _shown(path: tuple[str, ...]) -> str:
    return ".".join(path)
