"""Makes engine processes sleep while no message is due, instead of polling all the time.

vLLM's readers poll without pause for a second after the last message. So one engine keeps two processors busy, and
where processors are few the process that takes prompts waits for them; all of it is measured as energy of prompts.
Messages come at similar intervals: the step times of a batch.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

SHORTEST_SLEEP_S = 0.0001
"""Shorter sleeps do not pay: waking up takes half of this."""
LONGEST_SLEEP_S = 0.01
"""Limits how late a message can be noticed because of a sleep."""
AWAKE_S = 0.1
"""After this time without a message, longer than most steps, poll every POLL_S."""
POLL_S = 0.0005
_REMEMBERED = 8


# D52: engines wait asleep
class Patience:
    """Decides how long one reader pauses between its checks for the next message.

    Call ``pause`` after a check without a message and ``came`` after one with a message. The first pause of a wait is
    half of the shortest recent wait, at most LONGEST_SLEEP_S, so that it ends before the message comes. If the message
    comes during that pause, the next waits, as many as are remembered, have no first pause.
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
        """Wait because no message is there yet."""
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
        """Record that the message is there."""
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
