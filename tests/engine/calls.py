"""What the engine tests ask of an LLM and of the process table."""

import asyncio
import json
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import httpx
import psutil

from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.vllm_api import RunningLLM
from deployments.machine import process_tree
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.prompt_gate import PromptGate
from registry.contract.messages import LeaseGrant
from registry.settings import EnergySettings

FAST = {"enforce_eager": True, "max_model_len": 512}
"""Engine arguments that keep a start short: nothing is compiled."""


def client(llm: RunningLLM) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(llm.asgi), base_url="http://engine", timeout=60)


async def complete(llm: RunningLLM, **more: Any) -> dict[str, Any]:
    """The answer to one fixed prompt, greedy."""
    body = {"model": llm.served_model_name, "prompt": "What does a prompt cost?", "temperature": 0, "max_tokens": 12}
    async with client(llm) as http:
        response = await http.post("/v1/completions", json=body | more)
        assert response.status_code == 200, response.text
        return dict(response.json())


def at_the_gate(llm: RunningLLM, *, prompt_max_s: float = 60.0) -> httpx.AsyncClient:
    """The holder of a lease of this LLM, before the app that a wrapper puts in front of it."""
    config = {
        "uses_chat_template": False,
        "args": {"prompting": {"max_new_tokens": 500, "ignore_eos": True}, "deployment": {}},
    }
    gate = LeaseGate(time.monotonic, fence_s=600.0, process="this")
    lease = LeaseGrant("request-1", 1, "token", json.dumps(config), ends_in_s=600.0, idle_limit_s=600.0)
    gate.bind(replace(lease, as_of=gate.moment))
    app = PromptGate(
        gate,
        PromptMeter(EnergySettings(), gpus=0),
        engine=lambda: (None, str(llm.death_reason)) if llm.died.is_set() else (llm, "ready"),
        max_in_flight=8,
        prompt_max_s=prompt_max_s,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://wrapper/token", timeout=60)


async def has_ended(llm: RunningLLM) -> bool:
    """Return when the engine process itself has nothing to do any more; False if it goes on for seconds."""
    try:
        async with asyncio.timeout(5):
            while await llm.engine.engine_core.call_utility_async("has_work"):
                pass
    except TimeoutError:
        return False
    return True


class Stream:
    """A completion that streams; ``begun`` is set with its first token, ``text`` is all that has come."""

    def __init__(self, llm: RunningLLM, **body: Any) -> None:
        self.begun = asyncio.Event()
        self.text = ""
        self._llm = llm
        self._body = json.dumps({"model": llm.served_model_name, "prompt": "Go on", "stream": True} | body).encode()

    async def run(self) -> None:
        """Return when it has ended."""
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await self._llm.asgi(scope, self._receive, self._send)

    async def _receive(self) -> MutableMapping[str, Any]:
        if not self._body:
            await asyncio.Event().wait()  # the client stays
        body, self._body = self._body, b""
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            self.text += message["body"].decode()
            self.begun.set()


def still_running(pids: Iterable[int]) -> set[int]:
    """Those of these pids whose process has not ended; a zombie has."""
    wanted = set(pids)
    return {process.pid for process in psutil.process_iter() if process.pid in wanted and process_tree.alive([process])}
