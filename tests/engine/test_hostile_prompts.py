"""Hostile prompts against a wrapper with a real vLLM: what is answered, and that all is as before within seconds."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engine.vllm_api import RunningLLM
from deployments.models.args.mapping import map_llmconfig
from deployments.models.sources import ModelSources
from deployments.serve.body_limit import MIB, BodyLimit
from deployments.serve.browsers import BrowserGuard
from deployments.wrapper import llm_wrapper
from deployments.wrapper.config import WrapperConfig
from registry.contract.messages import LeaseGrant
from registry.settings import EnergySettings, WrapperSettings
from registry.wire.words import canonical_json
from tests.engine.calls import FAST, has_ended
from tests.support.app_server import served
from tests.support.hostile.client import cpu_s, send
from tests.support.hostile.prompts import ROWS
from tests.support.hostile.rows import LEAKS, Hostile, ids
from tests.support.undying_wrapper import UndyingWrapper, started_wrapper

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM reads fields of a request that it has deprecated itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKEN = "lease_h0stile"
REST_S, LOOK_S = 5.0, 0.05
"""Longest time until rest, and how long a look at the CPU takes, seconds."""


@dataclass
class Machine:
    """A wrapper with a lease behind a socket, and a port that nothing has a reason to open."""

    wrapper: UndyingWrapper
    url: str
    canary: str
    visitors: list[object] = field(default_factory=list)

    @property
    def llm(self) -> RunningLLM:
        """The running LLM."""
        running = self.wrapper.host.running
        assert isinstance(running, RunningLLM)
        return running

    async def send(self, row: Hostile) -> tuple[int, str]:
        """Send a row to the lease."""
        content = row.content.replace(b"{canary}", self.canary.encode())
        return await send(self.url, row, f"/{TOKEN}{row.path}", content, row.headers)

    async def rest(self) -> str | None:
        """Return when nothing is left of what was sent; what is, if it is there after REST_S."""
        deadline_s = time.monotonic() + REST_S
        left: str | None = "not looked yet"
        while left is not None and time.monotonic() < deadline_s:
            left = await self._left()
        return left

    async def _left(self) -> str | None:
        before_s, pids = time.monotonic(), (os.getpid(), *self.llm.pids)
        used = [cpu_s(pid) for pid in pids]
        await asyncio.sleep(LOOK_S)
        passed_s = time.monotonic() - before_s
        shares = [(cpu_s(pid) - first) / passed_s for pid, first in zip(pids, used, strict=True)]
        if self.llm.engine.get_num_unfinished_requests() or not await has_ended(self.llm):
            return "work in the engine"
        if self.wrapper._gate.in_flight:
            return "a prompt in flight"
        return f"{max(shares):.0%} of a CPU" if max(shares) > 0.1 else None


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(
    llms: Path, tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> AsyncIterator[Machine]:
    """A wrapper that has leased the tiny LLM to TOKEN."""
    patch.setattr(llm_wrapper, "raise_score", lambda _: None)
    folder = tmp_path_factory.mktemp("wrapper")
    sources = ModelSources(False, (llms,), llms)
    settings = WrapperSettings(kv_cache_gib=1, max_body_mib=16, fence_s=3600)
    wrapper = await started_wrapper(WrapperConfig("a-0", 0, settings, EnergySettings(), sources, folder))
    llmconfig = {
        "modeltyp": "text-generation",
        "model": str(llms / "a"),
        "uses_chat_template": False,
        "args": {
            "prompting": {"max_new_tokens": 4, "do_sample": False},
            "deployment": {**FAST, "tool_call_parser": "hermes"},
        },
    }
    spec = map_llmconfig(llmconfig).spec
    await wrapper.deploy(1, spec, None)
    grant = LeaseGrant("r", 1, TOKEN, canonical_json(llmconfig), ends_in_s=3600.0, idle_limit_s=3600.0)
    await wrapper.bind(2, replace(grant, as_of=wrapper._gate.moment))
    visitors: list[object] = []

    def visited(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append(writer.get_extra_info("peername"))
        writer.close()

    canary = await asyncio.start_server(visited, "127.0.0.1", 0)
    app = BrowserGuard(BodyLimit(wrapper.__serve_build_asgi_app__(), lambda _path: 16 * MIB), ())
    async with served(app, access_log=False) as port:
        yield Machine(wrapper, f"http://127.0.0.1:{port}", f"127.0.0.1:{canary.sockets[0].getsockname()[1]}", visitors)
    canary.close()
    await wrapper.stop(3)
    await wrapper.host.close()
    wrapper._meter.stop()
    # The next start of an engine in this process replaces these handlers, and leaves their files open.
    for handler in logging.getLogger("vllm").handlers:
        handler.close()


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
async def test_nothing_comes_of_a_hostile_prompt(machine: Machine, row: Hostile) -> None:
    """The status is the expected one, the answer tells nothing of the inside, and afterwards all is as before."""
    pids = machine.llm.pids
    status, answer = await machine.send(row)
    assert await machine.rest() is None
    assert machine.visitors == []
    assert status in row.status, answer
    assert [leak for leak in LEAKS if leak in answer] == []
    assert machine.llm.pids == pids
    normal = Hostile("normal", "/process_prompt", {"question": "Why?"}, (200,), "own")
    assert (await machine.send(normal))[0] == 200
