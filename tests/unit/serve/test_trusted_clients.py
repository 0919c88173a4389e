"""Where a call comes from, when proxies stand between: nobody can claim an address that is not theirs."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from deployments.serve.identities import FORWARDED_HEADER, SOURCE_HEADER, TrustedClients

CLIENT, FRONT = "10.0.5.7", "10.0.9.1"
TRUSTED = TrustedClients(
    {ip_network("10.0.5.7/32"): "old", ip_network("2001:db8:5::/64"): "six"},
    (ip_network(f"{FRONT}/32"), ip_network("127.0.0.1/32"), ip_network("2001:db8:9::1/128")),
)


def tenant(source: str | None, *forwarded: str, peer: str = "127.0.0.1") -> str | None:
    """The tenant of a call that HAProxy of this machine says comes from ``source``; None: it said nothing."""
    headers = [(FORWARDED_HEADER, value.encode("latin-1")) for value in forwarded]
    if source is not None:
        headers.append((SOURCE_HEADER, source.encode()))
    key = TRUSTED.key_for({"type": "http", "headers": headers, "client": (peer, 1)})
    return None if key is None else key.tenant


@pytest.mark.parametrize(
    ("source", "forwarded", "found"),
    [
        (FRONT, CLIENT, "old"),
        ("127.0.0.1", CLIENT, "old"),
        ("::ffff:127.0.0.1", f"::ffff:{CLIENT}", "old"),
        ("2001:db8:9::1", "2001:db8:5::7", "six"),
        (FRONT, f"192.0.2.1, {CLIENT}", "old"),  # what a client says comes before what the front adds
        (FRONT, f"{CLIENT},{FRONT} , 127.0.0.1", "old"),  # several trusted proxies
        (CLIENT, "192.0.2.1", "old"),  # it is no proxy: what it names is not read
    ],
)
def test_a_trusted_proxy_is_believed(source: str, forwarded: str, found: str) -> None:
    """The last address that is not a trusted proxy's is the client."""
    assert tenant(source, forwarded) == found


@pytest.mark.parametrize(
    ("source", "forwarded"),
    [
        ("192.0.2.1", CLIENT),  # a stranger claims to be a proxy
        (FRONT, f"{CLIENT}, 192.0.2.1"),  # a stranger behind the front claims an address
        (FRONT, f"{CLIENT}, {FRONT}, 192.0.2.1, 127.0.0.1"),
        (FRONT, f"{CLIENT},"),
        (FRONT, f"{CLIENT}, unknown"),
        (FRONT, f"{CLIENT}:4711"),
        (FRONT, f"[{CLIENT}]"),
        (FRONT, "[2001:db8:5::7]:4711"),
        (FRONT, f'for="{CLIENT}"'),
        (FRONT, f"{CLIENT} {FRONT}"),
        (FRONT, "010.0.5.7"),
        (FRONT, "2001:db8:5::7%any text"),
        (FRONT, "10.0.5.7/32"),
        (FRONT, "\xb2.0.5.7"),
        (FRONT, "168035591"),  # the address as a number
        (FRONT, ""),
        (FRONT, FRONT),  # a proxy itself is never a client
        (f"{FRONT}, {FRONT}", CLIENT),
        ("", CLIENT),
        ("x", CLIENT),
    ],
)
def test_nobody_else_is(source: str, forwarded: str) -> None:
    """A stranger, several addresses in one, garbage and ports make no trusted client."""
    assert tenant(source, forwarded) is None


def test_a_header_counts_once_and_from_this_machines_haproxy() -> None:
    """Two headers, no header of the source, or a peer elsewhere: nothing that was forwarded is read."""
    assert tenant(FRONT, CLIENT, CLIENT) is None
    assert tenant(FRONT) is None
    assert tenant(None, CLIENT) is None
    # Another machine's HAProxy, also where that machine is a trusted proxy, did not add its client's address.
    assert tenant("127.0.0.1", CLIENT, peer=FRONT) is None
    assert tenant(FRONT, CLIENT, peer="192.0.2.1") is None
    assert tenant(CLIENT, peer=CLIENT) == "old"


def test_without_proxies_the_header_is_ignored() -> None:
    """By default nobody's header is believed."""
    trusted = TrustedClients({ip_network(CLIENT): "old"})
    headers = [(SOURCE_HEADER, FRONT.encode()), (FORWARDED_HEADER, CLIENT.encode())]
    assert trusted.key_for({"type": "http", "headers": headers, "client": ("127.0.0.1", 1)}) is None
