"""A chat template that passes its trial and then does not end, in a wrapper with a real vLLM."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.models.args.mapping import map_llmconfig
from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper
from deployments.wrapper.config import WrapperConfig
from registry.contract.messages import LeaseGrant
from registry.errors import EngineNotReady, WrapperUnreachable
from registry.settings import EnergySettings, WrapperSettings
from registry.wire.words import canonical_json
from tests.engine.calls import FAST
from tests.support.hostile.tokenizers import template
from tests.support.undying_wrapper import started_wrapper

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    # vLLM reads fields of a request that it has deprecated itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

MESSAGES = 50
"""More than any chat of the trial has."""

LOOP = (
    f"{{% if messages | length >= {MESSAGES} %}}{{% for a in range(99999) %}}{{% for b in range(99999) %}}"
    "{% if strftime_now('') == 'over' %}{{ raise_exception('over') }}{% endif %}{% endfor %}{% endfor %}{% endif %}x"
)
"""Ends when the test says so, because a thread of Python can't be ended."""


@pytest.fixture
def clock() -> Iterator[Any]:
    """The clock of chat templates; ``says`` is what it says."""
    from transformers.utils import chat_template_utils

    clock = SimpleNamespace(says="")
    now = SimpleNamespace(strftime=lambda _format: clock.says)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: now))
        yield clock
        clock.says = "over"


async def test_a_process_that_a_template_keeps_busy_is_replaced(
    llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    """The next lease is not handed over, no LLM is started, and the process is to be replaced, all with the reason."""
    monkeypatch.setattr(llm_wrapper, "raise_score", lambda _: None)
    folder = tmp_path / "llms" / "evil"
    shutil.copytree(llms / "a", folder)
    template(LOOP)(folder)
    sources = ModelSources(False, (tmp_path / "llms",), tmp_path)
    settings = WrapperSettings(kv_cache_gib=1, fence_s=3600)
    wrapper = await started_wrapper(WrapperConfig("a-0", 0, settings, EnergySettings(), sources, tmp_path / "wrapper"))
    llmconfig = {
        "modeltyp": "text-generation",
        "model": str(folder),
        "uses_chat_template": True,
        "args": {"prompting": {"max_new_tokens": 4}, "deployment": FAST},
    }
    spec = map_llmconfig(llmconfig).spec
    grant = LeaseGrant("r", 1, "token", canonical_json(llmconfig), ends_in_s=3600.0, idle_limit_s=3600.0)
    try:
        transport = httpx.ASGITransport(app=wrapper.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://wrapper/token", timeout=60) as client:
            await wrapper.deploy(1, spec, None)
            assert (await wrapper.bind(2, replace(grant, as_of=wrapper._gate.moment))).refusal is None
            assert (await client.post("/process_prompt", json={"question": "Why?"})).status_code == 200
            wrapper._rest.require_process()
            body = {"messages": [{"role": "user", "content": "Why?"}] * MESSAGES, "max_completion_tokens": 1}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await client.post(
                        "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
                    )
            await wrapper.unbind(3, "r", "released")
            busy = "the wrapper's process still worked 5 s after the end of a lease"
            second = replace(grant, request_id="s", token="other", as_of=wrapper._gate.moment)
            with pytest.raises(EngineNotReady, match=busy):
                await wrapper.bind(4, second)
            with pytest.raises(WrapperUnreachable, match=busy):
                await wrapper.deploy(5, spec, None)
            with pytest.raises(EngineNotReady, match=busy):
                wrapper._rest.require_process()
    finally:
        clock.says = "over"
        await wrapper.stop(6)
        await wrapper.host.close()
        wrapper._meter.stop()
