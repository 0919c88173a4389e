"""Watches the engine of an LLM: whether its processes live and, while it does not sleep, whether it hangs."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

import structlog

from deployments.engine.heartbeat import Heartbeat
from deployments.engine.preparation import Preparation
from deployments.engine.vllm_api import RunningLLM
from deployments.machine import process_tree
from registry.background import reason_of, spawn

log = structlog.get_logger("deployments.engine.watch")


class EngineWatch:
    """Declares an LLM dead when one of its processes ends unexpectedly, or when it hangs. For one event loop."""

    def __init__(self, prepared: Preparation, *, stall_s: float, on_dead: Callable[[RunningLLM], None]) -> None:
        """Watch nothing yet.

        Args:
            prepared: Has the environment with the errors that engines log.
            stall_s: See ``Heartbeat``.
            on_dead: Called once for each LLM that is declared dead.
        """
        self.stall_s = stall_s
        self._prepared = prepared
        self._on_dead = on_dead

    def watch_processes(self, llm: RunningLLM) -> None:
        """Watch the LLM's processes from now on, also while it sleeps."""
        llm.watch = process_tree.DeathWatch(llm.processes, functools.partial(self._on_process_ended, llm))

    def watch_for_hangs(self, llm: RunningLLM) -> None:
        """Watch from now on whether the LLM's engine hangs, until ``llm.heart`` is cancelled."""
        llm.heart = spawn(
            f"hang watch of {llm.order.model}",
            self._until_hung(llm),
            on_failure=lambda error: self.declare_dead(llm, f"its hang watch failed: {reason_of(error)}"),
        )

    def declare_dead(self, llm: RunningLLM, reason: str) -> None:
        """Set ``died`` of an LLM and log the reason. Does nothing if it was declared dead before."""
        if not llm.died.is_set():
            llm.death_reason = f"the engine of {llm.served_model_name} is dead: {reason}"
            log.error("the engine of an LLM is dead", model=llm.served_model_name, reason=reason)
            llm.died.set()
            self._on_dead(llm)

    def _on_process_ended(self, llm: RunningLLM, pid: int) -> None:
        try:
            reason = self._why_ended(llm, pid)
        except Exception as error:  # it is dead, even if the reason can't be found
            log.exception("could not find out why a process of an engine ended", model=llm.served_model_name, pid=pid)
            reason = f"process {pid} ended by itself ({reason_of(error)})"
        self.declare_dead(llm, reason)

    def _why_ended(self, llm: RunningLLM, pid: int) -> str:
        if process_tree.ended_by(pid) in (signal.SIGKILL, None) and llm.oom_kills.happened:
            llm.out_of_memory = True
            return f"main memory ran out, and the kernel ended its process {pid}"
        error = self._prepared.environment.first_error()
        return f"process {pid} ended by itself" + (f": {error}" if error else "")

    async def _until_hung(self, llm: RunningLLM) -> None:
        async def ask() -> object:
            llm.oom_kills.look()  # note the kernel's kills so far: they can't be the cause of a later death
            return await llm.engine.is_sleeping()

        heartbeat = Heartbeat(ask, llm.work, llm.processes, stall_s=self.stall_s)
        self.declare_dead(llm, await heartbeat.until_hung())
