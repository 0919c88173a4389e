"""Networks, and the addresses that one client can choose from."""

from __future__ import annotations

import pytest

from registry.networks import of_one_client


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.5.7", "10.0.5.7"),
        ("2001:db8:5::7", "2001:db8:5::/64"),
        ("2001:db8:5:0:ffff::1", "2001:db8:5::/64"),
        ("2001:db8:5:1::7", "2001:db8:5:1::/64"),
        ("::1", "::/64"),
    ],
)
def test_a_client_has_an_address_or_a_network(address: str, network: str) -> None:
    """An IPv4 address is one client's; of IPv6, all addresses of a /64 are."""
    assert of_one_client(address) == network
