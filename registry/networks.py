"""Networks in the settings: IPv4 or IPv6, written as text."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator

_MAPPED = IPv6Network("::ffff:0:0/96")


def _is_text(network: object) -> object:
    """Return what is a network as text, or a network. Raises ValueError: a number would be an address, too."""
    if not isinstance(network, str | IPv4Network | IPv6Network):
        raise ValueError("write the network as text in quotes, as in '10.0.5.0/24'")  # noqa: TRY004 - for pydantic
    return network


def _is_not_mapped(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """Return a network that clients can be in. Raises ValueError for IPv4 addresses that are written as IPv6."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        raise ValueError("contains IPv4 addresses, written as IPv6: write it as IPv4, as in 10.0.5.0/24")
    return network


Network: TypeAlias = Annotated[IPv4Network | IPv6Network, BeforeValidator(_is_text), AfterValidator(_is_not_mapped)]


def within(network: Network, other: Network) -> bool:
    """Whether every address of a network is in the other one, too."""
    if isinstance(network, IPv4Network):
        return isinstance(other, IPv4Network) and network.subnet_of(other)
    return isinstance(other, IPv6Network) and network.subnet_of(other)


def of_one_client(address: str) -> str:
    """Return the addresses that one client can choose from: the /64 of an IPv6 address, or else the address.

    Source: RFC 6177, section 2 (a site gets more than a /64).
    """
    return str(IPv6Network((address, 64), strict=False)) if ":" in address else address
