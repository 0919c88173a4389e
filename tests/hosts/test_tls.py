"""Ray's own TLS on a cluster of several machines, switched on as docs/how-to/run-a-cluster.md says."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.hosts.conftest import REPOSITORY, Cluster, prompt
from tests.hosts.hosts import INSTALLED, Host, alive
from tests.support.startsync import startsync
from tests.support.tls_front import made_certificates

pytestmark = [pytest.mark.hosts, pytest.mark.long, pytest.mark.timeout(1200)]

HOW_TO = REPOSITORY / "docs" / "how-to" / "run-a-cluster.md"
BACK_LIMIT_S = 480
LOOPBACK = ("127.0.0.1", "[::1]")


def ports_of(host: Host, program: str) -> list[str]:
    """The TCP ports of a program that other hosts reach. psutil sees no sockets of another network namespace."""
    said = host.run(f"ss -Hltnp | grep '\"{program}\"'")
    addresses = [line.split()[3] for line in said.splitlines() if line.startswith("LISTEN")]
    return sorted({port for ip, _, port in (each.rpartition(":") for each in addresses) if ip not in LOOPBACK})


@pytest.fixture
def encrypted(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, started again with TLS; without it afterwards."""
    desk, hosts = cluster.net.host("desk"), [cluster.net.host(name) for name in ("head", *cluster.workers)]
    folder = desk.home / "ray-tls"
    folder.mkdir()
    names = ",".join(f"IP:{address}" for address in ("127.0.0.1", *(host.address for host in hosts)))
    ca = made_certificates(folder, names)
    ca.rename(folder / "ca.pem")
    (folder / "ca.key").unlink()
    (folder / "registry.crt").rename(folder / "cert.pem")
    (folder / "registry.key").rename(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    _, section = HOW_TO.read_text(encoding="utf-8").split("## Encrypt Ray's connections\n")
    (lines,) = re.findall(r"```yaml\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    said = yaml.safe_load(lines)
    file = desk.home / "cluster.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["file_mounts"] |= said["file_mounts"]
    config["setup_commands"] += said["setup_commands"]
    cluster.ray("down -y ~/cluster.yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        cluster.ray("up -y ~/cluster.yaml")
        cluster.until_ready(*cluster.workers, limit_s=BACK_LIMIT_S)
        yield cluster
    finally:
        cluster.ray("down -y ~/cluster.yaml")
        for host in hosts:
            host.run("rm -rf ~/ray-tls; sed -i /RAY_USE_TLS/d ~/.bashrc")
        cluster.describe(*cluster.workers)
        cluster.ray("up -y ~/cluster.yaml")
        cluster.until_ready(*cluster.workers, limit_s=BACK_LIMIT_S)


def test_a_neighbour_ends_nothing_of_an_encrypted_cluster(encrypted: Cluster) -> None:
    """LLMs are leased on both machines; the call without a token, which ends a GCS or a raylet, is refused by all."""
    cluster, neighbour = encrypted, encrypted.net.host("db")
    leases = [cluster.until(cluster.post(time.time_ns(), name)[0], "deployed") for name in "ab"]
    assert len({lease["machine"] for lease in leases}) == 2
    (neighbour.home / "startsync.py").write_text(startsync(), encoding="utf-8")
    tried = []
    for name in ("head", *cluster.workers):
        host = cluster.net.host(name)
        for program in ("gcs/gcs_server", "raylet/raylet") if name == "head" else ("raylet/raylet",):
            (process,) = host.running(program)
            ports = ports_of(host, process.name())
            for port in ports:
                shown = neighbour.run(f"timeout 10 openssl s_client -connect {host.address}:{port} 2>&1", check=False)
                assert "BEGIN CERTIFICATE" in shown, (name, process, port, shown)
                neighbour.run(f"{INSTALLED}/.venv/bin/python ~/startsync.py {host.address}:{port}")
            tried.append((name, process, len(ports)))
    assert len(tried) == 4
    assert all(ports for _, _, ports in tried)
    time.sleep(5)  # a raylet would need a moment
    assert [name for name, process, _ in tried if not alive(process)] == []
    for lease in leases:
        assert prompt(lease["url"]).status_code == 200
        cluster.release(lease["requestId"])
