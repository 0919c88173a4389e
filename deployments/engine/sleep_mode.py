"""Puts LLMs to sleep: their weights stay in host memory and return to the GPUs within seconds.

Uses vLLM's sleep mode at level 1. Level 2 would keep only the process and read the weights from disk on waking
(``reload_weights``), which saves little over a warm start; so an LLM that can't sleep at level 1 is stopped. A sleeping
LLM that has to end is killed, because it has no state to lose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import psutil
import structlog

from deployments.machine import process_tree
from deployments.machine.memory import main_memory
from registry.background import reason_of, spawn

SLEEP_TIMEOUT_S = 120.0
"""Limit for copying the weights to or from host memory, seconds: 100 GiB take 30 s, mostly to pin the memory."""
GPU_BACK_S = 5.0
"""Limit for the driver to free the memory of an LLM that went to sleep, seconds."""
RESIDUE_BYTES = 2 * 2**30
"""GPU memory that a sleeping LLM may keep per GPU, bytes: its CUDA context, NCCL's buffers, CUDA graphs."""
HOST_RESERVE = 0.1
"""Share (0 to 1) of the memory of the machine, or of our control group, that stays free, even within the budget."""
MEMORY_CHECK_S = 5.0
"""Seconds between checks of the machine's free memory while an LLM sleeps."""

log = structlog.get_logger("deployments.engine.sleep_mode")


class LLM(Protocol):
    """An LLM, as sleep mode uses it. ``weights_bytes``: the size of its weights, None if unknown."""

    engine: Any
    processes: frozenset[psutil.Process]
    served_model_name: str
    weights_bytes: int | None


class GPUs(Protocol):
    """The memory of the host's GPUs."""

    @property
    def known(self) -> bool:
        """Whether every GPU has a baseline."""

    async def excess(self, timeout_s: float, kept_bytes: int = 0) -> Mapping[str, int]:
        """Wait for memory to be freed; return the bytes in use beyond the baseline and ``kept_bytes`` of each GPU."""

    def lack(self, share: float, kept_bytes: int = 0) -> bool:
        """Whether on any GPU less than this share is free; ``kept_bytes`` count as free."""


Sleeper = TypeVar("Sleeper", bound=LLM)


# D28: an evicted LLM can sleep on GPUs
class SleepMode(Generic[Sleeper]):
    """The sleeping LLMs of one engine host, oldest first. Use it in the host's event loop, under its lock.

    A sleeping LLM is ended, the oldest first, when

    * another LLM is to sleep and the budget is used up;
    * an LLM to be started needs the GPU memory that the sleeping one keeps;
    * the machine's memory runs short.
    """

    def __init__(self, budget_bytes: int, gpus: GPUs, end: Callable[[Sleeper], Awaitable[object]]) -> None:
        """``budget_bytes`` ≥ 0: host memory for the weights of sleeping LLMs; 0: no LLM sleeps.

        ``end`` kills an LLM, asleep or not, and returns when its processes are gone, even if cancelled.
        """
        self._budget_bytes = budget_bytes
        self._gpus = gpus
        self._end = end
        self._asleep: list[Sleeper] = []
        self._memory_watch: asyncio.Task[None] | None = None

    @property
    def allowed(self) -> bool:
        """Whether LLMs may sleep here at all."""
        return self._budget_bytes > 0

    @property
    def asleep(self) -> Sequence[Sleeper]:
        """The sleeping LLMs, oldest first."""
        return tuple(self._asleep)

    @property
    def kept_bytes(self) -> int:
        """GPU memory that the sleeping LLMs may keep on each GPU, bytes."""
        return RESIDUE_BYTES * len(self._asleep)

    async def lay_down(self, llm: Sleeper, *, spare: str | None = None) -> str | None:
        """Put a running, unused LLM to sleep. A cancelled call ends the LLM.

        Args:
            llm: The LLM.
            spare: Name of a sleeping LLM that must not be ended for it: the one wanted next.

        Returns:
            None if it sleeps and the GPU memory is free; else the reason why not, and the caller has to end it.
        """
        if not self.allowed:
            return "no LLM may sleep here"
        need = llm.weights_bytes
        if need is None:
            return "the size of its weights is unknown"
        if not self._gpus.known:
            return "the GPU memory in use before the first start is unknown"
        memory = main_memory()
        giving_way = who_gives_way(
            [other.weights_bytes or 0 for other in self._asleep],
            [other.served_model_name != spare for other in self._asleep],
            need,
            budget=self._budget_bytes,
            free=memory.available_bytes - int(HOST_RESERVE * memory.total_bytes),
        )
        if giving_way is None:
            return f"{need / 2**30:.1f} GiB of host memory are not free for it"
        try:
            await self._drop([self._asleep[at] for at in giving_way], f"{llm.served_model_name} sleeps in its place")
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                await llm.engine.sleep(level=1)
            excess = await self._gpus.excess(GPU_BACK_S, self.kept_bytes + RESIDUE_BYTES)
        except Exception as problem:
            return f"it did not fall asleep: {str(problem) or type(problem).__name__}"
        except asyncio.CancelledError:
            await self._end(llm)
            raise
        if excess:
            return "; ".join(f"{uuid} still holds {held / 2**30:.1f} GiB too much" for uuid, held in excess.items())
        self._asleep.append(llm)
        if self._memory_watch is None or self._memory_watch.done():
            self._memory_watch = spawn(
                "watch the memory while LLMs sleep", self._watch_memory(), on_failure=self._kill_unwatched
            )
        return None

    async def wake(self, llm: Sleeper) -> bool:
        """Wake a sleeping LLM; return whether it is awake. If that fails or is cancelled, the LLM is ended."""
        self._asleep.remove(llm)
        try:
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                awake = await llm.engine.wake_up()
        except Exception as problem:
            reason = str(problem) or type(problem).__name__
            log.warning("a sleeping LLM did not wake up", model=llm.served_model_name, reason=reason)
            awake = False
        except asyncio.CancelledError:
            await self._end(llm)
            raise
        if not awake:
            await self._end(llm)
        return bool(awake)

    async def make_room(self, share: float, waking: Sleeper | None = None) -> None:
        """End sleeping LLMs except ``waking``, oldest first, until this share (0 to 1) of every GPU is free.

        If ending all of them is not enough, nothing is reported.
        """
        own_bytes = 0 if waking is None else RESIDUE_BYTES
        for llm in self.asleep:
            if not self._gpus.lack(share, own_bytes):
                return
            if llm is not waking:
                await self._drop([llm], "the GPU memory that it keeps is needed")
                await self._gpus.excess(GPU_BACK_S, self.kept_bytes)

    async def forget(self, llm: Sleeper) -> None:
        """End a sleeping LLM that has died."""
        if llm in self._asleep:
            await self._drop([llm], "it died")

    async def close(self) -> None:
        """End all sleeping LLMs."""
        await self._drop(self.asleep, "everything is stopped")
        if self._memory_watch is not None:
            self._memory_watch.cancel()

    def relieve(self) -> None:
        """Kill the oldest sleeping LLM that still lives, if the machine's memory runs short."""
        memory = main_memory()
        if memory.available_bytes >= HOST_RESERVE * memory.total_bytes:
            return
        # A dead LLM stays in the list until the host's lock is free; a start may hold that lock for minutes.
        oldest = next((llm for llm in self._asleep if process_tree.alive(llm.processes)), None)
        if oldest is not None:
            reason = "too little main memory is free"
            log.warning("a sleeping LLM is killed", model=oldest.served_model_name, reason=reason)
            process_tree.kill(oldest.processes)

    def _kill_unwatched(self, error: BaseException) -> None:
        """Kill all sleeping LLMs, because without the watch nothing ends them when memory runs short."""
        for llm in self._asleep:
            reason = f"the memory check failed: {reason_of(error)}"
            log.error("a sleeping LLM is killed", model=llm.served_model_name, reason=reason)
            process_tree.kill(llm.processes)

    async def _watch_memory(self) -> None:
        while self._asleep:
            self.relieve()
            await asyncio.sleep(MEMORY_CHECK_S)

    async def _drop(self, llms: Iterable[Sleeper], why: str) -> None:
        for llm in llms:
            self._asleep.remove(llm)
            log.info("a sleeping LLM is ended", model=llm.served_model_name, reason=why)
            await self._end(llm)


def who_gives_way(
    sizes: Sequence[int], may_go: Sequence[bool], need: int, *, budget: int, free: int
) -> Sequence[int] | None:
    """Choose the sleeping LLMs to end for another one: the oldest first, as few as are enough.

    Args:
        sizes: Bytes of host memory of each, oldest first.
        may_go: For each, whether it may be ended.
        need: Bytes that the other one needs.
        budget: Bytes that all may use together.
        free: Bytes of the machine's memory that may still be used; negative if too much is in use.

    Returns:
        Their indices; None if ending all of them would not be enough, and then none should be ended.
    """
    gone: list[int] = []
    candidates = iter([index for index, may in enumerate(may_go) if may])
    while True:
        back = sum(sizes[index] for index in gone)
        if sum(sizes) - back + need <= budget and need <= free + back:
            return gone
        following = next(candidates, None)
        if following is None:
            return None
        gone.append(following)
