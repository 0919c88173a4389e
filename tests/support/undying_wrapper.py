"""An LLMWrapper without Serve. A test starts it, and Python's garbage collector does not end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper


class UndyingWrapper(LLMWrapper):
    """An LLMWrapper whose ``__del__`` does nothing: the real one is a coroutine, which only Serve can await."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    @property
    def host(self) -> Any:
        """The wrapper's engine host, which is a fake in tests."""
        return self._host


async def started_wrapper(
    config: WrapperConfig, show_warm: Callable[[bool], None] = lambda _warm: None
) -> UndyingWrapper:
    """Start a wrapper as Serve does; its meter does not poll."""
    wrapper = UndyingWrapper.__new__(UndyingWrapper)
    await wrapper.__init__(config, show_warm)  # type: ignore[misc]  # as Serve does it
    wrapper._meter.stop()
    return wrapper
