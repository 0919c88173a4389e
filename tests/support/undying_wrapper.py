"""An LLMWrapper without Serve: started by a test, and not ended by Python's collector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper


class UndyingWrapper(LLMWrapper):
    """Serve awaits a wrapper's end; Python's collector can't."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    @property
    def host(self) -> Any:
        """Its engine host, which is a fake in tests."""
        return self._host


async def started_wrapper(
    config: WrapperConfig, show_warm: Callable[[bool], None] = lambda _warm: None
) -> UndyingWrapper:
    """Start a wrapper as Serve does; its meter does not poll."""
    wrapper = UndyingWrapper.__new__(UndyingWrapper)
    await wrapper.__init__(config, show_warm)  # type: ignore[misc]  # as Serve does it
    wrapper._meter.stop()
    return wrapper
