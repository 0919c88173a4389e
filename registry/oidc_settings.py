"""The settings of callers that are identified by a JWT of an OpenID Connect issuer."""

# D134: an OIDC issuer may identify callers

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from registry.energy_settings import Section
from registry.model_settings import absolute
from registry.wire.http import is_loopback
from registry.wire.schemas import TenantName
from registry.wire.words import Role

SigningAlgorithm: TypeAlias = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
"""Algorithms of JWTs whose keys are public. With HS256 and its like, who can check a JWT can also make one."""

_Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=255)]
_Type: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+-]{1,64}$")]


class OIDCSettings(Section):
    """An OpenID Connect issuer whose JWTs identify callers, besides API keys. Each JWT gives one role."""

    issuer: _Text = Field(description="URL of the issuer, exactly as in the claim `iss` of its JWTs")
    audience: _Text = Field(
        description="What the claim `aud` of a JWT must be or contain: a name that only this registry has. It must not "
        "be the id of a client with which people log in elsewhere"
    )
    algorithms: tuple[SigningAlgorithm, ...] = Field(
        ("RS256", "ES256"), min_length=1, description="Algorithms with which a JWT may be signed"
    )
    jwks_url: _Text | None = Field(
        None,
        description="URL of the issuer's public keys (JWKS); null: the one that the issuer's "
        "`/.well-known/openid-configuration` names, which must be on the issuer's host",
    )
    jwks_file: Path | None = Field(
        None,
        description="File with the issuer's public keys (JWKS), in place of a URL; read again every 5 to 10 minutes. "
        "Other users must not be able to write to it",
    )
    ca_file: Path | None = Field(
        None,
        description="File (PEM) of the only CA to trust for the issuer's certificate; null: the usual ones. Other "
        "users must not be able to write to it",
    )
    role_claim: tuple[_Text, ...] = Field(
        min_length=1,
        max_length=8,
        description="The claim that gives the role, e.g. `[groups]`; several names are a path: `[realm_access, roles]`",
    )
    roles: dict[Role, tuple[_Text, ...]] = Field(
        min_length=1,
        description="Values of `role_claim` that give a role, e.g. `{client: [llm-users], operator: [llm-admins]}`. "
        "A JWT must have the values of exactly one role",
    )
    tenant_claim: tuple[_Text, ...] | None = Field(
        None, min_length=1, max_length=8, description="The claim with the name of a client's tenant, as a path"
    )
    tenant: TenantName | None = Field(None, description="The tenant of all clients, in place of `tenant_claim`")
    types: tuple[_Type, ...] = Field(
        ("JWT", "at+jwt"), min_length=1, description="Allowed types (header `typ`); a JWT without one has the type JWT"
    )
    leeway_s: float = Field(
        10, ge=0, le=60, description="How much the clocks of issuer and registry may differ, seconds"
    )

    @field_validator("issuer", "jwks_url")
    @classmethod
    def _is_encrypted(cls, url: str | None) -> str | None:
        return None if url is None else encrypted(url)

    @field_validator("issuer")
    @classmethod
    def _is_issuer(cls, url: str) -> str:
        if "?" in url or "#" in url:  # OpenID Connect Core 1.0, section 2
            raise ValueError("an issuer's URL has no query and no fragment (? or #)")
        scheme, host = url.split("/")[0:3:2]
        if f"{scheme}{host}" != f"{scheme}{host}".lower():
            raise ValueError("an issuer's URL has its scheme and host in lower case")
        return url

    @field_validator("jwks_file", "ca_file")
    @classmethod
    def _absolute_path(cls, path: Path | None) -> Path | None:
        return None if path is None else absolute(path)

    @model_validator(mode="after")
    def _one_way(self) -> OIDCSettings:
        if self.jwks_url is not None and self.jwks_file is not None:
            raise ValueError("give jwks_url or jwks_file, not both")
        if self.tenant is not None and self.tenant_claim is not None:
            raise ValueError("give tenant_claim or tenant, not both")
        if Role.CLIENT in self.roles and self.tenant is None and self.tenant_claim is None:
            raise ValueError("the role client needs tenant_claim, or tenant for one tenant of all clients")
        values = [value for role in self.roles.values() for value in role]
        if len(set(values)) < len(values):
            raise ValueError("roles: a value is listed twice; a JWT must give exactly one role")
        if not all(self.roles.values()):
            raise ValueError("roles: a role has no values; leave the role out, or list the values that give it")
        return self


def encrypted(url: str) -> str:
    """Return a URL of keys or of their issuer. Raises ValueError unless it is https, or http of this machine."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("has characters that a URL must escape")
    parts = urlsplit(url)
    if not parts.hostname or parts.username is not None:  # a password has a user name, which may be empty
        raise ValueError("needs a host, and no user name, as in https://idp.example/realms/lab")
    if parts.port == 0:  # reading an invalid port raises ValueError
        raise ValueError("port 0 can't be reached")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
        raise ValueError("must begin with https:// (http:// only for an issuer on this machine): keys must not change")
    return url
