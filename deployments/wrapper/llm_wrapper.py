"""LLMWrapper: stays on its machine, in one process, while the LLMs inside it are swapped.

The registry commands it (deploy, stop, bind, unbind): see ``commands``. The lease holder prompts it over HTTP at
``…/<token>/…``: see ``prompt_gate``. The two sides meet only in the lease gate and the engine host. This class puts the
parts together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from uuid import uuid4

from starlette.types import ASGIApp

from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.host import EngineHost
from deployments.engine.media import MediaLimits
from deployments.engine.rest import EngineRest
from deployments.engine.vllm_api import RunningLLM
from deployments.machine.cpu_quota import cpus_here
from deployments.machine.out_of_memory import WRAPPER_SCORE, raise_score
from deployments.machine.second_user import second_user
from deployments.machine.wrapper_activity import WrapperActivity
from deployments.models.args.mapping import task_of
from deployments.models.cache import ModelCache
from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.hand_over import LLMHandOver
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.prompt_gate import PromptGate
from deployments.wrapper.swap import LLMSwap
from registry.contract.messages import Belief, HandOver, LeaseGrant, StartedFor, WrapperReport
from registry.core.records import LLMSpec


class LLMWrapper:
    """One LLM and one lease at a time, on the GPUs that this process was given.

    ``show_warm`` is called with True if LLMs start warm, else False: when the wrapper is prepared and
    at each report. At the end it is called with False.
    """

    async def __init__(self, config: WrapperConfig, show_warm: Callable[[bool], None]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Import the engine; the replica counts as running when this returns, after 15 to 50 s."""
        raise_score(WRAPPER_SCORE)
        self._show_warm = show_warm
        locks_dir = (config.models.cache_dir or config.cache_dir) / ".greenprompt"
        cpus = cpus_here() / config.on_machine
        process = uuid4().hex
        self._meter = PromptMeter(
            config.energy,
            gpus=config.gpus,
            cpus=cpus,
            on_machine=config.on_machine,
            wrapper_id=config.wrapper_id,
            process=process,
            wrapper_activity=WrapperActivity(locks_dir / "wrappers", config.wrapper_id),
            writes_text=lambda llmconfig: task_of(json.loads(llmconfig)).generates,
        )
        self._gate = LeaseGate(
            time.monotonic, fence_s=config.settings.fence_s, process=process, on_change=self._on_lease_change
        )
        self._host = _engine_host(config, cpus)
        self._prompts = PromptGate(
            self._gate,
            self._meter,
            engine=lambda: self._commands.engine_state(),
            max_in_flight=config.settings.max_prompts_in_flight,
            prompt_max_s=config.settings.prompt_max_s,
            finish=config.finish_prompts,
        )
        self._rest = EngineRest(self._prompts.over, self._host.give_up)
        models = ModelCache(config.models.cache_dir, locks_dir, config.models.cache_max_gib)
        self._swap = LLMSwap(config, host=self._host, models=models, meter=self._meter, rest=self._rest)
        self._hand_over = LLMHandOver(config, meter=self._meter, rest=self._rest)
        self._commands: WrapperCommands[RunningLLM] = WrapperCommands(
            config.wrapper_id,
            gate=self._gate,
            prompts=self._prompts,
            llms=self._swap,
            hand_overs=self._hand_over,
            finish_prompts=config.finish_prompts,
        )
        with self._meter.at_work():
            await self._host.prepare()
        self._show_warm(self._host.warm)
        self._meter.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._prompts

    async def __del__(self) -> None:
        """Stop the engine and its processes when Serve shuts the replica down."""
        self._show_warm(False)  # else Prometheus keeps the last value of an ended wrapper
        await self._host.close()
        self._meter.stop()

    async def report(self, belief: Belief) -> WrapperReport:
        """Process the registry's view, and return the wrapper's state.

        Does not wait for the engine, but for the end of prompts that it cuts, about a second.
        """
        await self._commands.hear(belief)
        self._show_warm(self._host.warm)
        windows = await self._meter.windows(belief)
        living = self._commands.living()
        return replace(
            self._commands.report(),
            unfinished=living.unfinished if living is not None else None,
            memory_bytes=self._swap.memory_bytes,
            gpu_memory_bytes=self._swap.gpu_memory_bytes,
            warm=self._host.warm,
            cold_reason=self._host.cold_reason,
            meter=self._meter.describe(),
            versions=self._hand_over.versions,
            windows=windows,
        )

    def check_health(self) -> None:
        """Check the energy meter and the rest after leases. Serve calls this, and replaces a wrapper whose check fails.

        Raises:
            RuntimeError: energy is no longer counted, because the meter's thread has died.
            EngineNotReady: this process goes on working for a lease that has ended.
        """
        self._meter.meter.check()
        self._rest.require_process()

    async def deploy(
        self, epoch: int, spec: LLMSpec, grant: LeaseGrant | None, started_for: StartedFor | None = None
    ) -> None:
        """See ``WrapperCommands.deploy``."""
        await self._commands.deploy(epoch, spec, grant, started_for)

    async def stop(self, epoch: int) -> None:
        """See ``WrapperCommands.stop``."""
        await self._commands.stop(epoch)

    async def bind(self, epoch: int, grant: LeaseGrant) -> HandOver:
        """See ``WrapperCommands.bind``."""
        return await self._commands.bind(epoch, grant)

    async def unbind(self, epoch: int, request_id: str, how: str) -> None:
        """See ``WrapperCommands.unbind``."""
        await self._commands.unbind(epoch, request_id, how)

    async def touch(self, request_id: str) -> bool:
        """See ``WrapperCommands.touch``."""
        return self._commands.touch(request_id)

    def _on_lease_change(self, grant: LeaseGrant | None, since_s: float) -> None:
        self._prompts.lease_changed(grant)
        self._meter.hand_over(grant, since_s)
        if grant is None:
            self._rest.begin(self._commands.living())


def _engine_host(config: WrapperConfig, cpus: float) -> EngineHost:
    return EngineHost(
        gpus=config.gpus,
        kv_cache_gib=config.settings.kv_cache_gib,
        cache_dir=config.cache_dir,
        cpu_threads=None if config.on_machine == 1 else max(1, int(cpus)),
        stall_s=config.settings.stall_s,
        preload=[f"vllm.model_executor.models.{name}" for name in config.settings.preload],
        sleep_host_gib=(config.settings.sleep_host_gib or 0.0) / config.on_machine,
        media=MediaLimits(config.models.allowed_media_domains, config.models.media_max_mib * 2**20),
        user=None if config.settings.run_as is None else second_user(config.settings.run_as),
    )
