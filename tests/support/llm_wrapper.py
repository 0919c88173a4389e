"""An LLMWrapper over an engine host that is a fake, and a client that prompts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx

from deployments.engine.order import StopOutcome
from deployments.models.cache import LocalModel
from deployments.models.weights import Weights
from deployments.wrapper.llm_wrapper import LLMWrapper
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec
from tests.support.fake_cluster import UNTOLD
from tests.support.fake_engine import FakeEngine

LLMCONFIG = json.dumps({"uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}})

FIRST = LeaseGrant("request-1", 1, "token-1", LLMCONFIG, ends_in_s=60.0, idle_limit_s=60.0)

SECOND = LeaseGrant("request-2", 2, "token-2", LLMCONFIG, ends_in_s=60.0, idle_limit_s=60.0)

SPEC = LLMSpec("org/tiny", "text-generation")

OTHER_SPEC = LLMSpec("org/other", "text-generation")


class RunningFake(FakeEngine):
    """An LLM that runs, until it dies."""

    unfinished = 0
    weights: Weights | None = None
    engine_args = {"dtype": "float32"}  # noqa: RUF012
    death_reason: str | None = None
    out_of_memory = False
    processes: tuple[Any, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.warmed_up = 0
        self.forgot = 0
        self.forgets: bool | Exception = True

    def die(self, reason: str) -> None:
        self.death_reason = reason
        self.died.set()

    async def warm_up(self) -> None:
        """Holds, as an answer does, while ``go`` is cleared."""
        self.warmed_up += 1
        await self.go.wait()

    async def forget_prompts(self) -> bool:
        """As ``forgets`` says."""
        self.forgot += 1
        if isinstance(self.forgets, Exception):
            raise self.forgets
        return self.forgets


class FakeHost:
    """An engine host whose engines are fakes; ``stopped`` counts those that were ended, ``left`` is what they leave."""

    left = StopOutcome()

    warm = True
    cold_reason = None

    def __init__(self, **_: object) -> None:
        self.running: RunningFake | None = None
        self.stopped = 0
        self.asleep: list[str] = []
        self.vacated_for: list[str] = []

    async def prepare(self) -> None:
        pass

    async def start(self, model: str, **_: object) -> None:
        self.running = RunningFake()

    async def stop(self) -> StopOutcome:
        self.stopped += self.running is not None
        self.running = None
        return self.left

    async def vacate(self, *, wanted_next: str) -> StopOutcome:
        self.vacated_for.append(wanted_next)
        return await self.stop()

    async def stop_asleep(self) -> None:
        self.asleep.clear()

    def give_up(self, llm: RunningFake, reason: str) -> None:
        llm.die(reason)


class FakeModels:
    """Every model is on the machine."""

    def __init__(self, *_: object) -> None:
        pass

    async def fetch(self, model: str, **_: object) -> LocalModel:
        return LocalModel(model, "c" * 40)

    async def here(self, model: str, **_: object) -> str:
        return model


class Client:
    """Prompts one wrapper over its own ASGI app."""

    def __init__(self, wrapper: LLMWrapper) -> None:
        self.wrapper = wrapper
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=wrapper.__serve_build_asgi_app__()), base_url="http://wrapper"
        )

    @property
    def engine(self) -> RunningFake:
        engine: Any = self.wrapper._host.running
        assert isinstance(engine, RunningFake)
        return engine

    async def bind(self, epoch: int, grant: LeaseGrant) -> None:
        """As the registry does, having heard of this wrapper just now."""
        await self.wrapper.bind(epoch, replace(grant, as_of=self.wrapper._gate.moment))

    async def status(self, token: str) -> httpx.Response:
        return await self._http.get(f"/{token}/get_status")

    async def prompt(self, token: str) -> httpx.Response:
        return await self._http.post(f"/{token}/process_prompt", json={"question": "Why?"})

    async def begin(self, token: str) -> asyncio.Task[httpx.Response]:
        """A prompt that is in flight until ``engine.go`` is set."""
        self.engine.go.clear()
        self.engine.generating.clear()
        prompt = asyncio.create_task(self.prompt(token))
        await self.engine.generating.wait()
        return prompt

    async def replace_while_it_answers(self) -> tuple[asyncio.Task[httpx.Response], asyncio.Task[None]]:
        """A prompt of an expired lease, in flight, and the deployment of OTHER_SPEC, which waits for its end."""
        prompt = await self.begin("token-1")
        await self.wrapper.unbind(3, "request-1", "expired")
        deploy = asyncio.create_task(self.wrapper.deploy(4, OTHER_SPEC, None))
        while (await self.wrapper.report(UNTOLD)).phase != "finishing_prompts":
            await asyncio.wait({deploy}, timeout=0)
        return prompt, deploy


MEASURED = replace(SECOND, grade="measurement")

Make = Callable[..., Awaitable[Client]]
