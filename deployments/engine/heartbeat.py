"""Detects an engine that hangs or is stopped although all its processes exist. Does not depend on vLLM.

An engine answers calls between two steps of its loop. Every few seconds it gets a call that is independent of prompts;
an answer shows that the loop runs. An engine counts as hung when:

1. one of its processes is stopped (SIGSTOP);
2. it has not answered for ``stall_s`` while it has work (a step may take long), or for 6 s while it has none;
3. it answers, but no prompt in flight has got a token for ``stall_s``; while prompts are still in prefill, for
   ``stall_s`` times the steps that the longest prefill takes;
4. the call itself fails, or vLLM cancels it.

Only time in which our own event loop ran is counted, so that a pause of this process does not count against the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

import psutil

from deployments.machine import process_tree
from registry.background import spawn_awaited

BEAT_S = 2.0
"""Seconds between two checks of an engine; ``stall_s / 2`` if that is shorter."""
_BEATS_STOPPED = 2
_BEATS_IDLE = 3


@dataclass(frozen=True, slots=True)
class Work:
    """The current work of an engine.

    ``calls``: a counter of all calls to it. ``tokens``: for each prompt in flight its id and its number of generated
    tokens. ``steps``: steps that the longest pending prefill takes; 0 if none is pending.
    """

    calls: int
    tokens: frozenset[tuple[str, int]] = frozenset()
    steps: int = 0


# D23: an engine that does not move counts as dead
class Heartbeat:
    """Watches one engine. ``ask`` calls the engine, returns when it has answered, and raises if it can't."""

    def __init__(
        self,
        ask: Callable[[], Coroutine[Any, Any, object]],
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
        """Return the reason as soon as the engine counts as hung. Cancel this to end watching."""
        question: asyncio.Task[object] | None = None
        try:
            asked, idle = self._work(), True
            silent_s = still_s = stopped_s = 0.0
            while True:
                work = self._work()
                if question is None or question.done():
                    # The next answer may take long if prompts were in flight at the previous call, even if they were
                    # aborted since, or if other calls came after it. Otherwise the shorter limit applies.
                    idle = not asked.tokens and work.calls == asked.calls
                    asked, silent_s = work, 0.0
                    question = spawn_awaited("ask an engine", self._ask())
                await self._sleep(self._beat_s)
                stopped = process_tree.stopped(self._processes)
                stopped_s = stopped_s + self._beat_s if stopped else 0.0
                if stopped_s >= _BEATS_STOPPED * self._beat_s:
                    return f"process {min(process.pid for process in stopped)} was stopped (SIGSTOP)"
                silent_s += self._beat_s
                limit_s = min(_BEATS_IDLE * self._beat_s, self._stall_s) if idle else self._stall_s
                # Check this first: ``exception`` of a cancelled task raises, as if this watch had been cancelled.
                if question.cancelled():
                    return "it can't be asked any more (vLLM cancelled the call)"
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
