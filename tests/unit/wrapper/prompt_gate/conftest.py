"""For the tests of the PromptGate: a wrapper's HTTP side, which leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest

from tests.support.prompt_gate import Wrapper


@pytest.fixture
async def wrapper(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Wrapper]:
    wrapper = Wrapper()
    yield wrapper
    wrapper.engine.go.set()
    await wrapper.app.cut_all()
    gc.collect(1)  # a task's exception that nobody has looked at is logged when the task goes
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert wrapper.gate.in_flight == 0
    assert len(wrapper.meter.ended) == len(wrapper.meter.begun)
