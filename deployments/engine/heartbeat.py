"""Whether an engine still moves. It may hang or be stopped without any of its processes ending. Knows no vLLM.

An engine answers questions between two steps of its loop. So it is asked one every few seconds, off the path of the
prompts: an answer means that the loop turns. Three things are no life:

1. a process of it is stopped (SIGSTOP);
2. it does not answer: for ``stall_s``, since a step may take long, or for 6 s where no step can be the reason;
3. it answers, but no token comes for ``stall_s``, while it has prompts and none of them is so long that it is still
   being read: then each step of reading may take that long.

Only time in which the own event loop ran is counted, so that nobody else's pause is taken for the engine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import psutil

from deployments.machine import process_tree

BEAT_S = 2.0
"""How often an engine is looked at, seconds; twice as often as ``stall_s`` where that is shorter."""
_BEATS_STOPPED = 2
_BEATS_IDLE = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine has been given.

    ``calls`` grows with everything that is asked of it. ``tokens``: how many each prompt in flight has got, by its id.
    ``steps``: how many steps reading the longest of those takes that have got none yet; 0 when all have.
    """

    calls: int
    tokens: frozenset[tuple[str, int]] = frozenset()
    steps: int = 0


class Heartbeat:
    """Watches one engine. ``ask`` returns when it has answered, and raises if it can't any more."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[object]],
        work: Callable[[], Work],
        processes: Collection[psutil.Process],
        *,
        stall_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Do nothing yet; ``stall_s`` > 0 is the longest that a step may take, seconds."""
        self._ask = ask
        self._work = work
        self._processes = processes
        self._stall_s = stall_s
        self._sleep = sleep
        self._beat_s = min(BEAT_S, stall_s / 2)

    async def until_hung(self) -> str:
        """Return, as soon as the engine counts as hung, why it does. Cancel this to end watching."""
        question: asyncio.Future[object] | None = None
        try:
            asked, idle = self._work(), True
            silent_s = still_s = stopped_s = 0.0
            while True:
                work = self._work()
                if question is None or question.done():
                    # Whatever came before the question that was answered is over: only what came later can delay the
                    # next answer, and so can what was in flight, also if it has been given up since.
                    idle = not asked.tokens and work.calls == asked.calls
                    asked, silent_s = work, 0.0
                    question = asyncio.ensure_future(self._ask())
                await self._sleep(self._beat_s)
                stopped = process_tree.stopped(self._processes)
                stopped_s = stopped_s + self._beat_s if stopped else 0.0
                if stopped_s >= _BEATS_STOPPED * self._beat_s:
                    return f"process {min(process.pid for process in stopped)} was stopped (SIGSTOP)"
                silent_s += self._beat_s
                limit_s = min(_BEATS_IDLE * self._beat_s, self._stall_s) if idle else self._stall_s
                if question.done():
                    if (error := question.exception()) is not None:
                        return f"it can't be asked any more ({type(error).__name__}: {error})"
                elif silent_s >= limit_s:
                    return f"it has not answered for {silent_s:g} s"
                now = self._work()
                still_s = still_s + self._beat_s if now.tokens and now.tokens == work.tokens else 0.0
                if still_s >= self._stall_s * max(1, now.steps):
                    return f"none of its {len(now.tokens)} prompts has got a token for {still_s:g} s"
        finally:
            if question is not None:
                question.cancel()
