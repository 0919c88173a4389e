"""What the registry's commands to a wrapper reach: prompts, LLMs, hand-overs, background tasks.

They are ports, so that simulations run the commands as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from deployments.machine import background
from registry.contract.messages import Download, LeaseGrant, StartedFor
from registry.core.records import LLMSpec

OnPhase = Callable[[str, Download | None], None]
"""Is called with the phase of a start, and the progress of a download."""


class LLM(Protocol):
    """An LLM that was started."""

    @property
    def died(self) -> asyncio.Event:
        """Is set when it ends by itself."""
        ...

    @property
    def death_reason(self) -> str | None:
        """Why it ended by itself, if it has."""
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
        """The LLM that was started last, also if it has died; None once it was stopped."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit of that LLM; None if it has none, or none runs."""
        ...

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> L:
        """Stop the running LLM, or put it to sleep, and start this one; returns when it answers.

        ``revision``: the commit to run, None: the spec's. ``started_for`` pays for the start, None: no request.

        Raises:
            EngineStartFailed: with the engine's own reason.
            WrapperUnreachable: as ``stop``.
        """
        ...

    async def stop(self) -> None:
        """Stop the running LLM and those that sleep; returns when that is verified.

        Raises:
            WrapperUnreachable: something of them is left, which only a new process or an operator can remove.
        """

    async def clear_away(self) -> None:
        """Remove what is left of the running LLM, which has died. Raises WrapperUnreachable as ``stop``."""

    def give_up(self, llm: L, reason: str) -> None:
        """Mark an LLM as dead, as if its process had ended."""


class HandOvers(Protocol[L_contra]):
    """What is done when an LLM is handed over to a lease."""

    async def refusal(self, llm: L_contra | None, grant: LeaseGrant) -> str | None:
        """Wait until the LLM has finished the work of the last lease; return why it can't serve the next one, if so.

        Raises:
            EngineNotReady: it has died, or is being ended because it does not finish.
        """

    async def settle(self, llm: L_contra | None) -> tuple[str, ...]:
        """Prepare the LLM and the machine for a measurement; return flags for what was not reached in time."""
        ...

    async def forget_prompts(self, llm: L_contra) -> tuple[str, ...]:
        """Empty the LLM's caches; return a flag if they may still hold prompts."""
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
    """Starts background tasks, as ``deployments.machine.background`` does."""

    def spawn(
        self, name: str, work: Coroutine[Any, Any, T], *, on_failure: background.OnFailure | None = None
    ) -> asyncio.Task[T]:
        """Start a task whose result nobody waits for; a failure is logged and given to ``on_failure``."""
        ...

    def spawn_awaited(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task whose owner awaits its result and handles its failure."""
        ...
