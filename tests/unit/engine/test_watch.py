"""An LLM whose watch fails is not trusted: it is declared dead, and the reason says why."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from deployments.engine.watch import EngineWatch


class Host:
    """Has one LLM, whose engine does not exist; ``dead`` are the LLMs that were declared dead."""

    def __init__(self, **parts: Any) -> None:
        self.dead: list[Any] = []
        prepared: Any = SimpleNamespace(**parts)
        self.watch = EngineWatch(prepared, stall_s=60.0, on_dead=self.dead.append)
        self.llm: Any = SimpleNamespace(
            served_model_name="tiny",
            order=SimpleNamespace(model="org/tiny"),
            processes=frozenset(),
            died=asyncio.Event(),
            death_reason=None,
            oom_kills=SimpleNamespace(happened=False),
        )


async def test_a_hang_watch_that_fails_ends_its_llm() -> None:
    """What vLLM lacks is named; without its watch an engine that hangs would keep its lease."""
    host = Host()

    def work() -> None:
        raise AttributeError("'AsyncLLM' object has no attribute 'output_processor'")

    host.llm.work = work
    host.watch.watch_for_hangs(host.llm)
    await asyncio.wait_for(host.llm.died.wait(), 5)
    assert host.dead == [host.llm]
    assert "its hang watch failed: AttributeError" in host.llm.death_reason
    assert "output_processor" in host.llm.death_reason


@pytest.mark.parametrize("times", [1, 2])
async def test_a_process_that_ended_is_a_death_even_if_its_error_is_unreadable(times: int) -> None:
    """The file of the errors may be gone; the LLM is declared dead all the same, once."""
    host = Host()  # it has no environment to read errors from
    with capture_logs() as logs:
        for _ in range(times):
            host.watch._on_process_ended(host.llm, 0)
    (died,) = [line for line in logs if line["event"] == "the engine of an LLM is dead"]
    assert (died["model"], died["log_level"]) == ("tiny", "error")
    assert host.dead == [host.llm]
    assert "process 0 ended by itself (AttributeError" in host.llm.death_reason
