"""Hostile HTTP against the ingress, and against HAProxy as Serve runs it with the ingress behind it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.launch.haproxy import haproxy_environment
from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from tests.support.app_server import served_in_thread
from tests.support.fake_registry import FakeRegistry
from tests.support.hostile.client import cpu_s
from tests.support.hostile.http_bytes import CLOSED, ROWS, Bytes
from tests.support.hostile.rows import LEAKS

SILENT_S = 5.0
"""How long a server that waits for more bytes is waited for, seconds."""

CHANGING = {"request", "release", "withdraw", "drain", "undrain", "create_key", "revoke_key", "keep_alive"}
_STATUS = re.compile(rb"(?:^|(?<=[}\]\n]))HTTP/1\.[01] (\d{3})")


@dataclass
class Server:
    """The ingress, and what is in front of it."""

    address: tuple[str, int]
    registry: FakeRegistry
    uvicorn: uvicorn.Server
    pids: tuple[int, ...]

    def send(self, sent: bytes) -> bytes:
        """Send bytes on a connection; return what comes until it is closed, or silent for SILENT_S."""
        host, port = self.address
        with socket.create_connection(self.address, timeout=SILENT_S) as connection:
            with suppress(OSError):  # closed while more is sent
                connection.sendall(sent.replace(b"{host}", f"{host}:{port}".encode()))
            came = b""
            with suppress(OSError):
                while part := connection.recv(65536):
                    came += part
            return came

    def rest(self, limit_s: float) -> str | None:
        """Return when no request and no work is left; what is, if it is there after ``limit_s`` seconds."""
        deadline_s = time.monotonic() + limit_s
        left: str | None = "not looked yet"
        while left is not None and time.monotonic() < deadline_s:
            before_s, used = time.monotonic(), [cpu_s(pid) for pid in self.pids]
            time.sleep(0.02)
            passed_s = time.monotonic() - before_s
            share = max(cpu_s(pid) - first for pid, first in zip(self.pids, used, strict=True)) / passed_s
            left = f"{share:.0%} of a CPU" if share > 0.1 else None
            if self.uvicorn.server_state.tasks:
                left = "a request"
        return left


@contextmanager
def _ingress(registry: FakeRegistry) -> Iterator[tuple[uvicorn.Server, int]]:
    config = IngressConfig(ModelSources(True, (), Path("/")), ())
    app = build_app(config, registry.call)
    app.openapi()  # now, because it takes a second
    with served_in_thread(app) as served:
        yield served


@pytest.fixture(scope="module", params=["direct", "behind"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The ingress itself, or behind HAProxy with Serve's own defaults and our limits."""
    registry = FakeRegistry()
    with ExitStack() as stack:
        ingress, port = stack.enter_context(_ingress(registry))
        if request.param == "direct":
            yield Server(("127.0.0.1", port), registry, ingress, (os.getpid(),))
            return
        front = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        folder = tmp_path_factory.mktemp("haproxy")
        (defaults,) = re.findall(r"^defaults\n(?s:.*?)(?=^frontend)", HAPROXY_CONFIG_TEMPLATE, re.MULTILINE)
        defaults = re.sub(r".*(\{\{|state-from-file).*\n|\{%.*?%\}", "", defaults)
        config = folder / "haproxy.cfg"
        config.write_text(
            f"global\n{defaults}    timeout client 9s\n    timeout connect 9s\n    timeout server 9s\n"
            "    errorfile 503 /nowhere/500.http\n"
            f"frontend http_frontend\n    bind fd@{front.fileno()}\n    default_backend back\n"
            f"backend back\n    server all 127.0.0.1:{port}\n"
        )
        script = haproxy_environment(folder, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
        command = [script, "-db", "-f", str(config)]
        haproxy = stack.enter_context(subprocess.Popen(command, pass_fds=[front.fileno()], stderr=subprocess.DEVNULL))
        stack.callback(haproxy.kill)
        found = Server(front.getsockname(), registry, ingress, (os.getpid(), haproxy.pid))
        deadline_s = time.monotonic() + 30
        while b" 200 " not in found.send(ROWS[0].sent):
            assert time.monotonic() < deadline_s, "HAProxy does not start"
        yield found


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_nothing_comes_of_hostile_bytes(server: Server, row: Bytes) -> None:
    """The first status is an expected one, no hidden request gets an answer or has an effect, and all is as before."""
    calls = len(server.registry.calls)
    came = server.send(row.sent)
    statuses = [int(status) for status in _STATUS.findall(came)] or [CLOSED]
    allowed = row.behind if len(server.pids) > 1 else row.direct
    assert statuses[0] in allowed, came[:500]
    assert len(statuses) <= row.answers, came
    assert not CHANGING & {method for method, *_ in server.registry.calls[calls:]}
    assert [leak for leak in LEAKS if leak.encode() in came] == []
    assert server.rest(row.rests_s) is None
    assert b" 200 " in server.send(ROWS[0].sent)
