"""Divides a wrapper's time into successive stretches, each with one holder (a lease, or None). Pure.

At every moment a wrapper belongs to its holder (a lease, or None) or, while paused, to the start of an LLM. So sums
over stretches and starts count every moment exactly once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Interval = tuple[float, float]
Holder = TypeVar("Holder")

STRETCH_S = 300.0
"""Longest stretch, seconds. It is so short that the meter still has every edge when the window is computed."""
MOST_GAPS = 256
"""Most prompt-free times in one stretch. Then a new stretch begins, so that adding them up never takes long."""


@dataclass(frozen=True, slots=True)
class Stretch(Generic[Holder]):
    """An interval of one holder (None: no lease), with its prompt-free ``gaps``. ``last``: the holder has ended.

    Only a last stretch may be empty (end when it begins).
    """

    holder: Holder | None
    start_s: float
    end_s: float
    gaps: tuple[Interval, ...]
    last: bool


# D36: every moment is charged once
class Timeline(Generic[Holder]):
    """The stretches of a wrapper; the owner takes the finished ones from ``closed``. Times must not decrease.

    A holder with a prompt in flight stays until no prompt is in flight, even if the wrapper is handed over.
    """

    def __init__(self, now_s: float) -> None:
        self.closed: deque[Stretch[Holder]] = deque()
        self.holder: Holder | None = None
        self._next: list[Holder | None] = []
        self._start_s: float | None = now_s
        self._at_s = now_s
        self._gap_s = now_s
        self._gaps: list[Interval] = []
        self._in_flight = 0

    def hand_over(self, holder: Holder | None, at_s: float) -> None:
        """Give the wrapper to this holder from this time on, or from when no prompt is in flight any more."""
        if self._in_flight:
            self._next = [holder]
            return
        self._close(at_s, last=True)
        self.holder = holder

    def stay(self) -> None:
        """Keep the holder: cancel a hand-over that waits for its prompts."""
        self._next.clear()

    def begin(self, at_s: float) -> None:
        """Note that a prompt begins."""
        if not self._in_flight:
            self._end_gap(at_s)
        self._in_flight += 1

    def end(self, at_s: float) -> None:
        """Note that a prompt ends."""
        self._in_flight -= 1
        if self._in_flight:
            return
        self._gap_s = self._at_s = max(at_s, self._at_s)
        if self._next:
            self.hand_over(self._next.pop(), at_s)
        elif len(self._gaps) >= MOST_GAPS:
            self._close(at_s)

    def pause(self, at_s: float) -> None:
        """Note that the start of an LLM begins: from this time on the wrapper belongs to it."""
        self._close(at_s)
        self._start_s = None

    def resume(self, at_s: float) -> None:
        """Note that the start of the LLM is over."""
        self._start_s = self._gap_s = self._at_s = max(at_s, self._at_s)
        self._gaps.clear()

    def cut(self, now_s: float) -> None:
        """Close the open stretch if it is long."""
        if self._start_s is not None and now_s - self._start_s >= STRETCH_S:
            self._close(now_s)

    def open(self, now_s: float) -> tuple[list[Interval], list[Interval]]:
        """Return the holder's open stretch and its gaps until now; nothing while the wrapper is paused."""
        if self._start_s is None or now_s <= self._start_s:
            return [], []
        gap = [] if self._in_flight or now_s <= self._gap_s else [(self._gap_s, now_s)]
        return [(self._start_s, now_s)], [*self._gaps, *gap]

    def _end_gap(self, at_s: float) -> None:
        self._at_s = max(at_s, self._at_s)
        if self._start_s is not None and self._at_s > self._gap_s:
            self._gaps.append((self._gap_s, self._at_s))

    def _close(self, at_s: float, *, last: bool = False) -> None:
        if not self._in_flight:
            self._end_gap(at_s)
        end_s = self._at_s = max(at_s, self._at_s)
        start_s = end_s if self._start_s is None else self._start_s
        last = last and self.holder is not None
        if end_s > start_s or last:
            self.closed.append(Stretch(self.holder, start_s, end_s, tuple(self._gaps), last))
        self._gaps.clear()
        self._gap_s = end_s
        if self._start_s is not None:
            self._start_s = end_s
