"""``greenprompt up``: what it refuses in one line, and a cluster that it joins."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import free_ports
from deployments.machine.cluster_token import proxy_secret
from tests.cluster.conftest import REPOSITORY, UP_LIMIT_S, greenprompt

pytestmark = pytest.mark.cluster

FORBIDDEN_LLM = """
deploy:
  - llm: {modeltyp: text-generation, model: /etc, uses_chat_template: true, args: {prompting: {}, deployment: {}}}
"""


def test_a_busy_port_is_one_clear_line(tmp_path: Path) -> None:
    """A port that somebody else has ends in one line that names the setting, and exit status 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        up = greenprompt("up", environment={"GREENPROMPT_STATE_DIR": str(tmp_path), "GREENPROMPT_HTTP__PORT": port})
    assert (up.returncode, len(up.stderr.strip().splitlines())) == (2, 1)
    assert "http.port" in up.stderr
    assert port in up.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("http: {prot: 8000}", "http.prot"),
        ("http: {port: 0}", "http.port"),
        ("http: [", "YAML"),
        ("[]", "mapping"),
        (FORBIDDEN_LLM, "deploy[0].llm.model"),
    ],
)
def test_a_bad_configuration_is_one_clear_line(tmp_path: Path, content: str, named: str) -> None:
    """A configuration that can't be used ends in one line that names the field, and exit status 2."""
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    up = greenprompt("up", "--config", str(path), environment={"GREENPROMPT_STATE_DIR": str(tmp_path / "state")})
    assert (up.returncode, len(up.stderr.strip().splitlines())) == (2, 1), up.stderr
    assert named in up.stderr


def test_a_missing_configuration_is_one_clear_line(tmp_path: Path) -> None:
    """A configuration file that is not there ends in one line that names it, and exit status 2."""
    up = greenprompt("up", "--config", str(tmp_path / "none.yaml"))
    assert (up.returncode, len(up.stderr.strip().splitlines())) == (2, 1)
    assert "none.yaml" in up.stderr


def test_every_shipped_configuration_loads() -> None:
    """Every file in configs/ is YAML of known fields."""
    from registry.settings import load_settings

    paths = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        if "deploy" in (data := yaml.safe_load(path.read_text(encoding="utf-8"))) or "http" in data:
            load_settings(path)


@pytest.mark.long  # the cluster of several hosts is joined in each run
def test_joining_a_running_cluster(tmp_path: Path) -> None:
    """``up --address`` starts the registry on a cluster that runs, ``down`` takes it away again and leaves the rest."""
    port, dashboard, gcs = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="gp-", dir="/tmp") as short:
        token = Path(short) / "token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        environment = {
            **haproxy_environment(Path(short) / "h", proxy_secret(token), ports=free_ports(3)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GREENPROMPT_STATE_DIR": str(tmp_path / "state"),
            "GREENPROMPT_CACHE_DIR": str(tmp_path / "cache"),
            "GREENPROMPT_HTTP__PORT": str(port),
        }
        command = ["ray", "start", "--head", "--block", f"--port={gcs}", "--num-cpus=4", f"--temp-dir={short}/ray"]
        cluster = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:], f"--dashboard-port={dashboard}"],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            address = f"127.0.0.1:{gcs}"
            wait_for_port(gcs)
            up = greenprompt("up", "--address", address, "--detach", environment=environment)
            assert up.returncode == 0, up.stderr
            until_usable(f"http://127.0.0.1:{port}")
            down = greenprompt("down", "--address", address, environment=environment)
            assert down.returncode == 0, down.stderr
            below = psutil.Process(cluster.pid).children(recursive=True)
            names = [" ".join(process.cmdline()) for process in below if process.status() != psutil.STATUS_ZOMBIE]
            assert any("raylet" in name for name in names)
            assert not [name for name in names if "ServeReplica" in name or "RegistryActor" in name]
        finally:
            below = psutil.Process(cluster.pid).children(recursive=True)
            cluster.terminate()
            cluster.wait(60)
            _, left = psutil.wait_procs(below, timeout=20)
            for process in left:
                process.kill()


def until_usable(url: str) -> None:
    """Return when a wrapper can be leased: machines join a cluster when they do, and nobody waits for them."""
    deadline_s = time.monotonic() + UP_LIMIT_S
    while (state := httpx.get(f"{url}/healthz", timeout=30).json())["status"] != "ok":
        assert time.monotonic() < deadline_s, state
        time.sleep(0.2)


def wait_for_port(port: int) -> None:
    """Return when something listens on the port of the loopback interface."""
    deadline_s = time.monotonic() + UP_LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline_s, "nothing listens"
            time.sleep(0.2)
        else:
            return
