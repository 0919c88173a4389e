"""The ports of a local registry: on loopback, every one of them, and those of replicas for HAProxy only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from deployments.launch.local_ray import HAPROXY_FOLDER
from tests.cluster.conftest import Registry

pytestmark = [pytest.mark.cluster, pytest.mark.vllm]


def is_loopback(text: str) -> bool:
    """Whether this is a loopback address, also an IPv4 one in its IPv6 form."""
    address = ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def behind_haproxy(registry: Registry) -> set[str]:
    """Where HAProxy forwards requests to: the ports of the ingress, of the wrapper, and of Serve's fallback proxy."""
    folder = Path(json.loads((registry.folder / "state" / "up.json").read_text())["folder"])
    (config,) = (folder / HAPROXY_FOLDER).rglob("haproxy.cfg")
    return set(re.findall(r"^ *server \S+ (\S+) check", config.read_text(), re.MULTILINE))


def test_every_port_is_on_loopback(registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int) -> None:
    """With an LLM deployed, no process of the registry listens on an address that another machine can reach.

    Replicas and Serve's fallback proxy serve neither the API nor a lease, except through HAProxy.
    """
    (request_id,) = registry.post(measurement_id, llm("a"))
    lease = registry.until(request_id, "deployed")["url"]
    guessed = {"x-greenprompt-proxy": "0" * 64}
    for url in (f"{registry.url}/machines", f"{lease}/get_status"):
        assert httpx.get(url, headers=guessed, timeout=30).status_code == HTTPStatus.OK
    places = behind_haproxy(registry)
    assert len(places) == 3, places
    for place in places:
        codes = set()
        for path in ("/machines", f"{urlsplit(lease).path}/get_status"):
            answer = httpx.get(f"http://{place}{path}", headers=guessed, timeout=30)
            # Serve itself answers 404 where a path is not this wrapper's.
            codes.add("elsewhere" if answer.status_code == HTTPStatus.NOT_FOUND else answer.json()["code"])
        assert {"not_through_proxy"} <= codes <= {"not_through_proxy", "elsewhere"}, (place, codes)
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
