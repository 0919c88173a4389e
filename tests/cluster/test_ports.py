"""The ports of a local registry: on loopback, every one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import Registry

pytestmark = [pytest.mark.cluster, pytest.mark.vllm]


def is_loopback(text: str) -> bool:
    """Whether this is a loopback address, also an IPv4 one in its IPv6 form."""
    address = ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def test_every_port_is_on_loopback(registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int) -> None:
    """With an LLM deployed, no process of the registry listens on an address that another machine can reach."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    owner = psutil.Process(registry.process.pid)
    listening: list[tuple[str, str, int]] = []
    for process in (owner, *owner.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            listening += [
                (process.name(), connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert {name for name, _, _ in listening} >= {"gcs_server", "raylet", "haproxy"}
    assert [each for each in listening if not is_loopback(each[1])] == []
