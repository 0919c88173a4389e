"""Swaps the LLM of a wrapper: makes room, fetches the model, checks that it fits, starts the engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.host import EngineHost
from deployments.engine.order import StopOutcome
from deployments.engine.phases import Phase
from deployments.engine.rest import EngineRest
from deployments.engine.vllm_api import RunningLLM
from deployments.machine.memory import gpu_memory_bytes, main_memory
from deployments.models.cache import LocalModel, ModelCache
from deployments.models.checkpoints import checkpoints_here
from deployments.models.folder import folder_problem
from deployments.models.remote_code import code_problem, foreign_code, foreign_model
from deployments.models.small_files import FileTooLarge
from deployments.models.weights import Weights, read_ahead, weights_of
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.ports import OnPhase
from registry.contract.messages import Download, StartedFor
from registry.core.decision import Limits
from registry.core.fit import ENGINE_BYTES, GIB, HOST_SHARE, Size, host_bytes, needs_of, why_no_room, why_too_large
from registry.core.records import LLMSpec
from registry.errors import EngineNotReady, EngineStartFailed, InvalidField, WrapperUnreachable

log = structlog.get_logger("deployments.wrapper.swap")


def _no_phase(phase: str, download: Download | None) -> None:
    """Ignore a phase."""


class LLMSwap:
    """``LLMs`` (see ports) over the engine host. Used by one command at a time."""

    def __init__(
        self, config: WrapperConfig, *, host: EngineHost, models: ModelCache, meter: PromptMeter, rest: EngineRest
    ) -> None:
        self.memory_bytes = main_memory().total_bytes
        self.gpu_memory_bytes = gpu_memory_bytes(config.gpus)
        self._config = config
        self._host = host
        self._models = models
        self._meter = meter
        self._rest = rest
        self._checkpoints = checkpoints_here()
        self._in_use: list[LocalModel] = []
        self._revision: str | None = None
        self._download: Download | None = None
        self._on_phase: OnPhase = _no_phase

    @property
    def running(self) -> RunningLLM | None:
        """See ``LLMs.running``."""
        return self._host.running

    @property
    def revision(self) -> str | None:
        """See ``LLMs.revision``."""
        return self._revision

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> RunningLLM:
        """See ``LLMs.replace``. Waits first until the running LLM is idle."""
        self._on_phase, self._download = on_phase, None
        with suppress(EngineNotReady):  # the LLM counts as dead then; ``vacate`` kills it
            await self._rest.reached(self._host.running)
        if self._rest.process_problem is not None:
            raise WrapperUnreachable(self._config.wrapper_id, self._rest.process_problem)
        # The energy of making room is charged like that of the start. The weights are read ahead only from now on:
        # earlier, reading would have disturbed the lease of another client.
        with (
            self._meter.load(spec.model, started_for) as start,
            read_ahead(await self._weights(spec, revision)),
        ):
            self._require_empty(await self._host.vacate(wanted_next=spec.model))
            await self._start_llm(spec, revision)
            running = self._host.running
            assert running is not None  # start() returned
            start.woken = Phase.WAKING in running.phases and Phase.LOADING not in running.phases
        took_s = {phase: round(seconds, 2) for phase, seconds in running.phases.items()}
        log.info("the LLM is ready", wrapper_id=self._config.wrapper_id, model=spec.model, took_s=took_s)
        return running

    async def stop(self) -> None:
        """Stop the running LLM and those that sleep. Raises WrapperUnreachable if something of them is left."""
        await self._host.stop_asleep()
        await self._empty()

    async def clear_away(self) -> None:
        """Remove what is left of an LLM that has died. Raises WrapperUnreachable if that is not possible."""
        dead = self._host.running
        reason = None if dead is None else dead.death_reason
        log.error("the engine died", wrapper_id=self._config.wrapper_id, reason=reason)
        await self._empty()

    def give_up(self, llm: RunningLLM, reason: str) -> None:
        """Mark an LLM as dead, as if its process had ended."""
        self._host.give_up(llm, reason)

    async def _check_fits(self, model: str, spec: LLMSpec) -> None:
        """Raise EngineStartFailed if an LLM is certainly too large, or would nearly fill main memory.

        The ingress has checked already, but perhaps without the checkpoint. It knows neither the
        number of GPUs that share the KV cache nor the memory that other programs use. The failure
        is not permanent, because the LLM may run on another machine.
        """
        config, settings = self._config, self._config.settings
        try:
            memory = await self._checkpoints.memory(model, spec, gpus=config.gpus)
        except FileTooLarge as error:
            raise EngineStartFailed(spec.model, str(error), permanent=True) from error
        kv_cache_bytes = None if settings.kv_cache_gib is None else settings.kv_cache_gib * GIB
        has_bytes = self.gpu_memory_bytes if config.gpus else self.memory_bytes // config.on_machine
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
        """Download a model if needed and start it, within ``deploy_timeout_s``; returns when it answers."""
        limit_s = self._config.settings.deploy_timeout_s
        ends_s = asyncio.get_running_loop().time() + limit_s
        try:
            try:
                async with asyncio.timeout_at(ends_s):
                    model, engine_args = await self._fetch(spec, revision)
            except TimeoutError:
                done = "" if self._download is None else f" ({self._download.share:.0%} is there)"
                reason = f"its download was not over after {limit_s:g} s{done}; the next attempt continues it"
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
            self._rest.begin(None)  # vLLM may still read the model, in a thread of this process
            raise

    async def _fetch(self, spec: LLMSpec, revision: str | None) -> tuple[LocalModel, dict[str, Any]]:
        """Return the model on this machine, and the engine arguments to start it with.

        ``revision`` is the commit that the lease began with; None: the current commit of the spec's
        revision.
        """
        located = self._config.sources.locate(spec.model)
        engine_args = json.loads(spec.engine_args)
        if engine_args.get("trust_remote_code"):
            self._require_allowed_code(spec, located, engine_args.get("tokenizer_revision"))

        def downloading(download: Download) -> None:
            self._download = download
            self._on_phase("downloading", download)

        self._on_phase("locating", None)
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
        own_folder = Path(located).is_absolute()
        await self._require_harmless(
            spec, model, own_folder=own_folder, runs_code=bool(engine_args.get("trust_remote_code"))
        )
        return model, engine_args

    def _require_allowed_code(self, spec: LLMSpec, located: str, tokenizer_revision: str | None) -> None:
        """Raise EngineStartFailed if this LLM may not run its own code.

        The ingress has checked that, but perhaps before a restart with other settings.
        """
        allowed = self._config.models.allow_remote_code
        problem = code_problem(located, spec.revision, tokenizer_revision, allowed)
        if problem is not None:
            raise EngineStartFailed(spec.model, f"trust_remote_code {problem}", permanent=True)

    async def _require_harmless(self, spec: LLMSpec, model: LocalModel, *, own_folder: bool, runs_code: bool) -> None:
        """Check the files of a model before the engine reads them. ``own_folder``: it is not in the hub's cache.

        Raises:
            EngineStartFailed: A file is unusual, or the engine would load another model, or code of another repository
                or commit.
        """
        try:
            # The files of the hub's cache are links to the files of this cache.
            roots = self._config.sources.roots if own_folder else None
            problem = await asyncio.to_thread(folder_problem, model.path, roots)
            if problem is None:
                problem = await asyncio.to_thread(foreign_model, model.path)
            if problem is None and runs_code:
                problem = await asyncio.to_thread(foreign_code, model.path)
                if problem is None and model.revision not in (None, spec.revision):
                    problem = f"commit {model.revision} was loaded, but code is allowed only at {spec.revision}"
                problem = problem and f"its code may not run: {problem}"
        except FileTooLarge as error:
            problem = str(error)
        except OSError as error:
            raise EngineStartFailed(spec.model, f"its files can't be read ({error.strerror})") from error
        if problem is not None:
            raise EngineStartFailed(spec.model, problem, permanent=True)

    def _release_models(self) -> None:
        while self._in_use:
            self._in_use.pop().release()
        self._revision = None

    async def _empty(self) -> None:
        """Stop the engine. Raises WrapperUnreachable if processes or memory remain."""
        self._require_empty(await self._host.stop())

    def _require_empty(self, outcome: StopOutcome) -> None:
        if outcome.problem is not None:
            raise WrapperUnreachable(self._config.wrapper_id, outcome.problem)
        self._release_models()

    async def _weights(self, spec: LLMSpec, revision: str | None) -> Weights | None:
        """Return the weight files that a start will read; None if the LLM sleeps, or is not on this machine."""
        if spec.model in self._host.asleep:
            return None
        try:
            located = self._config.sources.locate(spec.model)
        except InvalidField:  # a symbolic link now leads out of the allowed folders; the start reports it
            return None
        folder = await self._models.here(located, revision=revision or spec.revision)
        load_format = json.loads(spec.engine_args).get("load_format", "auto")
        return None if folder is None else await asyncio.to_thread(weights_of, folder, load_format)

    def _set_phase(self, phase: str) -> None:
        self._on_phase(phase, None)
