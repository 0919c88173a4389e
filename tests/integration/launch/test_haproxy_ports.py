"""HAProxy with the whole configuration that Serve writes: what it listens on, and what it sends to replicas."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import free_ports
from deployments.serve.proxy_guard import ProxyGuard
from tests.support.app_server import served_in_thread

SECRET = "5e" * 32
START_LIMIT_S = 60.0


def replica(app: ASGIApp) -> ASGIApp:
    """An app behind its guard, as Serve runs it: Serve itself answers health checks."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/healthz":
            await JSONResponse("success")(scope, receive, send)
        else:
            await ProxyGuard(app, SECRET)(scope, receive, send)

    return serve


async def headers(request: Request) -> JSONResponse:
    return JSONResponse(dict(request.headers))


def test_haproxy_is_the_only_way_to_a_replica(tmp_path: Path) -> None:
    """For all interfaces, as on a cluster: only the clients' port is open, and only what comes through it is served."""
    port, statistics, metrics = free_ports(3)
    home, app = tmp_path / "h", Starlette(routes=[Route("/{path:path}", headers)])
    script = haproxy_environment(home, SECRET)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    with served_in_thread(replica(app)) as (_, direct):
        backend = BackendConfig(
            "registry",
            "/",
            servers=[ServerConfig("ingress", "127.0.0.1", direct)],
            fallback_server=ServerConfig("fallback", "127.0.0.1", direct),
            app_name="registry",
        )
        config = HAProxyConfig(
            socket_path=str(home / "admin.sock"),
            server_state_base=str(home),
            server_state_file=str(home / "state"),
            stats_port=statistics,
            metrics_port=metrics,
            metrics_enabled=False,
            http_options=HTTPOptions(host="0.0.0.0", port=port),
            has_received_routes=True,
            has_received_servers=True,
        )
        file = home / "haproxy.cfg"
        HAProxyApi(config, {"registry": backend}, str(file))._generate_config_file_internal()
        with subprocess.Popen([script, "-db", "-f", str(file)]) as process:
            try:
                answer = answer_of(f"http://127.0.0.1:{port}/x", {"X-GreenPrompt-Proxy": "0"})
                listening = {
                    (connection.laddr.ip, connection.laddr.port)
                    for connection in psutil.Process(process.pid).net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                }
                seen = httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
                seen += httpx.get(f"http://127.0.0.1:{statistics}/stats").text
            finally:
                process.kill()
        refused = httpx.get(f"http://127.0.0.1:{direct}/x")
    assert listening == {("0.0.0.0", port), ("127.0.0.1", statistics), ("127.0.0.1", metrics)}
    assert "x-greenprompt-source" in answer.json()
    assert "x-greenprompt-proxy" not in answer.json()
    assert (refused.status_code, refused.json()["code"]) == (403, "not_through_proxy")
    assert SECRET not in seen
    assert SECRET in file.read_text()
    assert not file.stat().st_mode & 0o077


def answer_of(url: str, sent: dict[str, str]) -> httpx.Response:
    """The first successful answer; HAProxy needs a moment to start and to check its servers."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        try:
            answer = httpx.get(url, headers=sent)
        except httpx.TransportError:
            pass
        else:
            if answer.is_success:
                return answer
        if time.monotonic() > deadline_s:
            pytest.fail("HAProxy does not serve")
        time.sleep(0.1)
