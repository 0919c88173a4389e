"""The settings of the registry's HTTP address."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from registry.energy_settings import Section
from registry.networks import Network


class HTTPSettings(Section):
    """The HTTP address of the ingress and the wrappers."""

    host: str = Field("127.0.0.1", description="Network interface on which Serve's proxy listens")
    port: int = Field(8000, ge=1, le=65535, description="Port on which Serve's proxy listens")
    public_url: str | None = Field(None, description="Base URL for clients; null: http://host:port")
    allowed_hosts: tuple[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", to_lower=True)], ...
    ] = Field(
        (),
        description="Further host names by which clients reach the registry; those of `host`, `public_url` and the "
        "machine itself, and IP addresses, are always served",
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (),
        description="Proxies in front of the registry, by network, e.g. `[127.0.0.1/32]`: of their requests, the last "
        "address in `X-Forwarded-For` that is not a trusted proxy's counts as the client's (`access.trusted_clients`). "
        "Requests that come directly from any other proxy need a key",
    )
    haproxy: bool = Field(
        True, description="Whether to serve through HAProxy, which handles several times as many requests/s"
    )

    @model_validator(mode="after")
    def _haproxy_can_do_it(self) -> HTTPSettings:
        # Serve 2.60 omits the brackets of IPv6 addresses in its health check of HAProxy.
        if self.haproxy and ":" in self.host:
            raise ValueError("host can't be an IPv6 address with HAProxy: use 127.0.0.1 or 0.0.0.0, or haproxy: false")
        if self.trusted_proxies and not self.haproxy:
            raise ValueError("trusted_proxies needs haproxy: true, which knows where a call comes from")
        return self

    @field_validator("trusted_proxies")
    @classmethod
    def _are_some_proxies(cls, proxies: tuple[Network, ...]) -> tuple[Network, ...]:
        if any(network.prefixlen == 0 for network in proxies):
            raise ValueError("names all addresses: every client could claim any address")
        return proxies

    @field_validator("public_url")
    @classmethod
    def _is_base_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if any(character.isspace() for character in url):
            raise ValueError("contains a space")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("needs a scheme and a host, as in http://head.example:8000")
        if parts.port == 0:  # reading an invalid port raises ValueError
            raise ValueError("port 0 can't be reached")
        if parts.username is not None:
            raise ValueError("must have no user name: address adds one with the token of the lease")
        if parts.query or parts.fragment:
            raise ValueError("must have no query and no fragment (? or #): paths are appended to it")
        parts.hostname.encode("idna")  # clients encode it, too; raises ValueError if a label is too long
        return url
