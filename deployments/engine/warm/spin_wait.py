"""Makes engine processes sleep while no message is due, instead of polling all the time.

vLLM's readers poll without pause for a second after the last message, so one engine keeps two CPU
cores busy. On a machine with few cores, the process that takes prompts then has to wait for a core.
The polling is also measured as energy of prompts. Messages come at similar intervals, the step
times of a batch, so a reader can sleep for a part of the usual interval.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

SHORTEST_SLEEP_S = 0.0001
"""Shortest sleep, seconds. A shorter one saves nothing, because waking up takes half of this."""
LONGEST_SLEEP_S = 0.01
"""Longest sleep, seconds; a message is noticed later by this much at most."""
AWAKE_S = 0.1
"""After this time without a message, seconds, poll only every POLL_S. Most steps are shorter."""
POLL_S = 0.0005
"""Seconds between two polls after AWAKE_S."""
_REMEMBERED = 8


# D52: engines wait asleep
class Patience:
    """Decides how long one reader pauses between its checks for the next message.

    Call ``pause`` after a check without a message and ``came`` after one with a message.

    A wait begins with one sleep: half of the shortest of the last 8 waits, at most LONGEST_SLEEP_S.
    So it should end before the message comes. If the message comes during the sleep nevertheless,
    this counts as a wait of 0 s; then the next 8 waits begin without a sleep.
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
        """Begin a wait, unless one has begun; return its start time, monotonic seconds."""
        if self._since_s is None:
            self._since_s = self._clock()
        return self._since_s

    def pause(self) -> None:
        """Sleep, or yield the CPU, before the next check. Blocks up to LONGEST_SLEEP_S."""
        begins, since_s = self._since_s is None, self.begin()
        asleep_s = min(min(self._lately_s, default=0.0) / 2, LONGEST_SLEEP_S) if begins else 0.0
        self._overslept = asleep_s >= SHORTEST_SLEEP_S  # reset if another pause follows
        if self._overslept:
            self._sleep(asleep_s)
        elif self._clock() - since_s < AWAKE_S:
            self._give_way()
        else:
            self._sleep(POLL_S)

    def came(self) -> None:
        """End the wait, because the message is there, and remember how long it took."""
        waited_s = 0.0
        if self._since_s is not None and not self._overslept:
            waited_s = self._clock() - self._since_s
        self._since_s, self._overslept = None, False
        if waited_s < AWAKE_S:
            self._lately_s.append(waited_s)


def be_patient(condition: type[Any]) -> None:
    """Patch vLLM's ``SpinCondition`` so that readers of its shared memory pause by ``Patience`` instead of polling."""
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
