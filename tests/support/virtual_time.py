"""An event loop whose time is a number: when nobody can go on it jumps to the next timer. No sockets, no threads.

What runs on it is deterministic: the same program and the same seed make the same steps in the same order.
"""

from __future__ import annotations

import asyncio


class Stuck(AssertionError):
    """Nothing will ever happen any more, or time does not pass."""


# D43: the whole registry is simulated
class VirtualLoop(asyncio.BaseEventLoop):
    """Runs coroutines in virtual time, which starts at 0 s. More than ``most_steps`` in a second are a livelock."""

    def __init__(self, *, most_steps: int = 100_000) -> None:
        super().__init__()
        self._selector = self  # what BaseEventLoop waits with
        self._now_s = 0.0
        self._most_steps = most_steps
        self._steps = 0
        self._second = 0

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def select(self, timeout: float | None) -> list[object]:
        """Let ``timeout`` seconds pass; called when everything that could run has run, or (0) has a turn.

        Raises:
            Stuck: there is nothing to wait for, or this second never ends.
        """
        if timeout is None:
            raise Stuck("everybody waits for somebody else")
        self._now_s += timeout
        self._steps += 1
        if int(self._now_s) != self._second:
            self._second, self._steps = int(self._now_s), 0
        elif self._steps > self._most_steps:
            self._steps = 0  # who cleans up has some, too
            raise Stuck(f"time stands still at {self._now_s:.3f} s")
        return []

    def _process_events(self, event_list: list[object]) -> None:
        """There are no files to be ready."""

    def _write_to_self(self) -> None:
        """Nobody calls from another thread."""
