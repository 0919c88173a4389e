"""How often a counter steps, as its poller sees it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import accumulate

_BIN_S = 0.005
_BINS = 400
_USUAL = 0.99
"""The usual time is this quantile of all times from an edge to the next but one."""


class UsualPeriod:
    """Statistics of the time from a counter's edge to the next edge but one.

    A window that begins just after an edge must last that long for the counter to prove some of its
    energy.
    """

    def __init__(self) -> None:
        self._edges_s: deque[float] = deque(maxlen=3)
        self._waits = [0] * _BINS
        self._waited = 0
        self._citable_s: float | None = None
        self._citable_at = 0

    def add(self, before_s: float, seen_s: float) -> None:
        """Note an edge, between two times that enclose it."""
        self._edges_s.append(before_s)
        if len(self._edges_s) == 3:  # only the third edge proves energy of a window that begins just after the first
            self._waits[min(int((seen_s - self._edges_s[0]) / _BIN_S), _BINS - 1)] += 1
            self._waited += 1

    def restart(self) -> None:
        """Note that the counter's history has a gap here; no time is measured across it."""
        self._edges_s.clear()

    @property
    def citable_s(self) -> float | None:
        """How long a window must be so that this counter proves some of its energy, wherever it begins, seconds.

        That is two of the counter's usual periods, as the poller sees them. None if not known yet.
        """
        if self._waited >= self._citable_at and self._waited:
            usual = bisect_left(list(accumulate(self._waits)), _USUAL * self._waited)
            self._citable_s = (usual + 1) * _BIN_S
            self._citable_at = self._waited + max(self._waited // 16, 1)
        return self._citable_s
