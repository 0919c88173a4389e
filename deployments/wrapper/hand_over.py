"""Hands an LLM over to a lease: its first prompt, the rest of the machine, its provenance, and what disturbs it."""

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
from registry.errors import InvalidField
from registry.wire.flags import Flag
from registry.wire.words import Grade


class LLMHandOver:
    """``HandOvers`` (see commands) for a real LLM on a real machine."""

    def __init__(self, config: WrapperConfig, *, meter: PromptMeter, rest: EngineRest) -> None:
        self.versions = versions_here(config.gpus)
        self._config = config
        self._meter = meter
        self._rest = rest
        self._probe = Probe()
        self._cpu = cpu_here()
        self._weights_hash: WeightsHash | None = None
        self._measured_since_s: float | None = None

    async def refusal(self, llm: RunningLLM | None, grant: LeaseGrant) -> str | None:
        """Wait until the LLM is idle; return why it can't serve the request that it is to be handed to, if so."""
        await self._rest.reached(llm)
        if llm is None or grant.handed_over_s is not None:
            return None  # one that was handed over before has answered prompts
        try:
            args = prompt_args(grant.llmconfig)
        except InvalidField:
            return None  # its process_prompt says why (see PromptGate); vLLM's own API can be used
        if not args.task.generates:
            return None
        with self._meter.at_work():
            return await self._probe.refusal(llm, args)

    async def settle(self, llm: RunningLLM | None) -> tuple[str, ...]:
        """Warm up the LLM, hash its weights, wait for the machine to rest; return flags for what was late.

        Takes at most ``energy.settle_max_s``.
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

    async def forget_prompts(self, llm: RunningLLM) -> tuple[str, ...]:
        """Empty the LLM's caches; return a flag if they may still hold prompts."""
        return await forgotten(llm.forget_prompts)

    async def provenance(
        self, llm: RunningLLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object]:
        """Return what the LLM runs with. The weights' hash is for measurement grade only."""
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
        """Note that the LLM was handed over to this lease, whose disturbances count from now on if it measures."""
        self._measured_since_s = self._meter.meter.mark() if grant.grade == Grade.MEASUREMENT else None

    def lease_flags(self) -> tuple[str, ...]:
        """Return what has disturbed the lease since it was handed over, if it is of measurement grade."""
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
