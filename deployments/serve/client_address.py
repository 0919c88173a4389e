"""Finds the address that a call comes from: of the connection, or as HAProxy and trusted proxies in front of it say.

A HAProxy runs on every machine of a cluster. That of the head connects to the ingress by loopback, the others by the
network.
"""

# D114: the client's address behind a proxy

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from starlette.types import Scope

from registry.networks import Network, of_one_client

Address = IPv4Address | IPv6Address

SOURCE_HEADER = b"x-greenprompt-source"
"""HAProxy sets this header to the address of its client, and removes what a client sent under this name."""

FORWARDED_HEADER = b"x-greenprompt-forwarded"
"""HAProxy sets this header to the client's ``X-Forwarded-For`` header, and removes what came under this name.

It is empty if there is none, and ``several`` if there is more than one.
"""

PROXY_HEADERS = (b"x-forwarded-for", b"forwarded", b"x-real-ip", b"via")
"""Headers that proxies set. Nothing is read from them; HAProxy has removed the first one."""


def client_of(scope: Scope, proxies: Sequence[Network] | None) -> Address | None:
    """Return the address that a request comes from, for the audit; None if that is not clear.

    Through a trusted proxy: the last forwarded address that is not a trusted proxy's. Through any other proxy: the
    proxy's. ``proxies`` None: there is no HAProxy, and anybody can write its headers, so they are not read.
    """
    if proxies is None:
        return _peer(scope)
    source = _source(scope)
    if source is None:
        return None
    if source.wrote_header or not _is_among(source.address, proxies):
        return source.address
    return _forwarded_client(scope, source, proxies)


def trusted_client_of(scope: Scope, proxies: Sequence[Network] | None) -> Address | None:
    """Return the address of a client that can be trusted by its address; None if there is none.

    A proxy that shows itself by a header, but is not among ``proxies``, has the same address for all its clients.
    ``proxies`` None: there is no HAProxy, and no address is trusted.
    """
    source = _source(scope)
    if proxies is None or source is None or source.wrote_header:
        return None
    if _is_among(source.address, proxies):
        return _forwarded_client(scope, source, proxies)
    by_a_proxy = bool(_forwarded(scope)) or any(any(_values(scope, header)) for header in PROXY_HEADERS)
    return None if by_a_proxy else source.address


def network_of(scope: Scope, client: Address | None) -> str:
    """Return the network of a request's client, see ``of_one_client``; the peer's if the client is not clear (None)."""
    address = _peer(scope) if client is None else client
    return "unknown" if address is None else of_one_client(str(address))


class _Source(NamedTuple):
    """Where a request comes from.

    ``by_peer``: the address is the connection's; else HAProxy of this machine named it. ``wrote_header``: the caller
    wrote HAProxy's header itself.
    """

    address: Address
    by_peer: bool = True
    wrote_header: bool = False


def _source(scope: Scope) -> _Source | None:
    """Return where a request comes from: what HAProxy of this machine says, or else the peer. None: it is not clear.

    A peer elsewhere that names another address is the HAProxy of another machine: the caller is not that machine. A
    HAProxy names exactly one address, so a peer elsewhere that names several, or something else, is the caller itself.
    """
    peer, named = _peer(scope), _values(scope, SOURCE_HEADER)
    if peer is None or not named:
        return None if peer is None else _Source(peer)
    address = _address(named[0]) if len(named) == 1 else None
    if peer.is_loopback:
        return None if address is None else _Source(address, by_peer=False)
    if address is None:
        return _Source(peer, wrote_header=True)
    return _Source(peer) if address == peer or address.is_loopback else None


def _forwarded_client(scope: Scope, source: _Source, proxies: Sequence[Network]) -> Address | None:
    """Return the last forwarded address that is not a trusted proxy's; None if there is none, or it is not clear."""
    if source.by_peer:
        return None  # another machine's HAProxy does not add its client's address to what the client wrote
    for name in reversed(_forwarded(scope)):
        address = _address(name)
        if address is None or not _is_among(address, proxies):
            return address
    return None


def _is_among(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _peer(scope: Scope) -> Address | None:
    return _address(str((scope.get("client") or ("", 0))[0]))


def _forwarded(scope: Scope) -> list[str]:
    """Return the forwarded addresses, as text; each was written by the one after it."""
    values = _values(scope, FORWARDED_HEADER)
    if len(values) > 1:
        return [""]  # not from our HAProxy; no address is clear
    return [part.strip() for value in values if value for part in value.split(",")]


def _values(scope: Scope, header: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for name, value in scope["headers"] if name == header]


def _address(text: str) -> Address | None:
    """Return the address that a text is, without a port; IPv4 for one that is mapped to IPv6. None if it is none.

    None also for an IPv6 address with a zone (``fe80::1%eth0``), since a zone can be any text.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if getattr(address, "scope_id", None) is not None:
        return None
    return getattr(address, "ipv4_mapped", None) or address
