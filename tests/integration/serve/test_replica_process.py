"""The guard of replicas is on wherever Serve opens an HTTP port for them, and can't be off without being noticed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from structlog.testing import capture_logs

from deployments.machine.cluster_token import PROXY_HEADER, proxy_secret
from deployments.models.sources import ModelSources
from deployments.serve import ingress, replica_process
from deployments.serve.http_app import IngressConfig
from deployments.serve.ingress import Ingress
from deployments.serve.replica_process import proxy_guard
from registry.errors import BadSettings

APP = PlainTextResponse("served")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token of a cluster whose Serve opens a port for each replica."""
    file = tmp_path / "token"
    file.write_text("a" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setattr(replica_process.replica, "RAY_SERVE_ENABLE_DIRECT_INGRESS", True)
    return file


async def test_a_replica_with_a_port_serves_only_haproxy(token: Path) -> None:
    """What HAProxy of this cluster sends is served, and nothing else."""
    with capture_logs() as logs:
        transport = httpx.ASGITransport(app=proxy_guard()(APP))
    assert logs == []
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        assert (await http.get("/")).status_code == 403
        assert (await http.get("/", headers={PROXY_HEADER: proxy_secret(token)})).text == "served"


def test_a_replica_without_the_token_does_not_start(token: Path) -> None:
    """It would have to serve everybody, or nobody."""
    token.unlink()
    with pytest.raises(BadSettings, match=r"token.*can't be read"):
        proxy_guard()


def test_without_a_port_there_is_no_guard_and_the_log_says_so() -> None:
    """Serve without HAProxy opens no port that needs one."""
    with capture_logs() as logs:
        assert proxy_guard()(APP) is APP
    (line,) = logs
    assert line["log_level"] == "warning"
    assert line["event"].startswith("Serve runs without HAProxy here")


def config_of(*, haproxy: bool) -> IngressConfig:
    return IngressConfig(ModelSources(True, (), Path("/")), (), trusted_proxies=() if haproxy else None)


def test_an_ingress_that_wants_haproxy_does_not_start_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray that was started in another way than by `greenprompt ray-start` is noticed, and the error says what to do."""
    monkeypatch.setattr(ingress, "prepare_replica", lambda: None)
    with pytest.raises(BadSettings, match=r"http\.haproxy.*ray-start"):
        Ingress(config_of(haproxy=True))
    Ingress(config_of(haproxy=False))
