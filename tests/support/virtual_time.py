"""An event loop with virtual time: if no task can run, the time jumps to the next timer. No sockets, no threads.

Programs on it are deterministic: the same program and seed make the same steps in the same order.
"""

from __future__ import annotations

import asyncio


class Stuck(AssertionError):
    """No task can ever run again, or tasks run without end while the time stays the same."""


# D43: the whole registry is simulated
class VirtualLoop(asyncio.BaseEventLoop):
    """Runs coroutines in virtual time, from 0 s. More than ``most_steps`` steps in one second count as a livelock."""

    def __init__(self, *, most_steps: int = 100_000) -> None:
        super().__init__()
        self._selector = self  # BaseEventLoop calls its select() to wait
        self._now_s = 0.0
        self._most_steps = most_steps
        self._steps = 0
        self._second = 0

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def select(self, timeout: float | None) -> list[object]:
        """Let ``timeout`` seconds pass. Called when no task can run, or with 0 between two rounds of tasks.

        Raises:
            Stuck: There is nothing to wait for, or this second has too many steps.
        """
        if timeout is None:
            raise Stuck("no task can run, and no timer is set")
        self._now_s += timeout
        self._steps += 1
        if int(self._now_s) != self._second:
            self._second, self._steps = int(self._now_s), 0
        elif self._steps > self._most_steps:
            self._steps = 0  # the tasks that clean up may use steps, too
            raise Stuck(f"time stands still at {self._now_s:.3f} s")
        return []

    def _process_events(self, event_list: list[object]) -> None:
        """Do nothing: there are no files."""

    def _write_to_self(self) -> None:
        """Do nothing: no other thread calls this loop."""
