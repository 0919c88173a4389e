"""A local registry whose processes of Ray talk to each other by TLS."""

from __future__ import annotations

import os
import socket
import ssl
import time
from pathlib import Path

import httpx
import psutil
import pytest

from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.cluster.conftest import start, stop
from tests.cluster.test_dead_cluster import call_without_a_token
from tests.cluster.test_lifecycle import llmconfig
from tests.support.tls_front import made_certificates

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def listening(process: psutil.Process) -> list[int]:
    """The TCP ports of a process."""
    return [each.laddr.port for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]


def asks_for_a_certificate(port: int) -> bool:
    """Whether a port speaks TLS, and hangs up on a client without a certificate before it says anything."""
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])  # what gRPC speaks
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, anyone.wrap_socket(plain) as encrypted:
            return encrypted.recv(1) == b""
    except ssl.SSLError:
        return False


def test_who_has_no_key_reaches_nothing_of_ray(tmp_path: Path) -> None:
    """The call that ends a GCS or a raylet without TLS ends neither; an LLM is leased and answers before and after."""
    make_tiny_llm(tmp_path / "llms" / "a", seed=0)
    ca = made_certificates(tmp_path, f"IP:127.0.0.1,IP:::1,DNS:localhost,DNS:{os.uname().nodename}")
    (tmp_path / "registry.key").chmod(0o600)
    files = {"SERVER_CERT": tmp_path / "registry.crt", "SERVER_KEY": tmp_path / "registry.key", "CA_CERT": ca}
    tls = {"RAY_USE_TLS": "1", **{f"RAY_TLS_{name}": str(file) for name, file in files.items()}}
    registry = start(tmp_path, tls)
    try:
        llm = llmconfig(tmp_path)
        vital = [registry.process_named("gcs/gcs_server"), registry.process_named("raylet/raylet")]
        for round_ in range(2):
            (request_id,) = registry.post(round_ + 1, llm)
            url = registry.until(request_id, "deployed")["url"]
            answer = httpx.post(f"{url}/process_prompt", json={"question": "Are you there?"}, timeout=60)
            assert answer.status_code == 200, answer.text
            assert registry.delete(request_id) == 204
            for process in vital:
                call_without_a_token(process)
        time.sleep(5)  # an ended GCS would be seen at once, a raylet after a moment
        assert [process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) for process in vital] == [True, True]
        for process in vital:
            assert all(map(asks_for_a_certificate, listening(process))), process
        # A replica has two ports for gRPC; one of them runs what it is sent.
        assert sum(map(asks_for_a_certificate, listening(registry.replica()))) == 2
    finally:
        stop(registry)
