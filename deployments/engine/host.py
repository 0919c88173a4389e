"""Runs vLLM inside a wrapper: starts an LLM, serves it as an ASGI app, detects its death, stops it completely.

The only file that uses vLLM's serving API; the changes to vLLM's internals for a fast start are in ``engine.warm``.
Works in any asyncio program on Linux, with or without Ray.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import importlib
import logging
import math
import multiprocessing
import os
import re
import signal
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psutil
from pydantic import ValidationError

from deployments.engine.checkpoint_trial import IMPORT_S, WALL_S, CheckpointTrial, TrialFailed, tokenizer_of
from deployments.engine.environment import EngineEnvironment, Phase, PhaseClock, log_handlers_kept
from deployments.engine.gpu_memory import GPUMemory
from deployments.engine.heartbeat import Heartbeat, Work
from deployments.engine.our_words import in_our_words
from deployments.engine.sleep_mode import SleepMode
from deployments.engine.token_count import counted
from deployments.engine.warm.forkserver import WarmForkserver, run_apart, shape_problem
from deployments.machine import process_tree
from deployments.machine.child_processes import bind_spawned_processes
from deployments.machine.out_of_memory import OOMKills
from deployments.models.weights import Weights, weights_of
from registry.errors import EngineNotReady, EngineStartFailed

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]

_log = logging.getLogger(__name__)

_COMMON_LLMS = tuple(f"vllm.model_executor.models.{name}" for name in ("llama", "qwen2", "qwen3", "gemma3", "phi3"))
_SERVING = (
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.generate.api_router",
)
_RUNNERS: Mapping[str, Mapping[str, Any]] = {
    "feature-extraction": {"runner": "pooling", "convert": "embed"},
    "sentence-similarity": {"runner": "pooling", "convert": "embed"},
    "text-classification": {"runner": "pooling", "convert": "classify"},
    "text-generation": {"runner": "generate"},
    "text-ranking": {"runner": "pooling", "convert": "classify"},
}
_PUBLIC = frozenset(
    {("GET", "/v1/models"), ("GET", "/health"), ("GET", "/version")}
    | {
        ("POST", path)
        for path in (
            "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
            "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score",
            "/rerank", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize",
        )
    }
)  # fmt: skip
_ELSEWHERE_OR_LATER = re.compile(
    r"connect|time[d ]*out|temporar|unavailable|too many requests|offline|traffic|memory|gpu|device|capability",
    re.IGNORECASE,
)
_WARM_UP_ID = "warm-up"
_OF_THE_API = ("tool_call_parser",)  # arguments for vLLM's API, not for its engine
_STOP_TIMEOUT_S = 5.0  # for vLLM's own shutdown; remaining processes are then killed
_GONE_TIMEOUT_S = 10.0  # for the kernel to remove a killed process, and for a GPU's memory to be freed
FORGET_TIMEOUT_S: Final = 5.0
"""How long a hand-over waits for the engine to finish its work, so that its caches can be emptied, seconds."""
_FORGET_POLL_S = 0.02
_STALL_GPU_S, _STALL_CPU_S = 60.0, 300.0  # a step of a large LLM takes minutes on a CPU; vLLM's own limit is 300 s


@dataclass(frozen=True, slots=True)
class StopReport:
    """The result of stopping an engine.

    ``killed``: pids that had to be killed. ``leftover``: pids that still live after the kill, so their memory is not
    free. ``gpu_excess_bytes``: by GPU UUID, the bytes in use beyond those in use before the first start; GPUs whose use
    is unknown are missing. ``took_s``: seconds.
    """

    killed: tuple[int, ...] = ()
    leftover: tuple[int, ...] = ()
    gpu_excess_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    took_s: float = 0.0

    @property
    def problem(self) -> str | None:
        """What was not cleaned up, as text; None if everything was."""
        problems = [f"{uuid} holds {excess / 2**20:.0f} MiB too much" for uuid, excess in self.gpu_excess_bytes.items()]
        if self.leftover:
            problems.insert(0, f"engine processes {', '.join(map(str, self.leftover))} can't be ended")
        return "; ".join(problems) or None


def public_path(method: str, path: str) -> bool:
    """Whether the holder of a lease may call this path of the LLM's app. All others are for operators only."""
    return (method.upper(), path) in _PUBLIC


class RunningLLM:
    """An LLM that answers prompts. Made by ``EngineHost.start``; unusable after ``EngineHost.stop``.

    ``asgi`` is vLLM's own OpenAI app (check ``public_path`` first). ``phases`` holds the seconds of each phase of the
    start, or of the wake-up if it slept; ``started_s`` is their sum. ``pids`` are all its processes.
    ``died`` is set when one of them ends unexpectedly or the engine counts as hung; ``death_reason`` then gives the
    reason, and ``out_of_memory`` is True if the kernel killed a process because main memory ran out.
    ``engine_args`` are the arguments that vLLM was started with, except those that name the model; all others have
    vLLM's defaults. ``weights`` are its weight files, None if unknown.
    """

    def __init__(self, engine: AsyncLLM, asgi: ASGIApp, order: _Order, processes: Iterable[psutil.Process]) -> None:
        """Internal: called by ``EngineHost``."""
        self.engine = engine
        self.app = asgi
        self._calls = 0
        self.order = order
        self.served_model_name = order.name
        self.weights = order.weights
        self.weights_bytes = None if order.weights is None else order.weights.size_bytes
        self.engine_args: Mapping[str, Any] = order.given
        self.max_model_len: int = engine.model_config.max_model_len
        self.processes = frozenset(processes)
        self.phases: Mapping[str, float] = {}
        self.died = asyncio.Event()
        self.death_reason: str | None = None
        self.out_of_memory = False
        self.oom_kills = OOMKills()
        self.watch: process_tree.DeathWatch | None = None
        self.heart: asyncio.Task[None] | None = None

    @property
    def started_s(self) -> float:
        """How long the start or the wake-up took, seconds."""
        return sum(self.phases.values())

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the engine and its workers, ascending."""
        return _pids(self.processes)

    async def asgi(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Pass one request to vLLM's app."""
        self._calls += 1
        await self.app(scope, receive, send)

    @property
    def failed(self) -> bool:
        """Whether vLLM itself reports the engine as dead; ``died`` is set at about the same time."""
        return self.died.is_set() or self.engine.errored

    @property
    def unfinished(self) -> int:
        """Number of prompts that the engine has not finished, including those in its queue."""
        count: int = self.engine.get_num_unfinished_requests()
        return count

    def work(self) -> Work:
        """Return the engine's current work and its progress."""
        prompts = self.engine.output_processor.request_states.values()
        unread = max((prompt.prompt_len for prompt in prompts if prompt.is_prefilling), default=0)
        return Work(
            self._calls,
            frozenset(
                (prompt.request_id, prompt.detokenizer.num_output_tokens() if prompt.detokenizer else 0)
                for prompt in prompts
            ),
            steps=math.ceil(unread / self.engine.scheduler_config.max_num_batched_tokens),
        )

    async def healthy(self, timeout_s: float = 30.0) -> None:
        """Return once the engine has answered.

        Raises:
            EngineNotReady: It is dead, or has not answered within ``timeout_s`` seconds > 0.
        """
        if self.died.is_set():
            raise EngineNotReady(self.death_reason or "it died")
        try:
            await asyncio.wait_for(self.engine.is_sleeping(), timeout_s)
        except TimeoutError:
            raise EngineNotReady(f"it has not answered for {timeout_s:g} s") from None
        except Exception as problem:
            raise EngineNotReady(f"it failed: {_text_of(problem)}") from problem

    async def abort_all(self) -> None:
        """Abort every generation in flight; each returns its tokens so far with finish_reason "abort"."""
        self._calls += 1
        await _abort_all(self.engine)

    async def warm_up(self) -> None:
        """Process one prompt, as for a first client: generate one token or compute one embedding.

        Raises whatever vLLM fails with.
        """
        from vllm import PoolingParams, SamplingParams, TokensPrompt
        from vllm.tasks import POOLING_TASKS

        prompt = TokensPrompt(prompt_token_ids=[0])
        tasks = await self.engine.get_supported_tasks()
        task = next((task for task in POOLING_TASKS if task in tasks), None)
        answers: AsyncIterator[object]
        if "generate" in tasks:
            params = SamplingParams(max_tokens=1, temperature=0.0)
            answers = self.engine.generate(prompt, params, _WARM_UP_ID)
        elif task is not None:
            answers = self.engine.encode(prompt, PoolingParams(task=task), _WARM_UP_ID)
        else:
            return
        async for _answer in answers:
            pass

    async def forget_prompts(self) -> bool:
        """Empty the caches that one lease would leave to the next: prefixes, images and audio.

        Waits until the engine has nothing in flight, because vLLM can't empty its prefix cache while a request runs.

        Returns:
            False if earlier prompts may still be cached: the engine was still busy after FORGET_TIMEOUT_S.

        Raises whatever vLLM fails with.
        """
        self._calls += 1
        try:
            async with asyncio.timeout(FORGET_TIMEOUT_S):
                while not await self.engine.reset_prefix_cache(reset_connector=True):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(_FORGET_POLL_S)
                if self.engine.model_config.is_multimodal_model:
                    await self.engine.reset_mm_cache()
                    await self.engine.reset_encoder_cache()
        except TimeoutError:
            return False
        return True


class EngineHost:
    """Runs one LLM at a time in separate processes; others may be asleep. One per process; use it from one event loop.

    ``warm`` says whether engines are forked from a warm forkserver; if not, ``cold_reason`` says why, and a start takes
    as long as "vllm serve".
    """

    def __init__(
        self,
        *,
        gpus: int,
        cache_dir: Path,
        kv_cache_gib: float | None = None,
        cpu_threads: int | None = None,
        preload: Sequence[str] = _COMMON_LLMS,
        stall_s: float | None = None,
        sleep_host_gib: float = 0.0,
    ) -> None:
        """Create the host without starting anything; ``prepare`` does that.

        Args:
            gpus: Number of GPUs that an LLM is spread over, ≥ 0; CUDA_VISIBLE_DEVICES selects them. 0: use the CPU.
            cache_dir: Directory for compiled kernels and similar caches; it is kept after the host is closed.
            kv_cache_gib: Size of the KV cache on the CPU in GiB; None leaves it to vLLM. No effect on GPUs.
            cpu_threads: Threads of an engine on the CPU; None: number of cores minus one. No effect on GPUs.
            preload: Modules to import in advance, in addition to those that every engine needs; by default those of
                common LLMs. One that can't be imported is skipped with a warning.
            stall_s: Seconds > 0 that one step of an engine may take before the engine counts as hung; None: 60 with
                GPUs, 300 without, where a step of a large LLM can take that long.
            sleep_host_gib: GiB ≥ 0 of host memory for sleeping LLMs; 0: sleep mode is off. No effect on the CPU, where
                vLLM has no sleep mode.
        """
        self.running: RunningLLM | None = None
        self.warm = False
        self.cold_reason: str | None = "not prepared"
        self._gpus = gpus
        self._cache_dir = cache_dir
        self._kv_cache_gib = kv_cache_gib
        self._cpu_threads = cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self._preload = preload
        self._stall_s = stall_s or (_STALL_GPU_S if gpus else _STALL_CPU_S)
        self._preparing: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[RunningLLM] | None = None
        self._busy = asyncio.Lock()
        self._closed = False
        self._environment: EngineEnvironment | None = None
        self._forkserver: WarmForkserver | None = None
        self._funerals: set[asyncio.Task[None]] = set()
        self._unended: frozenset[psutil.Process] = frozenset()
        self._gpu_memory = GPUMemory(gpus)
        self._sleep = SleepMode(int(sleep_host_gib * 2**30) if gpus else 0, self._gpu_memory, self._end_at_once)
        self._trial = CheckpointTrial()
        self._defaults: Namespace | None = None
        # All blocking vLLM calls run in this one thread. It lives as long as the host, because the kernel kills the
        # processes that a thread has started when that thread ends.
        self._thread = _engine_thread()

    # --- getting ready -----------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Import vLLM here and in the warm forkserver, in parallel: 15 to 50 seconds, once.

        If a warm start is not possible, a warning is logged, and engines start cold. Cancelling this call does not stop
        the import.

        Raises:
            ImportError: vLLM is not installed, or can't be imported here.
            RuntimeError: The host is closed.
        """
        if self._closed:
            raise RuntimeError("the engine host is closed")
        if self._preparing is None:
            self._preparing = asyncio.create_task(self._prepare(), name="prepare the engine host")
        await asyncio.shield(self._preparing)

    async def _prepare(self) -> None:
        self._environment = EngineEnvironment(
            self._cache_dir,
            cpu_threads=None if self._gpus else self._cpu_threads,
            preload=self._preload,
            # It would override our size, and allows only whole GiB.
            without=() if self._kv_cache_gib is None else ("VLLM_CPU_KVCACHE_SPACE",),
        )
        self._forkserver = WarmForkserver(self._environment.directory)
        warm, imported = await asyncio.gather(
            asyncio.to_thread(self._forkserver.start),
            self._in_thread(self._import),
            return_exceptions=True,
        )
        if isinstance(imported, BaseException):
            raise imported
        self.cold_reason = str(warm) if isinstance(warm, BaseException) else self._why_cold()
        self.warm = self.cold_reason is None
        if self.warm:
            self._forkserver.install()
            for problem in self._forkserver.not_preloaded:
                _log.warning("LLMs that need it will start a little later: %s", problem)
            return
        _log.warning("LLMs will start slowly, since the warm start is not available: %s", self.cold_reason)
        await asyncio.to_thread(self._forkserver.stop)
        self._forkserver = None
        bind_spawned_processes()

    def _import(self) -> None:
        """Import vLLM's serving modules; runs in the engine thread."""
        with log_handlers_kept():
            for module in _SERVING:
                importlib.import_module(module)
            from vllm.config.logging import LoggingConfig
            from vllm.logger import configure_logging_if_needed

            configure_logging_if_needed(LoggingConfig())  # now, so that no engine start does it later
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._defaults = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        gc.collect()
        gc.freeze()  # imported objects stay; scanning them in the garbage collection of each stop would take 0.5 s
        # A prompt leaves almost no cyclic garbage. With Python's default threshold of 700, the objects of prompts in
        # flight are scanned about 20 times a second: 7 % of this process's CPU time with 32 prompts.
        gc.set_threshold(10_000, 10, 10)

    def _why_cold(self) -> str | None:
        binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if not self._gpus and binding != "nobind":
            return f"VLLM_CPU_OMP_THREADS_BIND={binding} binds threads, which only a fresh process can do"
        return shape_problem()

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # --- starting ----------------------------------------------------------------------------------------------

    async def start(
        self,
        model: str,
        *,
        served_model_name: str | None = None,
        revision: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        modeltyp: str = "text-generation",
        on_phase: Callable[[Phase], object] = lambda _phase: None,
        timeout_s: float = 600.0,
    ) -> RunningLLM:
        """Start an LLM and return when it answers. If cancelled at any time, no process remains.

        Args:
            model: Hugging Face id, or directory.
            served_model_name: The name that clients use; None: ``model``.
            revision: Branch, tag or commit; None: the default one.
            engine_args: vLLM's own engine arguments, and ``tool_call_parser``; they override those derived from the
                host and ``modeltyp``.
            modeltyp: The Hugging Face task (``text-generation``, ``feature-extraction`` …).
            on_phase: Called in the event loop when a phase begins.
            timeout_s: Seconds > 0 after which the start is aborted.

        Raises:
            EngineStartFailed: vLLM rejected the LLM or failed (the reason is its first error), the start took too long,
                or ``stop`` was called meanwhile.
            RuntimeError: An LLM is running or starting already, or the host is closed.
        """
        if self.running is not None or self._starting is not None:
            raise RuntimeError("another LLM runs or starts; stop it first")
        clock = PhaseClock(on_phase)
        if not (self._preparing and self._preparing.done()):
            clock.enter(Phase.IMPORTING)
        await self.prepare()
        order = _Order(model, served_model_name or model, revision, engine_args or {}, modeltyp)
        self._starting = starting = asyncio.create_task(self._start(order, clock), name=f"start {model}")
        try:
            async with asyncio.timeout(timeout_s):
                return await starting
        except TimeoutError:
            await self._stop_late(starting)
            reason = f"it was not ready after {round(timeout_s, 1):g} s (phase: {clock.phase})"
            raise EngineStartFailed(model, self._with_last_lines(reason)) from None
        except asyncio.CancelledError:
            await self._stop_late(starting)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineStartFailed(model, "it was stopped while it started") from None
        finally:
            self._starting = None

    async def _stop_late(self, starting: asyncio.Task[RunningLLM]) -> None:
        """Stop an LLM that became ready at the moment when its start was aborted."""
        if not starting.cancelled() and starting.exception() is None:
            await _to_the_end(self._stop())

    async def _start(self, order: _Order, clock: PhaseClock) -> RunningLLM:
        async with self._busy:
            environment = self._environment
            assert environment is not None
            order.weights = await asyncio.to_thread(weights_of, order.model)
            woken = await self._wake(order, clock)
            if woken is not None:
                return woken
            await self._sleep.make_room(self._gpu_share(order))
            environment.begin_start(alone=not self._sleep.asleep)
            self._gpu_memory.note()
            before = self._candidates()
            oom_kills = OOMKills()
            following = asyncio.create_task(clock.follow(environment.phases))
            launching = asyncio.ensure_future(self._in_thread(self._launch, order, clock.enter_threadsafe()))
            trial = asyncio.create_task(asyncio.to_thread(self._try_checkpoint, order))
            try:
                await asyncio.wait({launching, trial}, return_when=asyncio.FIRST_EXCEPTION)
                if trial.done():
                    trial.result()
                engine = await asyncio.shield(launching)
                await trial  # before code of the checkpoint runs for a prompt
                asgi = await self._serve(engine, order)
                llm = RunningLLM(engine, asgi, order, self._candidates() - before)
                clock.enter(Phase.WARMING_UP)
                await llm.warm_up()
            except BaseException as problem:
                order.given_up = True
                await _to_the_end(_ended(trial))
                await _to_the_end(self._clear_away(launching, before))
                if isinstance(problem, Exception):
                    reason = environment.last_words() or _text_of(problem)
                    permanent = not order.accepted and not _ELSEWHERE_OR_LATER.search(reason)
                    if order.accepted and not environment.last_words():
                        reason = self._with_last_lines(reason)
                    if isinstance(problem, TrialFailed):
                        reason, permanent = str(problem), True
                    elif oom_kills.happened:
                        reason, permanent = f"main memory ran out, and the kernel ended a process; {reason}", False
                    raise EngineStartFailed(order.model, in_our_words(reason), permanent) from problem
                raise
            finally:
                following.cancel()
                trial.cancel()
            environment.remember_shared_memory(process_tree.shared_memory(llm.processes))
            llm.watch = process_tree.DeathWatch(llm.processes, functools.partial(self._on_death, llm))
            return self._ready(llm, clock)

    def _ready(self, llm: RunningLLM, clock: PhaseClock) -> RunningLLM:
        clock.enter(Phase.READY)
        llm.phases = clock.took_s
        llm.heart = asyncio.create_task(self._on_hang(llm), name=f"heartbeat of {llm.order.model}")
        self.running = llm
        _log.info("%s runs after %.1f s", llm.order.model, llm.started_s)
        return llm

    async def _wake(self, order: _Order, clock: PhaseClock) -> RunningLLM | None:
        """Wake the ordered LLM and return it; None if it is not asleep or failed to wake, so that it must be started.

        One that failed to wake has been killed.
        """
        llm = next((llm for llm in self._sleep.asleep if llm.order == order), None)
        if llm is None:
            return None
        clock.enter(Phase.WAKING)
        await self._sleep.make_room(self._gpu_share(order), waking=llm)
        if not await self._sleep.wake(llm):
            return None
        clock.enter(Phase.WARMING_UP)
        try:
            await llm.warm_up()
        except BaseException as problem:
            await self._end_at_once(llm)
            if not isinstance(problem, Exception):
                raise
            _log.warning("%s woke up, but does not answer: %s", order.name, _text_of(problem))
            return None
        return self._ready(llm, clock)

    def _gpu_share(self, order: _Order) -> float:
        """Return the share of each GPU's memory that vLLM requires to be free, 0 to 1."""
        share: float = order.engine_args.get("gpu_memory_utilization", self._defaults.gpu_memory_utilization)  # type: ignore[union-attr]
        return share

    def _with_last_lines(self, reason: str) -> str:
        """Append the engine's last log lines to a reason that does not come from the engine itself."""
        assert self._environment is not None
        lines = self._environment.last_lines()
        return f"{reason}; the engine said last:\n{lines}" if lines else reason

    @log_handlers_kept()
    def _launch(self, order: _Order, enter: Callable[[Phase], object]) -> AsyncLLM:
        """Create an engine from the arguments, load its weights and warm it up; runs in the engine thread."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        enter(Phase.CONFIGURING)
        config = self._arguments(order).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        order.accepted = True
        if order.given_up:
            raise RuntimeError("given up")
        enter(Phase.LOADING)
        return AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=False,
            disable_log_stats=True,
        )

    def _try_checkpoint(self, order: _Order) -> None:
        """Try the tokenizer and chat template in a separate process. Blocks. Raises TrialFailed."""
        tokenizer = tokenizer_of(order.model, order.revision, order.engine_args)
        if tokenizer is None:
            return
        # A fork of the forkserver has vLLM imported. A spawned process must import it, but a cold engine start takes
        # as long.
        context: multiprocessing.context.BaseContext
        if self._forkserver is not None:
            context, limit_s = self._forkserver.context, WALL_S
        else:
            context, limit_s = multiprocessing.get_context("spawn"), WALL_S + IMPORT_S

        def run(function: Callable[[], str | None]) -> str | None:
            return run_apart(context, function, limit_s, given_up=lambda: order.given_up)

        self._trial.passes(tokenizer, run)

    def _arguments(self, order: _Order) -> AsyncEngineArgs:
        from vllm.engine.arg_utils import AsyncEngineArgs

        given = {name: value for name, value in order.engine_args.items() if name not in _OF_THE_API}
        unknown = set(given) - {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        if unknown:
            raise ValueError(f"vLLM has no engine argument {', '.join(sorted(unknown))}")
        stages = order.engine_args.get("pipeline_parallel_size", 1)
        ours = {"tensor_parallel_size": max(1, self._gpus // stages), **_RUNNERS.get(order.modeltyp, {})}
        if self._gpus and self._sleep.allowed:
            ours["enable_sleep_mode"] = True
        if not self._gpus and self._kv_cache_gib is not None:
            ours["kv_cache_memory_bytes"] = int(self._kv_cache_gib * 2**30)
        order.given = {**ours, **given}
        fixed = {"model": order.model, "revision": order.revision, "served_model_name": [order.name]}
        return AsyncEngineArgs(**{**order.given, **fixed})

    async def _serve(self, engine: AsyncLLM, order: _Order) -> ASGIApp:
        """Build vLLM's OpenAI app on a running engine."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        args = Namespace(**vars(self._defaults))
        args.model, args.served_model_name = order.model, [order.name]
        args.disable_fastapi_docs = args.disable_log_stats = True
        args.enable_prompt_tokens_details = True  # else answers do not say how many prompt tokens were cached
        args.tool_call_parser = order.engine_args.get("tool_call_parser")
        args.enable_auto_tool_choice = args.tool_call_parser is not None
        tasks = await engine.get_supported_tasks()
        app: Starlette = await self._in_thread(build_app, args, tasks, engine.model_config)
        # It counts HTTP requests for a /metrics endpoint that is not served here, at 3 to 6 % of this process's time.
        unused = "PrometheusInstrumentatorMiddleware"
        app.user_middleware = [one for one in app.user_middleware if getattr(one.cls, "__name__", None) != unused]
        app.middleware_stack = None  # built with the removed middleware; Starlette rebuilds it
        engine.generate = counted(engine.generate)
        await init_app_state(engine, app.state, args, tasks)
        # vLLM sets this to end its own server when the engine dies; here the death watch handles that.
        app.state.server = Namespace(should_exit=False)
        return app

    async def _clear_away(self, launching: asyncio.Future[AsyncLLM], before: set[psutil.Process]) -> None:
        """Remove all processes, sockets and shared memory of a failed or cancelled start."""
        assert self._environment is not None
        deadline_s = time.monotonic() + _GONE_TIMEOUT_S
        while not launching.done() and time.monotonic() < deadline_s:
            processes = self._candidates() - before
            self._environment.remember_shared_memory(process_tree.shared_memory(processes))
            process_tree.kill(processes)
            await asyncio.wait([launching], timeout=0.05)
        if not launching.done():
            # The thread hangs where no process can be killed, probably on the network. It starts no more processes.
            launching.add_done_callback(lambda late: late.cancelled() or late.exception())
            self._thread.shutdown(wait=False)
            self._thread = _engine_thread()
        elif launching.exception() is None:
            await self._shut_down(launching.result())
        process_tree.kill(self._candidates() - before)
        self._unended |= await process_tree.ended(self._candidates() - before, _GONE_TIMEOUT_S)
        gc.collect()

    def _candidates(self) -> set[psutil.Process]:
        """Return all processes that belong, or may belong, to an engine."""
        if self._forkserver is not None and self._forkserver.pid is not None:
            return process_tree.descendants(self._forkserver.pid)
        tracker = WarmForkserver.tracker_pid()
        return {process for process in process_tree.descendants(os.getpid()) if process.pid != tracker}

    def _on_death(self, llm: RunningLLM, pid: int) -> None:
        assert self._environment is not None
        if process_tree.ended_by(pid) in (signal.SIGKILL, None) and llm.oom_kills.happened:
            llm.out_of_memory = True
            self._pronounce_dead(llm, f"main memory ran out, and the kernel ended its process {pid}")
            return
        words = self._environment.last_words()
        self._pronounce_dead(llm, f"process {pid} ended by itself" + (f": {words}" if words else ""))

    async def _on_hang(self, llm: RunningLLM) -> None:
        async def ask() -> object:
            llm.oom_kills.look()  # kills by the kernel until now can't be the cause of a later death
            return await llm.engine.is_sleeping()

        heartbeat = Heartbeat(ask, llm.work, llm.processes, stall_s=self._stall_s)
        self._pronounce_dead(llm, await heartbeat.until_hung())

    def _pronounce_dead(self, llm: RunningLLM, reason: str) -> None:
        if not llm.died.is_set():
            llm.death_reason = f"the engine of {llm.served_model_name} is dead: {reason}"
            _log.error("%s", llm.death_reason)
            llm.died.set()
            if llm in self._sleep.asleep:  # no other task notices the death of a sleeping LLM
                funeral = asyncio.create_task(self._bury(llm))
                self._funerals.add(funeral)
                funeral.add_done_callback(self._funerals.discard)

    def give_up(self, llm: RunningLLM, reason: str) -> None:
        """Mark a running or sleeping LLM as dead, as if its process had ended; ``stop`` then kills it."""
        self._pronounce_dead(llm, reason)

    async def _bury(self, llm: RunningLLM) -> None:
        async with self._busy:
            await self._sleep.forget(llm)

    # --- stopping ----------------------------------------------------------------------------------------------

    async def stop(self) -> StopReport:
        """Stop the running or starting LLM, if any; return when its processes are gone and their memory is free.

        If processes or GPU memory remain, the report says so, and so does the report of each later call until they are
        gone.
        """
        if self._starting is not None:
            self._starting.cancel()
        return await self._stop()

    async def vacate(self, *, wanted_next: str | None = None) -> StopReport:
        """Free the GPUs of the running LLM, if any: put it to sleep if possible, else stop it.

        ``wanted_next`` is the name of the LLM to be started next: if it is asleep, it is not ended to make room.
        """
        if self._starting is not None:
            self._starting.cancel()
        return await self._stop(may_sleep=True, wanted_next=wanted_next)

    async def stop_asleep(self) -> None:
        """End all sleeping LLMs; the next ``stop`` reports what remains of them."""
        async with self._busy:
            await self._sleep.close()

    @property
    def asleep(self) -> Sequence[str]:
        """Names of the sleeping LLMs, oldest first."""
        return [llm.served_model_name for llm in self._sleep.asleep]

    async def _stop(self, *, may_sleep: bool = False, wanted_next: str | None = None) -> StopReport:
        async with self._busy:
            begun_s = time.monotonic()
            llm, self.running = self.running, None
            killed = set[psutil.Process]()
            if llm is not None and not (may_sleep and await self._lay_down(llm, wanted_next)):
                killed = await self._end(llm)
            llm = None
            gc.collect()
            self._unended = frozenset(await process_tree.ended(self._unended, _GONE_TIMEOUT_S))
            if self._environment is not None and not self._unended and not self._sleep.asleep:
                self._environment.remove_shared_memory()
            excess = await self._gpu_memory.excess(_GONE_TIMEOUT_S, self._sleep.kept_bytes)
            return StopReport(_pids(killed), _pids(self._unended), excess, time.monotonic() - begun_s)

    async def _lay_down(self, llm: RunningLLM, wanted_next: str | None) -> bool:
        """Put an LLM to sleep; return False if that is impossible and it has to be stopped."""
        if llm.died.is_set() or not self._sleep.allowed:
            return False
        assert llm.heart is not None
        llm.heart.cancel()  # it may answer late while it falls asleep; the death watch stays active
        problem = await self._sleep.lay_down(llm, spare=wanted_next)
        if problem is not None:
            _log.info("%s is stopped and does not sleep: %s", llm.served_model_name, problem)
        return problem is None

    async def _end(self, llm: RunningLLM, *, at_once: bool = False) -> set[psutil.Process]:
        """Stop or kill an LLM; return those of its processes that had to be killed."""
        assert llm.watch is not None
        assert llm.heart is not None
        llm.watch.close()
        llm.heart.cancel()
        processes = llm.processes.union(*(process_tree.descendants(pid) for pid in llm.pids))
        self._unended |= processes
        killed = set()
        if at_once or llm.died.is_set():  # a dead engine can't stop itself
            killed = process_tree.alive(processes)
            process_tree.kill(killed)
        await self._shut_down(llm.engine)
        llm.app = _stopped
        remaining = await process_tree.ended(processes, 1.0)
        process_tree.kill(remaining)
        return killed | remaining

    async def _end_at_once(self, llm: RunningLLM) -> None:
        """Kill an LLM that sleeps, falls asleep or wakes. Completes even if cancelled."""
        ending = asyncio.create_task(self._end(llm, at_once=True))
        try:
            await asyncio.shield(ending)
        finally:
            await _to_the_end(asyncio.wait([ending]))

    async def _shut_down(self, engine: AsyncLLM) -> None:
        """Stop an engine by vLLM's own shutdown; requests in flight are aborted."""
        with suppress(Exception):  # the engine is dead or hangs: its requests in flight fail with it
            if engine.get_num_unfinished_requests():
                await asyncio.wait_for(_abort_all(engine), 1.0)
            if engine.output_handler is not None and not engine.get_num_unfinished_requests():
                engine.output_handler.cancel()  # else it logs the end of the engine as an error
        stopping = asyncio.ensure_future(self._in_thread(engine.shutdown, _STOP_TIMEOUT_S))
        pokes = []
        while not (await asyncio.wait([stopping], timeout=0.2))[0]:
            # The engine's main thread misses a signal that arrives just before it goes to sleep; any call wakes it.
            pokes.append(asyncio.create_task(engine.is_sleeping()))
        for poke in pokes:
            poke.cancel()
        await asyncio.gather(*pokes, return_exceptions=True)
        stopping.result()
        # vLLM leaves the threads and files of its message queue to the garbage collector.
        messages = getattr(getattr(engine.engine_core, "resources", None), "ctx", None)
        if messages is not None:
            await self._in_thread(messages.destroy, 0)

    async def close(self) -> None:
        """Stop everything, end the forkserver and remove temporary files. The host is unusable then. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._preparing is not None:
            await asyncio.wait([self._preparing])  # an import can't be interrupted
        if self._starting is not None:
            self._starting.cancel()  # it holds the lock that ``stop_asleep`` needs
        await self.stop_asleep()
        await self.stop()
        async with self._busy:
            if self._forkserver is not None:
                await asyncio.to_thread(self._forkserver.stop)
            if self._environment is not None:
                self._environment.close()
            self._thread.shutdown(wait=False)


@dataclass(slots=True)
class _Order:
    """The LLM to start, and the progress of the start; shared by the event loop and the engine thread.

    Two orders are equal if they produce the same LLM from the same weights.
    """

    model: str
    name: str
    revision: str | None
    engine_args: Mapping[str, Any]
    modeltyp: str
    weights: Weights | None = None
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the arguments that vLLM finally received
    accepted: bool = field(default=False, compare=False)  # vLLM has validated the arguments
    given_up: bool = field(default=False, compare=False)


def _engine_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="engine")


async def _to_the_end(work: Coroutine[Any, Any, object]) -> None:
    """Await ``work``, which ends soon, even if cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


async def _ended(task: asyncio.Task[Any]) -> None:
    """Wait until a task is done and retrieve its error, which is reported elsewhere or already known."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _abort_all(engine: AsyncLLM) -> None:
    await engine.pause_generation(mode="abort", clear_cache=False)
    await engine.resume_generation()


async def _stopped(*_args: object) -> None:
    """Replaces the app of a stopped LLM, so that no reference keeps the app alive."""
    raise EngineNotReady("it was stopped")


def _pids(processes: Iterable[psutil.Process]) -> tuple[int, ...]:
    return tuple(sorted(process.pid for process in processes))


def _text_of(problem: BaseException) -> str:
    """Return the message of a vLLM exception as text for people."""
    if isinstance(problem, ValidationError):
        texts: dict[tuple[int | str, ...], str] = {}  # by field; for a union of types the first message is enough
        for error in problem.errors():
            texts.setdefault(error["loc"][:1], str(error["msg"]).removeprefix("Value error, "))
        return "; ".join(f"{field[0]}: {text}" if field else text for field, text in texts.items())
    return str(problem) or type(problem).__name__
