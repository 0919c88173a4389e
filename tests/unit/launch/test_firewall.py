"""The firewall's rules: which machines they name, and what they say."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.launch.firewall import addresses_of, machines_of, rules
from greenprompt_client.cli import main as cli
from registry.errors import BadSettings

CLUSTER = "provider: {type: local, head_ip: 192.0.2.10, worker_ips: [192.0.2.11, 192.0.2.12, 192.0.2.11]}\n"


def test_the_machines_of_a_cluster(tmp_path: Path) -> None:
    """The head and the workers, each once, and names as addresses."""
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    assert list(map(str, machines_of(file))) == ["192.0.2.10", "192.0.2.11", "192.0.2.12"]
    assert ip_address("127.0.0.1") in addresses_of(["localhost"], "x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("provider: {type: aws}", "has no provider.head_ip"),
        ("[]", "has no provider.head_ip"),
        ("{", "can't be read"),
        ("provider: {head_ip: 'no such host.invalid'}", "can't be resolved on this machine"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    """The error names the file and what is wrong with it."""
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(BadSettings, match=problem):
        machines_of(file)
    with pytest.raises(BadSettings, match="can't be read"):
        machines_of(tmp_path / "missing.yaml")


def test_both_kinds_of_addresses() -> None:
    """IPv6 machines have a set of their own; without any there is none."""
    both = rules([ip_address("192.0.2.10"), ip_address("2001:db8::1")], open_ports=[8000])
    assert "set machines { type ipv4_addr; elements = { 192.0.2.10 } }" in both
    assert "set machines6 { type ipv6_addr; elements = { 2001:db8::1 } }" in both
    assert "ip6 saddr @machines6 accept" in both
    assert "machines6" not in rules([ip_address("192.0.2.10")], open_ports=[8000])


def test_what_is_open() -> None:
    """Others reach the registry and ssh; what they may not reach is dropped after that."""
    text = rules([ip_address("192.0.2.10")], open_ports=[8443])
    assert text.index("tcp dport { 22, 8443 } accept") < text.index("tcp dport 1024-65535 drop")


def test_the_command_prints_the_rules(tmp_path: Path) -> None:
    """Its output is what nft reads; another machine can be allowed."""
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    result = CliRunner().invoke(cli.app, ["firewall", str(file), "--allow", "192.0.2.99", "--port", "9000"])
    assert result.exit_code == 0
    machines = [*machines_of(file), ip_address("192.0.2.99")]
    assert result.output == rules(machines, open_ports=[9000])
