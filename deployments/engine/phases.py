"""The phases of an LLM's start, and how long each takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import StrEnum


class Phase(StrEnum):
    """The phases of an LLM's start.

    In a cold start the engine announces neither its warm-up nor its compilation. So LOADING lasts
    until the engine runs, and WARMING_UP is only the first answer.
    """

    IMPORTING = "importing"  # vLLM itself, once per wrapper
    CONFIGURING = "configuring"  # the LLM's configuration and tokenizer
    WAKING = "waking"  # if the LLM slept: instead of CONFIGURING and LOADING
    LOADING = "loading"  # its weights
    WARMING_UP = "warming_up"  # KV cache, first run, first answer
    COMPILING = "compiling"  # within the warm-up, once for each part that must be compiled
    READY = "ready"


class PhaseClock:
    """Reports each phase when it begins and measures how long it takes. Use it in the event loop."""

    def __init__(self, on_phase: Callable[[Phase], object]) -> None:
        """Measure nothing yet; ``took_s`` holds the seconds of each completed phase."""
        self.phase: Phase | None = None
        self.took_s: dict[str, float] = {}
        self._on_phase = on_phase
        self._since_s = 0.0

    def enter(self, phase: Phase) -> None:
        """End the current phase and begin this one. Idempotent."""
        if phase is self.phase:
            return
        now_s = time.monotonic()
        if self.phase is not None:
            self.took_s[self.phase.value] = self.took_s.get(self.phase.value, 0.0) + now_s - self._since_s
        self.phase, self._since_s = phase, now_s
        self._on_phase(phase)

    def enter_threadsafe(self) -> Callable[[Phase], object]:
        """Return ``enter`` for use in another thread."""
        loop = asyncio.get_running_loop()
        return lambda phase: loop.call_soon_threadsafe(self.enter, phase)

    async def follow(self, phases: Callable[[], Sequence[Phase]]) -> None:
        """Enter the phases that engine processes announce, until cancelled."""
        seen = 0
        while True:
            announced = phases()
            for phase in announced[seen:]:
                self.enter(phase)
            seen = len(announced)
            await asyncio.sleep(0.05)
