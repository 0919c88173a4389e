"""LLMs that sleep: their weights wait in host memory, and they are back on the GPUs in seconds.

vLLM's sleep mode at level 1. Level 2 would keep the process alone and read the weights from disk again when it wakes
(``reload_weights``): what that saves over a warm start is little, so an LLM that may not sleep at level 1 is stopped.
A sleeping LLM that has to go is killed; it has nothing to lose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import psutil

from deployments.machine import process_tree
from deployments.machine.memory import main_memory

SLEEP_TIMEOUT_S = 120.0
"""For copying the weights to host memory, or back: 100 GiB take half a minute, most of it for pinning the memory."""
GPU_BACK_S = 5.0
"""For the driver to have the memory of an LLM that has gone to sleep."""
RESIDUE_BYTES = 2 * 2**30
"""What a sleeping LLM may keep of a GPU's memory: its CUDA context, NCCL's buffers, CUDA graphs."""
HOST_RESERVE = 0.1
"""The share of the machine's memory, or of our control group's, that stays free, whatever the budget."""
MIND_S = 5.0
"""How often the machine's free memory is looked at while an LLM sleeps."""

_log = logging.getLogger(__name__)


class LLM(Protocol):
    """What an LLM has to have to sleep. ``weights_bytes``: what its weights take, None if not known."""

    engine: Any
    processes: frozenset[psutil.Process]
    served_model_name: str
    weights_bytes: int | None


class GPUs(Protocol):
    """The memory of the host's GPUs."""

    @property
    def known(self) -> bool:
        """Whether it can be read."""

    async def excess(self, timeout_s: float, kept_bytes: int = 0) -> Mapping[str, int]:
        """What GPUs hold beyond their base line and ``kept_bytes`` each, after waiting for it to go."""

    def lack(self, share: float, kept_bytes: int = 0) -> bool:
        """Whether less than this share of a GPU's memory is free, ``kept_bytes`` counted as free."""


Sleeper = TypeVar("Sleeper", bound=LLM)


class SleepMode(Generic[Sleeper]):
    """The LLMs of one engine host that sleep, oldest first. For its event loop, under its lock.

    The oldest ones give way: to a younger one that needs their share of the budget, to an LLM that needs what they keep
    of a GPU, and to whatever else on the machine needs memory.
    """

    def __init__(self, budget_bytes: int, gpus: GPUs, end: Callable[[Sleeper], Awaitable[object]]) -> None:
        """``budget_bytes`` ≥ 0: what weights may take of the host's memory; 0: no LLM sleeps.

        ``end`` kills an LLM, asleep or not, and returns when its processes are gone; cancelled, it does so first.
        """
        self._budget_bytes = budget_bytes
        self._gpus = gpus
        self._end = end
        self._asleep: list[Sleeper] = []
        self._mind: asyncio.Task[None] | None = None

    @property
    def allowed(self) -> bool:
        """Whether LLMs may sleep here at all."""
        return self._budget_bytes > 0

    @property
    def asleep(self) -> Sequence[Sleeper]:
        """Those that sleep, oldest first."""
        return tuple(self._asleep)

    @property
    def kept_bytes(self) -> int:
        """What the sleeping LLMs may keep of each GPU's memory."""
        return RESIDUE_BYTES * len(self._asleep)

    async def lay_down(self, llm: Sleeper, *, spare: str | None = None) -> str | None:
        """Put an LLM to sleep that runs and that nobody uses.

        Args:
            llm: The LLM.
            spare: Name of one that has not to give way to it: the LLM that is wanted next.

        Returns:
            None when it sleeps, and the GPUs have their memory back; else why it does not, and then it has to be ended.
            Cancelled, it ends the LLM.
        """
        if not self.allowed:
            return "no LLM may sleep here"
        need = llm.weights_bytes
        if need is None:
            return "what its weights take is not known"
        if not self._gpus.known:
            return "what the GPUs' memory is used for is not known"
        memory = main_memory()
        giving_way = who_gives_way(
            [other.weights_bytes or 0 for other in self._asleep],
            [other.served_model_name != spare for other in self._asleep],
            need,
            budget=self._budget_bytes,
            free=memory.available_bytes - int(HOST_RESERVE * memory.total_bytes),
        )
        if giving_way is None:
            return f"{need / 2**30:.1f} GiB of host memory are not to be had for it"
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
        if self._mind is None or self._mind.done():
            self._mind = asyncio.create_task(self._mind_memory(), name="mind the sleepers' memory")
        return None

    async def wake(self, llm: Sleeper) -> bool:
        """Wake one that sleeps; False when it could not, and then it is ended. Cancelled, it ends the LLM, too."""
        self._asleep.remove(llm)
        try:
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                awake = await llm.engine.wake_up()
        except Exception as problem:
            _log.warning("%s did not wake up: %s", llm.served_model_name, str(problem) or type(problem).__name__)
            awake = False
        except asyncio.CancelledError:
            await self._end(llm)
            raise
        if not awake:
            await self._end(llm)
        return bool(awake)

    async def make_room(self, share: float, waking: Sleeper | None = None) -> None:
        """Let sleeping LLMs go, oldest first, until an engine finds that share of every GPU free; not ``waking``."""
        own_bytes = 0 if waking is None else RESIDUE_BYTES
        for llm in self.asleep:
            if not self._gpus.lack(share, own_bytes):
                return
            if llm is not waking:
                await self._drop([llm], "what it keeps of a GPU is needed")
                await self._gpus.excess(GPU_BACK_S, self.kept_bytes)

    async def forget(self, llm: Sleeper) -> None:
        """One that sleeps has died: nothing of it stays."""
        if llm in self._asleep:
            await self._drop([llm], "it died")

    async def close(self) -> None:
        """End all that sleep."""
        await self._drop(self.asleep, "everything is stopped")
        if self._mind is not None:
            self._mind.cancel()

    def relieve(self) -> None:
        """Kill the oldest that lives when the machine's memory runs short; its death is told as any other is."""
        memory = main_memory()
        if memory.available_bytes >= HOST_RESERVE * memory.total_bytes:
            return
        # One that is dead stays among the sleepers until the host's lock is free, and a start may hold that for long.
        oldest = next((llm for llm in self._asleep if process_tree.alive(llm.processes)), None)
        if oldest is not None:
            _log.warning("%s sleeps no longer: the machine's memory runs short", oldest.served_model_name)
            process_tree.kill(oldest.processes)

    async def _mind_memory(self) -> None:
        while self._asleep:
            self.relieve()
            await asyncio.sleep(MIND_S)

    async def _drop(self, llms: Iterable[Sleeper], why: str) -> None:
        for llm in llms:
            self._asleep.remove(llm)
            _log.info("%s sleeps no longer: %s", llm.served_model_name, why)
            await self._end(llm)


def who_gives_way(
    sizes: Sequence[int], may_go: Sequence[bool], need: int, *, budget: int, free: int
) -> Sequence[int] | None:
    """Which of some sleeping LLMs make room for another, the fewest that do, oldest first.

    Args:
        sizes: Bytes of host memory of each, oldest first.
        may_go: Of each, whether it may give way.
        need: Bytes that the other one takes.
        budget: Bytes that all together may take.
        free: Bytes of the machine's memory that may still be taken; negative when too much is.

    Returns:
        Their indices; None when it would not be enough if all of them went, and then nobody should.
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
