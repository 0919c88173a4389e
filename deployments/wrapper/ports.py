"""The interfaces through which the registry's commands act: prompts, LLMs, hand-overs, background tasks.

They are ports, so that simulations run the commands as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from registry import background
from registry.contract.messages import Download, LeaseGrant, StartedFor
from registry.core.records import LLMSpec

OnPhase = Callable[[str, Download | None], None]
"""Called with the phase of a start, and the progress of a download (None: no download)."""


class LLM(Protocol):
    """An LLM that was started."""

    @property
    def died(self) -> asyncio.Event:
        """Set when it has died or counts as dead, not when it was stopped."""
        ...

    @property
    def death_reason(self) -> str | None:
        """Why it counts as dead; None while it does not."""
        ...

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel ended it because main memory ran out."""
        ...


L = TypeVar("L", bound=LLM)
L_contra = TypeVar("L_contra", bound=LLM, contravariant=True)
T = TypeVar("T")


class Prompts(Protocol):
    """The prompts that the wrapper answers."""

    async def cut(self, request_id: str) -> None:
        """Cut the prompts of this request's lease; returns when they have ended."""

    async def cut_all(self) -> None:
        """Cut every prompt in flight; returns when all have ended."""

    async def over(self) -> None:
        """Return when every prompt now in flight has ended."""


class LLMs(Protocol[L]):
    """The one LLM that runs in the wrapper, and those that sleep. Called by one command at a time."""

    @property
    def running(self) -> L | None:
        """The running LLM, even if it has died since; None if none was started, or it was stopped or put to sleep."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit of the running LLM; None if it has none, or no LLM runs."""
        ...

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> L:
        """Stop the running LLM, or put it to sleep, and start this one; returns when it answers.

        ``revision``: the commit to run, None: the spec's. The energy of the start is charged to the
        request ``started_for``, None: to no request.

        Raises:
            EngineStartFailed: with the engine's own reason.
            WrapperUnreachable: the previous LLM could not be removed completely (see ``stop``), or this process still
                works for an earlier lease.
        """
        ...

    async def stop(self) -> None:
        """Stop the running LLM and those that sleep; returns when that is verified.

        Raises:
            WrapperUnreachable: processes or memory remain. Only a restart of the wrapper, or an
                operator, can free them.
        """

    async def clear_away(self) -> None:
        """Remove what is left of the running LLM, which has died. Raises WrapperUnreachable as ``stop``."""

    def give_up(self, llm: L, reason: str) -> None:
        """Mark an LLM as dead, as if its process had ended."""


class HandOvers(Protocol[L_contra]):
    """What is done when an LLM is handed over to a lease."""

    async def refusal(self, llm: L_contra | None, grant: LeaseGrant) -> str | None:
        """Wait until the LLM is idle; return why it can't serve this lease, None if it can.

        Raises:
            EngineNotReady: it has died, or is being ended because it did not become idle.
        """

    async def settle(self, llm: L_contra | None) -> tuple[str, ...]:
        """Prepare the LLM and the machine for a measurement; return flags for what was not reached in time."""
        ...

    async def forget_prompts(self, llm: L_contra) -> tuple[str, ...]:
        """Empty the LLM's caches; return a flag if they may still hold prompts, and could never be emptied.

        Raises:
            EngineNotReady: they could be emptied before, and can't now. The LLM is being ended.
        """
        ...

    async def provenance(
        self, llm: L_contra, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        """Return what the LLM runs with; None: not reported."""

    def begun(self, grant: LeaseGrant) -> None:
        """Note that the LLM was handed over to this lease."""

    def lease_flags(self) -> tuple[str, ...]:
        """Return what has disturbed the lease since it was handed over."""
        ...


class Tasks(Protocol):
    """Starts background tasks, as ``registry.background`` does."""

    def spawn(
        self, name: str, work: Coroutine[Any, Any, T], *, on_failure: background.OnFailure | None = None
    ) -> asyncio.Task[T]:
        """Start a task that is not awaited; a failure is logged and passed to ``on_failure``."""
        ...

    def spawn_awaited(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task whose owner awaits its result and handles its failure."""
        ...
