"""The rules of a firewall for the machines of a cluster: who may reach which of their ports."""

# D124: a firewall keeps the cluster's ports to its machines

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import yaml

from registry.errors import BadSettings

TABLE = "greenprompt"
"""Name of the table of nftables."""

SSH = 22


def machines_of(file: Path) -> list[IPv4Address | IPv6Address]:
    """Return the addresses of the machines in a cluster.yaml with the provider ``local``.

    Raises:
        BadSettings: The file can't be read, it names no machine, or the name of a machine can't be resolved here.
    """
    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadSettings(str(file), f"can't be read: {error}") from error
    provider = config.get("provider") if isinstance(config, dict) else None
    if not isinstance(provider, dict) or "head_ip" not in provider:
        raise BadSettings(str(file), "has no provider.head_ip: only clusters with the provider 'local' are known")
    workers = provider.get("worker_ips") or []
    return addresses_of([provider["head_ip"], *workers], str(file))


def addresses_of(names: Iterable[object], field: str) -> list[IPv4Address | IPv6Address]:
    """Return the addresses of machines, given by address or by name. Raises BadSettings, naming ``field``."""
    found: dict[IPv4Address | IPv6Address, None] = {}
    for name in names:
        try:
            answers = socket.getaddrinfo(str(name), None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise BadSettings(field, f"{name!r} can't be resolved on this machine: {error.strerror}") from error
        found |= {ip_address(str(answer[4][0]).partition("%")[0]): None for answer in answers}
    return list(found)


def rules(machines: Sequence[IPv4Address | IPv6Address], *, open_ports: Iterable[int]) -> str:
    """Return a ruleset for ``nft -f -``: other hosts can reach only ``open_ports`` (TCP) and ssh of these machines.

    The machines can reach all ports of each other. Applying the ruleset replaces its earlier version. It restricts only
    new connections to ports from 1024 on, where Ray, Serve and HAProxy listen; lower ports are not affected.
    """
    ports = ", ".join(str(port) for port in sorted({SSH, *open_ports}))
    sets, accepted = [], []
    for version, name, kind, protocol in ((4, "machines", "ipv4_addr", "ip"), (6, "machines6", "ipv6_addr", "ip6")):
        members = ", ".join(str(machine) for machine in machines if machine.version == version)
        if members:
            sets.append(f"  set {name} {{ type {kind}; elements = {{ {members} }} }}")
            accepted.append(f"    {protocol} saddr @{name} accept")
    lines = [
        f"table inet {TABLE} {{}}",  # so that there is one to delete
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
        *sets,
        "  chain input {",
        "    type filter hook input priority filter; policy accept;",
        "    iif lo accept",
        "    ct state established,related accept",
        *accepted,
        f"    tcp dport {{ {ports} }} accept",
        "    tcp dport 1024-65535 drop",
        "    udp dport 1024-65535 drop",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"
