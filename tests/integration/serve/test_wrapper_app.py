"""The Serve application of a wrapper."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from deployments.engine.vllm_api import _PUBLIC
from deployments.models.sources import ModelSources
from deployments.serve import wrapper_app
from deployments.serve.wrapper_app import WrapperReplica
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper
from registry.settings import EnergySettings, WrapperSettings


async def test_metric_tells_whether_llms_start_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The metric has the wrapper's id as its tag, and is 1 while LLMs start warm, else 0. It logs like all parts."""
    shown: list[tuple[str, float, dict[str, str]]] = []
    configured: list[bool] = []

    class FakeGauge:
        def __init__(self, name: str, *_: object, **__: object) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown.append((self.name, value, tags))

    async def init(_wrapper: LLMWrapper, _config: WrapperConfig, show_warm: Callable[[bool], None]) -> None:
        show_warm(True)
        show_warm(False)

    monkeypatch.setattr(wrapper_app, "Gauge", FakeGauge)
    monkeypatch.setattr(wrapper_app, "prepare_replica", lambda: configured.append(True))
    monkeypatch.setattr(LLMWrapper, "__init__", init)
    monkeypatch.delattr(LLMWrapper, "__del__")  # Serve awaits it, Python's collector can't
    config = WrapperConfig("a-0", 0, WrapperSettings(), EnergySettings(), ModelSources(True, (), tmp_path), tmp_path)
    replica: Any = WrapperReplica.__new__(WrapperReplica)
    await replica.__init__(config)
    name, tags = "greenprompt_wrapper_warm", {"wrapper": "a-0"}
    assert configured == [True]
    assert shown == [(name, 1.0, tags), (name, 0.0, tags)]


def test_a_replica_logs_to_its_first_standard_error() -> None:
    """Serve replaces ``print`` and ``sys.stderr`` in a replica, and drops what a wrapper says there."""
    program = (
        "import builtins, logging, sys\n"
        "from ray.serve._private.logging_utils import StreamToLogger, redirected_print\n"
        "from deployments.serve.logs import configure_replica_logging\n"
        "import structlog\n"
        "builtins.print = redirected_print\n"
        "serve = logging.getLogger('ray.serve')\n"
        "serve.setLevel(logging.WARNING)\n"
        "sys.stdout = StreamToLogger(serve, logging.INFO, sys.stdout)\n"
        "sys.stderr = StreamToLogger(serve, logging.INFO, sys.stderr)\n"
        "configure_replica_logging()\n"
        "structlog.get_logger('deployments.engine.host').info('an LLM runs', model='tiny')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr.splitlines()[-1])
    assert (line["event"], line["model"], done.stdout) == ("an LLM runs", "tiny", "")


OWN = "head.example:8000"
CHANGING = sorted({("POST", "/process_prompt"), ("PUT", "/unknown")} | {each for each in _PUBLIC if each[0] != "GET"})


@pytest.mark.parametrize(("method", "path"), CHANGING)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": f"http://{OWN}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
    ],
)
async def test_a_wrapper_is_guarded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """No path of a lease lets a foreign page prompt, also where it knows the URL; other hosts are not served."""

    async def init(wrapper: Any, _config: WrapperConfig, _show_warm: Callable[[bool], None]) -> None:
        wrapper._prompts = PlainTextResponse("prompted")

    monkeypatch.setattr(wrapper_app, "Gauge", lambda *_, **__: None)
    monkeypatch.setattr(LLMWrapper, "__init__", init)
    monkeypatch.delattr(LLMWrapper, "__del__")  # Serve awaits it, Python's collector can't
    sources, hosts = ModelSources(True, (), tmp_path), ("head.example",)
    config = WrapperConfig("a-0", 0, WrapperSettings(), EnergySettings(), sources, tmp_path, hosts=hosts)
    replica: Any = WrapperReplica.__new__(WrapperReplica)
    await replica.__init__(config)
    transport = httpx.ASGITransport(app=replica.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as http:
        answer = await http.request(method, f"/token{path}", headers=headers)
    assert (answer.status_code, answer.headers["cache-control"]) == (status, "no-store")
