"""The settings of who may call the registry."""

from __future__ import annotations

from pydantic import Field, model_validator

from registry.energy_settings import Section
from registry.networks import Network
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

    @model_validator(mode="after")
    def _one_way(self) -> AccessSettings:
        if self.keys and self.insecure:
            raise ValueError("keys and insecure exclude each other")
        if self.trusted_clients and not self.keys:
            raise ValueError("trusted_clients needs keys: true; without keys everybody is trusted")
        if any(network.prefixlen == 0 for network in self.trusted_clients):
            raise ValueError("trusted_clients names all addresses; use insecure: true if everybody is to be trusted")
        return self
