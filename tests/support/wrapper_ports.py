"""Simple implementations of the ports of ``WrapperCommands``: LLM, hand-over, prompts, tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deployments.wrapper.ports import LLM
from registry.background import OnFailure, spawn, spawn_awaited
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec

T = TypeVar("T")


@dataclass(eq=False)
class StartedLLM:
    """An LLM that was started."""

    spec: LLMSpec
    died: asyncio.Event = field(default_factory=asyncio.Event)
    death_reason: str | None = None
    out_of_memory: bool = False

    def die(self, reason: str) -> None:
        """Die, like an engine whose process has ended."""
        self.death_reason = reason
        self.died.set()


class NoPrompts:
    """The port ``Prompts``: no prompt is ever in flight."""

    async def cut(self, request_id: str) -> None:
        """Cut nothing."""

    async def cut_all(self) -> None:
        """Cut nothing."""

    async def over(self) -> None:
        """Return at once."""


class PlainHandOvers:
    """The port ``HandOvers``: every LLM can serve every request at once."""

    async def refusal(self, llm: LLM | None, grant: LeaseGrant) -> str | None:
        """Return None: the LLM can serve the request."""
        return None

    async def settle(self, llm: LLM | None) -> tuple[str, ...]:
        """Return no flags: the machine is at rest."""
        return ()

    async def forget_prompts(self, llm: LLM) -> tuple[str, ...]:
        """Return no flags: the LLM's caches are empty."""
        return ()

    async def provenance(
        self, llm: LLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        """Not reported."""
        return None

    def begun(self, grant: LeaseGrant) -> None:
        """Note nothing."""

    def lease_flags(self) -> tuple[str, ...]:
        """Return no flags: nothing disturbs a lease."""
        return ()


class KeptTasks:
    """The port ``Tasks``: the tasks of one process. ``on_end`` is called after each task's end."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self._on_end = on_end
        self._tasks: dict[asyncio.Task[Any], None] = {}  # ordered by start, so that simulations are repeatable

    def spawn(self, name: str, work: Coroutine[Any, Any, T], *, on_failure: OnFailure | None = None) -> asyncio.Task[T]:
        """As ``background.spawn``."""
        return self._kept(spawn(name, work, on_failure=on_failure))

    def spawn_awaited(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As ``background.spawn_awaited``."""
        return self._kept(spawn_awaited(name, work))

    def cancel(self) -> None:
        """Cancel all tasks, because the process has died."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        tasks = list(self._tasks)
        self.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _kept(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks[task] = None
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # the call that waits for it gets the error
        self._on_end()
