"""Where a call comes from, when proxies stand between: nobody can claim an address that is not theirs."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from deployments.serve.client_address import FORWARDED_HEADER, PROXY_HEADERS, SOURCE_HEADER, client_of
from deployments.serve.identities import TrustedClients

CLIENT, FRONT = "10.0.5.7", "10.0.9.1"
TRUSTED = TrustedClients(
    {ip_network("10.0.5.7/32"): "old", ip_network("2001:db8:5::/64"): "six"},
    (ip_network(f"{FRONT}/32"), ip_network("127.0.0.1/32"), ip_network("2001:db8:9::1/128")),
)


NO_PROXIES = TrustedClients({ip_network("10.0.0.0/16"): "old"})


def tenant(
    source: str | None,
    *forwarded: str,
    peer: str = "127.0.0.1",
    trusted: TrustedClients = TRUSTED,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> str | None:
    """The tenant of a call that HAProxy of this machine says comes from ``source``; None: it said nothing."""
    sent = [*headers, *((FORWARDED_HEADER, value.encode("latin-1")) for value in forwarded)]
    if source is not None:
        sent.append((SOURCE_HEADER, source.encode()))
    key = trusted.key_for({"type": "http", "headers": sent, "client": (peer, 1)})
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
        (CLIENT, "", "old"),  # nothing was forwarded
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


@pytest.mark.parametrize("named", ["192.0.2.1", CLIENT, FRONT, f"{CLIENT}, 10.0.0.1", "several", "unknown", ","])
def test_a_proxy_that_is_not_named_makes_nobody_a_client(named: str) -> None:
    """Its address may be in a network of trusted clients, but it is that of every stranger behind it, too."""
    assert tenant(FRONT, trusted=NO_PROXIES) == "old"
    assert tenant(FRONT, "", trusted=NO_PROXIES) == "old"
    assert tenant(FRONT, named, trusted=NO_PROXIES) is None
    assert tenant(None, named, peer=FRONT, trusted=NO_PROXIES) is None
    assert tenant(CLIENT, named) is None


@pytest.mark.parametrize("header", PROXY_HEADERS)
def test_any_header_of_a_proxy_shows_it(header: bytes) -> None:
    """Also a proxy that does not set X-Forwarded-For; of a trusted one these headers mean nothing."""
    headers = ((header, b"for=10.0.5.7"),)
    assert tenant(FRONT, trusted=NO_PROXIES, headers=headers) is None
    assert tenant(FRONT, trusted=NO_PROXIES, headers=((header, b""),)) == "old"
    assert tenant(FRONT, CLIENT, headers=headers) == "old"
    assert tenant(FRONT, headers=headers) is None


def test_another_machines_haproxy_makes_nobody_a_client() -> None:
    """Its machine may be in a network of trusted clients, but a stranger called it. Its own programs are trusted."""
    node = "10.0.1.1"
    for source in ("192.0.2.1", FRONT, "", "x", f"{node}, {node}"):
        assert tenant(source, peer=node, trusted=NO_PROXIES) is None
    assert tenant("192.0.2.1", "", peer=node, trusted=NO_PROXIES) is None
    for source in (node, f"::ffff:{node}", "127.0.0.1"):
        assert tenant(source, "", peer=node, trusted=NO_PROXIES) == "old"
        assert tenant(source, CLIENT, peer=node, trusted=NO_PROXIES) is None


@pytest.mark.parametrize(
    ("peer", "sources", "with_haproxy", "without"),
    [
        ("192.0.2.66", [], "192.0.2.66", "192.0.2.66"),
        ("192.0.2.66", ["x"], "192.0.2.66", "192.0.2.66"),
        ("192.0.2.66", [""], "192.0.2.66", "192.0.2.66"),
        ("192.0.2.66", [CLIENT, CLIENT], "192.0.2.66", "192.0.2.66"),
        ("192.0.2.66", ["fe80::1%x"], "192.0.2.66", "192.0.2.66"),
        ("192.0.2.66", [CLIENT], None, "192.0.2.66"),  # as another machine's HAProxy would say
        ("127.0.0.1", [CLIENT], CLIENT, "127.0.0.1"),
        ("127.0.0.1", ["x"], None, "127.0.0.1"),
    ],
)
def test_nobody_hides_its_address(peer: str, sources: list[str], with_haproxy: str | None, without: str) -> None:
    """A caller that writes the header of HAProxy itself is shown by its own address, or at least by no other."""
    headers = [(SOURCE_HEADER, value.encode()) for value in sources]
    scope = {"type": "http", "headers": headers, "client": (peer, 1)}
    found = client_of(scope, ())
    assert (None if found is None else str(found)) == with_haproxy
    assert str(client_of(scope, None)) == without
