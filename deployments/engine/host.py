"""Runs vLLM inside a wrapper: starts an LLM, serves it as an ASGI app, detects its death, stops it completely.

Works in any asyncio program on Linux, with or without Ray.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import structlog

from deployments.engine.checkpoint_trial import IMPORT_S, WALL_S, CheckpointTrial, TrialFailed, tokenizer_of
from deployments.engine.endings import GONE_TIMEOUT_S, Endings, to_the_end
from deployments.engine.gpu_memory import GPUMemory
from deployments.engine.media import CLOSED, MediaLimits
from deployments.engine.order import Order, StopOutcome, pids
from deployments.engine.our_words import in_our_words
from deployments.engine.phases import Phase, PhaseClock
from deployments.engine.preparation import Preparation
from deployments.engine.sleep_mode import SleepMode
from deployments.engine.vllm_api import VLLM, RunningLLM, text_of
from deployments.engine.warm.forkserver import run_apart
from deployments.engine.watch import EngineWatch
from deployments.machine import process_tree
from deployments.machine.out_of_memory import OOMKills
from deployments.machine.second_user import SecondUser
from deployments.models.weights import weights_of
from registry.background import spawn, spawn_awaited
from registry.errors import EngineStartFailed

log = structlog.get_logger("deployments.engine.host")

_COMMON_LLMS = tuple(f"vllm.model_executor.models.{name}" for name in ("llama", "qwen2", "qwen3", "gemma3", "phi3"))
_ELSEWHERE_OR_LATER = re.compile(
    r"connect|time[d ]*out|temporar|unavailable|too many requests|offline|traffic|memory|gpu|device|capability",
    re.IGNORECASE,
)
"""Words in vLLM's error which suggest that a later start, or one on another machine, may succeed."""
_STALL_GPU_S, _STALL_CPU_S = 60.0, 300.0  # a step of a large LLM takes minutes on a CPU; vLLM's own limit is 300 s


class EngineHost:
    """Runs one LLM at a time in separate processes; others may be asleep. One per process; use it from one event loop.

    ``running`` is the running LLM, None if there is none.
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
        media: MediaLimits = CLOSED,
        user: SecondUser | None = None,
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
            media: The images, audio and video that prompts may contain; by default none by URL.
            user: The user as whom engines run; None: the user of this process.
        """
        self.running: RunningLLM | None = None
        self._starting: asyncio.Task[RunningLLM] | None = None
        self._busy = asyncio.Lock()
        self._closed = False
        self._preparing: asyncio.Task[None] | None = None
        self._vllm = VLLM(gpus, kv_cache_gib=kv_cache_gib, may_sleep=sleep_host_gib > 0, media=media)
        self._prepared = Preparation(
            self._vllm,
            gpus=gpus,
            cache_dir=cache_dir,
            kv_cache_gib=kv_cache_gib,
            cpu_threads=cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1),
            preload=preload,
            media=media,
            user=user,
        )
        self._endings = Endings(self._vllm, self._prepared)
        stall_s = stall_s or (_STALL_GPU_S if gpus else _STALL_CPU_S)
        self._watch = EngineWatch(self._prepared, stall_s=stall_s, on_dead=self._on_dead)
        self._dead_sleepers: set[asyncio.Task[None]] = set()
        self._gpu_memory = GPUMemory(gpus)
        sleep_bytes = int(sleep_host_gib * 2**30) if gpus else 0
        self._sleep = SleepMode(sleep_bytes, self._gpu_memory, self._endings.end_at_once)
        self._trial = CheckpointTrial()

    # --- getting ready -----------------------------------------------------------------------------------------

    @property
    def cold_reason(self) -> str | None:
        """Why an engine's start takes as long as "vllm serve"; None if engines are forked from a warm forkserver."""
        return self._prepared.cold_reason

    @property
    def warm(self) -> bool:
        """Whether engines are forked from a warm forkserver."""
        return self.cold_reason is None

    async def prepare(self) -> None:
        """Import vLLM here and in the warm forkserver, in parallel: 15 to 50 seconds, once.

        If a warm start is not possible, a warning is logged, and engines start cold. Cancelling this call does not stop
        the import.

        Raises:
            ImportError: vLLM is not installed, or can't be imported here.
            RuntimeError: The host is closed.
            BadSettings: Engines can't run as the second user; says why.
        """
        if self._closed:
            raise RuntimeError("the engine host is closed")
        if self._preparing is None:
            self._preparing = spawn_awaited("prepare the engine host", self._prepared.prepare())
        await asyncio.shield(self._preparing)

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
            timeout_s: Seconds > 0 after which the start is aborted, not counting ``prepare``.

        Raises:
            ImportError, BadSettings: See ``prepare``.
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
        order = Order(model, served_model_name or model, revision, engine_args or {}, modeltyp)
        self._starting = starting = spawn_awaited(f"start {model}", self._start(order, clock))
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
            await to_the_end(self._stop())

    async def _start(self, order: Order, clock: PhaseClock) -> RunningLLM:
        async with self._busy:
            environment = self._prepared.environment
            order.weights = await asyncio.to_thread(
                weights_of, order.model, order.engine_args.get("load_format", "auto")
            )
            woken = await self._wake(order, clock)
            if woken is not None:
                return woken
            await asyncio.to_thread(self._prepared.require_readable, order.model)
            await self._sleep.make_room(self._vllm.gpu_share(order))
            environment.begin_start(alone=not self._sleep.asleep)
            self._gpu_memory.note()
            before = self._prepared.processes()
            oom_kills = OOMKills()
            following = spawn("follow the phases of a start", clock.follow(environment.phases))
            launching = spawn_awaited(
                "launch an engine", self._vllm.in_thread(self._vllm.launch, order, clock.enter_threadsafe())
            )
            trial = spawn_awaited("try a checkpoint", asyncio.to_thread(self._try_checkpoint, order))
            try:
                await asyncio.wait({launching, trial}, return_when=asyncio.FIRST_EXCEPTION)
                if trial.done():
                    trial.result()
                engine = await asyncio.shield(launching)
                await trial  # no prompt may run the checkpoint's code before it was tried
                asgi = await self._vllm.serve(engine, order)
                llm = RunningLLM(engine, asgi, order, self._prepared.processes() - before)
                clock.enter(Phase.WARMING_UP)
                await llm.warm_up()
            except BaseException as problem:
                order.given_up = True
                await to_the_end(_ended(trial))
                await to_the_end(self._endings.clear_away(launching, before))
                if isinstance(problem, Exception):
                    raise self._start_failed(order, problem, oom_kills) from problem
                raise
            finally:
                following.cancel()
                trial.cancel()
            environment.remember_shared_memory(process_tree.shared_memory(llm.processes))
            self._watch.watch_processes(llm)
            return self._ready(llm, clock)

    def _start_failed(self, order: Order, problem: Exception, oom_kills: OOMKills) -> EngineStartFailed:
        """Return the error for a failed start: the reason, and whether it would fail on every machine."""
        if isinstance(problem, TrialFailed):
            return EngineStartFailed(order.model, in_our_words(str(problem)), permanent=True)
        logged = self._prepared.environment.first_error()
        reason = logged or text_of(problem)
        permanent = not order.accepted and not _ELSEWHERE_OR_LATER.search(reason)
        if order.accepted and not logged:
            reason = self._with_last_lines(reason)
        if oom_kills.happened:
            reason, permanent = f"main memory ran out, and the kernel ended a process; {reason}", False
        return EngineStartFailed(order.model, in_our_words(reason), permanent)

    def _ready(self, llm: RunningLLM, clock: PhaseClock) -> RunningLLM:
        clock.enter(Phase.READY)
        llm.phases = clock.took_s
        self._watch.watch_for_hangs(llm)
        self.running = llm
        log.info("an LLM runs", model=llm.order.model, started_s=round(llm.started_s, 1))
        return llm

    async def _wake(self, order: Order, clock: PhaseClock) -> RunningLLM | None:
        """Wake the LLM and return it; None if it is not asleep, or failed to wake and was killed."""
        llm = next((llm for llm in self._sleep.asleep if llm.order == order), None)
        if llm is None:
            return None
        clock.enter(Phase.WAKING)
        await self._sleep.make_room(self._vllm.gpu_share(order), waking=llm)
        if not await self._sleep.wake(llm):
            return None
        clock.enter(Phase.WARMING_UP)
        try:
            await llm.warm_up()
        except BaseException as problem:
            await self._endings.end_at_once(llm)
            if not isinstance(problem, Exception):
                raise
            log.warning("an LLM woke up, but does not answer", model=order.name, reason=text_of(problem))
            return None
        return self._ready(llm, clock)

    def _with_last_lines(self, reason: str) -> str:
        """Append the engine's last log lines to a reason that does not come from the engine itself."""
        lines = self._prepared.environment.last_lines()
        return f"{reason}; the engine said last:\n{lines}" if lines else reason

    def _try_checkpoint(self, order: Order) -> None:
        """Try the tokenizer and chat template in a separate process. Blocks; see ``CheckpointTrial``.

        Raises:
            TrialFailed: They can't be used.
        """
        tokenizer = tokenizer_of(order.model, order.revision, order.engine_args)
        if tokenizer is None:
            return
        # A fork of the forkserver has vLLM imported. A spawned process must import it first; that delays nothing,
        # because the engine's own cold start takes as long.
        context: multiprocessing.context.BaseContext
        if self._prepared.forkserver is not None:
            context, limit_s = self._prepared.forkserver.context, WALL_S
        else:
            context, limit_s = multiprocessing.get_context("spawn"), WALL_S + IMPORT_S

        def run(function: Callable[[], str | None]) -> str | None:
            return run_apart(context, function, limit_s, given_up=lambda: order.given_up)

        self._trial.passes(tokenizer, run, limit_s)

    # --- death -------------------------------------------------------------------------------------------------

    def give_up(self, llm: RunningLLM, reason: str) -> None:
        """Mark a running or sleeping LLM as dead, as if its process had ended.

        A sleeping LLM is then killed in the background, a running one by the next ``stop``.
        """
        self._watch.declare_dead(llm, reason)

    def _on_dead(self, llm: RunningLLM) -> None:
        if llm in self._sleep.asleep:  # no other task notices the death of a sleeping LLM
            ending = spawn("end a sleeping LLM that died", self._end_sleeper(llm))
            self._dead_sleepers.add(ending)
            ending.add_done_callback(self._dead_sleepers.discard)

    async def _end_sleeper(self, llm: RunningLLM) -> None:
        async with self._busy:
            await self._sleep.forget(llm)

    # --- stopping ----------------------------------------------------------------------------------------------

    async def stop(self) -> StopOutcome:
        """Stop the running or starting LLM, if any; return when its processes are gone and their memory is free.

        If processes or GPU memory remain, the outcome says so, and so does that of each later call until they are
        gone.
        """
        if self._starting is not None:
            self._starting.cancel()
        return await self._stop()

    async def vacate(self, *, wanted_next: str | None = None) -> StopOutcome:
        """Free the GPUs: put the running LLM to sleep if possible, else stop it. A start is cancelled.

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

    async def _stop(self, *, may_sleep: bool = False, wanted_next: str | None = None) -> StopOutcome:
        async with self._busy:
            begun_s = time.monotonic()
            llm, self.running = self.running, None
            killed = set[psutil.Process]()
            if llm is not None and not (may_sleep and await self._lay_down(llm, wanted_next)):
                killed = await self._endings.end(llm)
            llm = None
            gc.collect()
            remaining = await self._endings.remaining()
            if self._prepared.begun and not remaining and not self._sleep.asleep:
                self._prepared.environment.remove_shared_memory()
            excess = await self._gpu_memory.excess(GONE_TIMEOUT_S, self._sleep.kept_bytes)
            return StopOutcome(pids(killed), pids(remaining), excess, time.monotonic() - begun_s)

    async def _lay_down(self, llm: RunningLLM, wanted_next: str | None) -> bool:
        """Put an LLM to sleep; return False if that is impossible and it has to be stopped."""
        if llm.died.is_set() or not self._sleep.allowed:
            return False
        assert llm.heart is not None
        llm.heart.cancel()  # while falling asleep, the engine may answer late; the death watch stays active
        problem = await self._sleep.lay_down(llm, spare=wanted_next)
        if problem is not None:
            log.info("an LLM is stopped and does not sleep", model=llm.served_model_name, reason=problem)
        return problem is None

    async def close(self) -> None:
        """End all engines and the forkserver, remove temporary files. The host can't be used again. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._preparing is not None:
            await asyncio.wait([self._preparing])  # an import can't be interrupted
        if self._starting is not None:
            self._starting.cancel()  # it holds the lock that ``stop_asleep`` needs
        await self.stop_asleep()
        await self.stop()
        await asyncio.gather(*self._dead_sleepers, return_exceptions=True)
        async with self._busy:
            await self._prepared.close()
            self._vllm.close()


async def _ended(task: asyncio.Task[Any]) -> None:
    """Wait until a task is done and retrieve its error, which is reported elsewhere or already known."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
