"""Prepares the hand-over of an LLM to a lease, and reports disturbances of the lease.

Before the hand-over the LLM becomes idle and answers one prompt; for measurement grade, the machine
also comes to rest. What the LLM runs with (its provenance) is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from deployments.energy.prompt_meter import PromptMeter
from deployments.energy.settling import SLICE_S, SLICES, at_rest, forgotten, warmed_up
from deployments.engine.rest import EngineRest
from deployments.engine.vllm_api import RunningLLM
from deployments.models.args.mapping import prompt_args
from deployments.models.weights_hash import WeightsHash
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.probe import Probe
from deployments.wrapper.provenance import cpu_here, gpus_here, provenance, versions_here
from registry.contract.messages import LeaseGrant
from registry.core.provenance import PENDING
from registry.core.records import LLMSpec
from registry.errors import EngineNotReady, InvalidField
from registry.wire.flags import Flag
from registry.wire.words import Grade


class LLMHandOver:
    """``HandOvers`` (see ports) for a real LLM on a real machine."""

    def __init__(self, config: WrapperConfig, *, meter: PromptMeter, rest: EngineRest) -> None:
        self.versions = versions_here(config.gpus)
        self._config = config
        self._meter = meter
        self._rest = rest
        self._probe = Probe()
        self._cpu = cpu_here()
        self._weights_hash: WeightsHash | None = None
        self._measured_since_s: float | None = None
        self._forgets: RunningLLM | None = None  # the LLM whose caches were emptied once

    async def refusal(self, llm: RunningLLM | None, grant: LeaseGrant) -> str | None:
        """Wait until the LLM is idle; return why it can't serve this request, None if it can, or if that is unknown.

        Raises:
            EngineNotReady: the LLM has died, or is being ended because it did not become idle.
        """
        await self._rest.reached(llm)
        if llm is None or grant.handed_over_s is not None:
            return None  # an LLM that was handed over to this lease before could serve it
        try:
            args = prompt_args(grant.llmconfig)
        except InvalidField:
            return None  # process_prompt reports the error (see PromptGate); vLLM's own API can be used
        if not args.task.generates:
            return None
        with self._meter.at_work():
            return await self._probe.refusal(llm, args)

    async def settle(self, llm: RunningLLM | None) -> tuple[str, ...]:
        """Warm up the LLM, hash its weights, wait for the machine to rest.

        Takes about ``energy.settle_max_s`` seconds at most. Returns flags for what was not reached
        in that time.
        """
        meter, energy = self._meter.meter, self._config.energy
        begun_s = meter.mark()
        if llm is None:
            return (Flag.NOT_STEADY,)
        with self._meter.at_work():
            if not await warmed_up(llm.warm_up, max_s=energy.settle_max_s):
                return (Flag.NOT_STEADY,)
            left_s = begun_s + energy.settle_max_s - SLICES * SLICE_S - meter.mark()
            await self._hash_weights(llm, within_s=max(0.0, left_s))
        return await at_rest(meter, energy, begun_s=begun_s, given_up=llm.died.is_set)

    # D128: an engine that keeps the prompts of a lease is ended
    async def forget_prompts(self, llm: RunningLLM) -> tuple[str, ...]:
        """Empty the LLM's caches; return a flag if they may still hold prompts, and could never be emptied.

        Raises:
            EngineNotReady: they could be emptied before, and can't now. The LLM is being ended.
        """
        flags = await forgotten(llm.forget_prompts)
        if not flags:
            self._forgets = llm
        elif self._forgets is llm:
            self._rest.give_up(llm, "its caches could not be emptied after a lease (perhaps it still has a prompt)")
            raise EngineNotReady(llm.death_reason or "it died")
        return flags

    async def provenance(
        self, llm: RunningLLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object]:
        """Return what the LLM runs with. Only measurement grade gets a hash of the weights, or PENDING."""
        hashed, sha256 = self._weights_hash, None
        if grant.grade == Grade.MEASUREMENT and llm.weights is not None:
            same = hashed is not None and hashed.weights == llm.weights
            sha256 = (hashed.sha256 if same and hashed is not None else None) or PENDING
        return provenance(
            cpu=self._cpu,
            gpus=await asyncio.to_thread(gpus_here, self._config.gpus) if self._config.gpus else [],
            versions=self.versions,
            model=spec.model,
            revision=revision,
            weights_sha256=sha256,
            engine_args=llm.engine_args,
        )

    def begun(self, grant: LeaseGrant) -> None:
        """Note the hand-over to this lease. For measurement grade, disturbances are recorded from now on."""
        self._measured_since_s = self._meter.meter.mark() if grant.grade == Grade.MEASUREMENT else None

    def lease_flags(self) -> tuple[str, ...]:
        """Return flags for what has disturbed the lease since the hand-over; empty unless it has measurement grade."""
        meter, since_s = self._meter.meter, self._measured_since_s
        if since_s is None:
            return ()
        return (Flag.CONTENDED,) if meter.contended(since_s, meter.mark()) else ()

    async def _hash_weights(self, running: RunningLLM, *, within_s: float) -> None:
        if running.weights is None:
            self._weights_hash = None
            return
        if self._weights_hash is None or self._weights_hash.weights != running.weights:
            self._weights_hash = WeightsHash(running.weights, self._config.cache_dir / "weights-sha256")
        await self._weights_hash.known(within_s=within_s)
