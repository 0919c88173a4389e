"""The ports of a wrapper's commands where nothing has to be done: an LLM, its hand-over, no prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.wrapper.ports import LLM
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec


@dataclass(eq=False)
class StartedLLM:
    """An LLM that was started."""

    spec: LLMSpec
    died: asyncio.Event = field(default_factory=asyncio.Event)
    death_reason: str | None = None
    out_of_memory: bool = False

    def die(self, reason: str) -> None:
        """End by itself, as an engine whose process has ended."""
        self.death_reason = reason
        self.died.set()


class NoPrompts:
    """``Prompts`` of the commands: none is ever in flight."""

    async def cut(self, request_id: str) -> None:
        """Cut nothing."""

    async def cut_all(self) -> None:
        """Cut nothing."""

    async def over(self) -> None:
        """Return at once."""


class PlainHandOvers:
    """``HandOvers`` of the commands: every LLM can serve every request, at once."""

    async def refusal(self, llm: LLM | None, grant: LeaseGrant) -> str | None:
        """It can."""
        return None

    async def settle(self, llm: LLM | None) -> tuple[str, ...]:
        """The machine is at rest."""
        return ()

    async def forget_prompts(self, llm: LLM) -> tuple[str, ...]:
        """Its caches are empty."""
        return ()

    async def provenance(
        self, llm: LLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        """Not reported."""
        return None

    def begun(self, grant: LeaseGrant) -> None:
        """Note nothing."""

    def lease_flags(self) -> tuple[str, ...]:
        """Nothing disturbs a lease."""
        return ()
