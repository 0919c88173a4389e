"""How an engine's processes wait for one another: asleep while nothing can have come yet, awake when it is about to.

vLLM's look for a message over and over, for a second after the last one. So an engine takes two processors for the
work of one, and where processors are few the process that takes the prompts waits for them; all of it is measured as
what prompts cost. Messages come at intervals that are much alike: those of the steps of a batch.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

SHORTEST_SLEEP_S = 0.0001
"""Shorter sleeps are not worth it: waking up takes half of that."""
LONGEST_SLEEP_S = 0.01
"""So that no message is late by more, whatever came before it."""
AWAKE_S = 0.1
"""Whoever waits for longer than the steps of most batches looks every POLL_S seconds only."""
POLL_S = 0.0005
_REMEMBERED = 8


class Patience:
    """How long one reader waits before it looks for its next message again; ``pause`` it is, until it ``came``.

    The first pause of a wait is half of the shortest of the last waits, LONGEST_SLEEP_S at most, so that it ends before
    the message comes. After one that did not there is none for as many waits as are remembered.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._give_way = give_way
        self._since_s: float | None = None
        self._overslept = False
        self._lately_s: deque[float] = deque(maxlen=_REMEMBERED)

    def begin(self) -> float:
        """A wait begins, unless it has; when it did."""
        if self._since_s is None:
            self._since_s = self._clock()
        return self._since_s

    def pause(self) -> None:
        """Nothing is there yet."""
        begins, since_s = self._since_s is None, self.begin()
        asleep_s = min(min(self._lately_s, default=0.0) / 2, LONGEST_SLEEP_S) if begins else 0.0
        self._overslept = asleep_s >= SHORTEST_SLEEP_S  # unless there is another pause
        if self._overslept:
            self._sleep(asleep_s)
        elif self._clock() - since_s < AWAKE_S:
            self._give_way()
        else:
            self._sleep(POLL_S)

    def came(self) -> None:
        """The message is there."""
        waited_s = 0.0
        if self._since_s is not None and not self._overslept:
            waited_s = self._clock() - self._since_s
        self._since_s, self._overslept = None, False
        if waited_s < AWAKE_S:
            self._lately_s.append(waited_s)


def be_patient(condition: type[Any]) -> None:
    """Let the readers of vLLM's shared memory, whose ``SpinCondition`` this is, wait so while they would look."""
    make, wait, record_read = condition.__init__, condition.wait, condition.record_read

    def patient_make(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.patience = Patience()

    def patient_wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() <= self.last_read + self.busy_loop_s:
            self.patience.pause()
        else:
            self.patience.begin()
            wait(self, timeout_ms)

    def patient_record_read(self: Any) -> None:
        record_read(self)
        self.patience.came()

    condition.__init__ = patient_make
    condition.wait = patient_wait
    condition.record_read = patient_record_read
