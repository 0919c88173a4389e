"""Ends the processes of engines, and records the shared memory of failed starts for its removal."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

import psutil

from deployments.engine.preparation import Preparation
from deployments.engine.vllm_api import VLLM, Engine, RunningLLM, stopped
from deployments.machine import process_tree
from registry.background import spawn_awaited

GONE_TIMEOUT_S: Final = 10.0
"""Time for the kernel to remove a killed process, and for a GPU's memory to be freed, seconds."""


class Endings:
    """Ends the engines of one host, and keeps track of their processes that still live.

    Use it in the host's event loop, under the host's lock.
    """

    def __init__(self, vllm: VLLM, prepared: Preparation) -> None:
        """Do nothing yet."""
        self._vllm = vllm
        self._prepared = prepared
        self._remaining: frozenset[psutil.Process] = frozenset()

    async def end(self, llm: RunningLLM, *, at_once: bool = False) -> set[psutil.Process]:
        """Stop an LLM; return those of its processes that had to be killed.

        ``at_once``: kill all its processes first, without waiting for its prompts.
        """
        assert llm.watch is not None
        assert llm.heart is not None
        llm.watch.close()
        llm.heart.cancel()
        processes = llm.processes.union(*(process_tree.descendants(pid) for pid in llm.pids))
        self._remaining |= processes
        killed = set()
        if at_once or llm.died.is_set():  # a dead engine can't stop itself
            killed = process_tree.alive(processes)
            process_tree.kill(killed)
        await self._vllm.shut_down(llm.engine)
        llm.app = stopped
        remaining = await process_tree.ended(processes, 1.0)
        process_tree.kill(remaining)
        return killed | remaining

    async def end_at_once(self, llm: RunningLLM) -> None:
        """Kill an LLM, whether awake, asleep or in between. Completes even if cancelled."""
        ending = spawn_awaited("kill an LLM", self.end(llm, at_once=True))
        try:
            await asyncio.shield(ending)
        finally:
            await to_the_end(asyncio.wait([ending]))

    async def clear_away(self, launching: asyncio.Future[Engine], before: set[psutil.Process]) -> None:
        """Kill the processes of a failed or cancelled start, and record its shared memory for removal.

        Takes up to 2 * GONE_TIMEOUT_S. The environment removes the shared memory and sockets later.

        Args:
            launching: The call that creates the engine.
            before: The processes of engines before the start.
        """
        deadline_s = time.monotonic() + GONE_TIMEOUT_S
        while not launching.done() and time.monotonic() < deadline_s:
            processes = self._prepared.processes() - before
            self._prepared.environment.remember_shared_memory(process_tree.shared_memory(processes))
            process_tree.kill(processes)
            await asyncio.wait([launching], timeout=0.05)
        if not launching.done():
            # Killing processes did not end the call: it hangs, probably on the network. It starts no more processes.
            launching.add_done_callback(lambda late: late.cancelled() or late.exception())
            self._vllm.replace_thread()
        elif launching.exception() is None:
            await self._vllm.shut_down(launching.result())
        process_tree.kill(self._prepared.processes() - before)
        self._remaining |= await process_tree.ended(self._prepared.processes() - before, GONE_TIMEOUT_S)
        gc.collect()

    async def remaining(self) -> frozenset[psutil.Process]:
        """Wait up to GONE_TIMEOUT_S until all ended engines' processes are gone; return those that are not."""
        self._remaining = frozenset(await process_tree.ended(self._remaining, GONE_TIMEOUT_S))
        return self._remaining


async def to_the_end(work: Coroutine[Any, Any, object]) -> None:
    """Wait until ``work`` is done. Ignores cancellation, so ``work`` must end soon."""
    task = spawn_awaited("completes even if cancelled", work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()
