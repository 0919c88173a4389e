"""The settings of who may call the registry, and how often."""

from __future__ import annotations

from pydantic import Field, model_validator

from registry.energy_settings import Section
from registry.networks import Network
from registry.oidc_settings import OIDCSettings
from registry.wire.schemas import TenantName


class AccessSettings(Section):
    """Who may call the registry."""

    keys: bool = Field(
        False,
        description="Whether every call needs an API key (`greenprompt keys`). Required if `http.host` can be reached "
        "from other machines, except with `insecure`",
    )
    insecure: bool = Field(
        False,
        description="Whether to serve other machines without keys: everybody who reaches the port can then lease LLMs, "
        "end every request and drain machines",
    )
    trusted_clients: dict[Network, TenantName] = Field(
        {},
        description="Networks whose clients can't send a key, each with its tenant, e.g. `{10.0.5.7/32: lab}`: every "
        "caller in the network counts as a client of this tenant, except through a proxy: see `http.trusted_proxies`",
    )
    oidc: OIDCSettings | None = Field(
        None, description="An OpenID Connect issuer whose JWTs are accepted like API keys; null: only API keys are"
    )

    @model_validator(mode="after")
    def _one_way(self) -> AccessSettings:
        if self.keys and self.insecure:
            raise ValueError("keys and insecure exclude each other")
        if self.trusted_clients and not self.keys:
            raise ValueError("trusted_clients needs keys: true; without keys everybody is trusted")
        if self.oidc is not None and not self.keys:
            raise ValueError("oidc needs keys: true; without keys everybody is trusted")
        if any(network.prefixlen == 0 for network in self.trusted_clients):
            raise ValueError("trusted_clients names all addresses; use insecure: true if everybody is to be trusted")
        return self


class RateSettings(Section):
    """How often one caller may call the registry; others get 429. Prompts to an LLM's `url` are not counted."""

    calls_per_second: int | None = Field(
        500,
        ge=1,
        description="Most calls in a second with one API key; with the JWTs of one tenant, of all viewers, or of all "
        "operators, together; without a key or JWT, from one address (of IPv6, from one /64). Not counted: releases, "
        "keep-alives, and without `access.keys` calls from a loopback address. null: no limit",
    )
    posts_per_minute: int | None = Field(
        300,
        ge=1,
        description="Most POSTs of requests in a minute by one tenant; without `access.keys`, from one address, "
        "whatever tenants it names. One POST may have many LLMs. null: no limit",
    )
    wrong_keys_per_minute: int | None = Field(
        60,
        ge=1,
        description="Most unknown API keys and wrong JWTs from one address in a minute; after that, keys that were "
        "not accepted since the ingress started are refused without a look-up. null: no limit",
    )
