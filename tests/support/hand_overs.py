"""Hand-overs of an LLM in which there is nothing to do."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.wrapper.commands import LLM
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec


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
