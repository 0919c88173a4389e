"""The prompts of a wrapper: when they began and ended, their tokens, and which of them were in flight together.

Prompts that are in flight together share what flows by the rates at which their tokens are processed. Once a rate has
gone into a figure that is kept it stays, also where it was only assumed: so the shares are one division of the whole.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from deployments.attribution import Parts
from deployments.lease_account import LeaseAccount

REMEMBERED_CHANGES = 16_384
"""Begins and ends of prompts that are kept at least, to share out the energy of those that they lie in."""


class Tokens(NamedTuple):
    """Tokens of a prompt, as vLLM counts them; ``cached`` are those of the prompt that were not computed again."""

    prompt: int
    cached: int
    output: int

    @property
    def processed(self) -> int:
        """Those that took energy."""
        return self.prompt - self.cached + self.output


@dataclass(slots=True, eq=False)
class Flight:
    """One prompt, in the meter's clock. ``tokens`` and ``words`` are None until, and unless, they are known.

    ``rate_per_s`` is how many tokens a second were processed for it, None if that is not known, or not yet.
    ``outlived_by`` are the prompts that were in flight when it ended; ``begun_with`` and ``ended_with`` the numbers of
    the changes that it was.
    """

    start_s: float
    end_s: float | None = None
    endpoint: str = ""
    account: LeaseAccount | None = None
    tokens: Tokens | None = None
    words: int | None = None
    answer_id: str | None = None
    rate_per_s: float | None = None
    outlived_by: tuple[Flight, ...] = ()
    begun_with: int = 0
    ended_with: int = 0

    def counted(self, tokens: Tokens) -> None:
        """Its tokens are known."""
        self.tokens = tokens
        self.rate()

    def rate(self) -> None:
        """Once its tokens and its end are known, so is its rate. One without any counts as one with a single token."""
        if self.rate_per_s is None and self.end_s is not None and self.tokens is not None:
            self.rate_per_s = max(self.tokens.processed, 1) / (self.end_s - self.start_s)

    @property
    def company_has_ended(self) -> bool:
        """Whether all prompts that were in flight with it have ended, so that their rates are as known as they get."""
        return all(other.end_s is not None for other in self.outlived_by)


class _Change(NamedTuple):
    """A prompt begins, or is over."""

    time_s: float
    flight: Flight
    begins: bool


class Flights:
    """The prompts that are in flight, those that are not written down yet, and how they came and went."""

    def __init__(self) -> None:
        self.unwritten: deque[Flight] = deque()
        self._in_flight: dict[Flight, None] = {}
        self._changes: list[_Change] = []
        self._forgotten = 0

    def __len__(self) -> int:
        """How many begins and ends of prompts are remembered."""
        return len(self._changes)

    def begin(self, flight: Flight) -> None:
        """It is in flight from now on."""
        self._in_flight[flight] = None
        flight.begun_with = self._changed(_Change(flight.start_s, flight, begins=True))

    def end(self, flight: Flight, at_s: float) -> bool:
        """It is over; False if it was before."""
        if flight.end_s is not None:
            return False
        flight.end_s = max(at_s, math.nextafter(flight.start_s, math.inf))
        del self._in_flight[flight]
        flight.rate()
        flight.outlived_by = tuple(self._in_flight)
        flight.ended_with = self._changed(_Change(flight.end_s, flight, begins=False))
        self.unwritten.append(flight)
        return True

    def _changed(self, change: _Change) -> int:
        """The number of this change."""
        self._changes.append(change)
        if len(self._changes) > 2 * REMEMBERED_CHANGES:
            self._forget(REMEMBERED_CHANGES)
        return self._forgotten + len(self._changes) - 1

    def parts(self, flight: Flight, *, for_good: bool = False) -> tuple[Parts, bool]:
        """The parts of a prompt that has ended, and whether a rate was assumed for them.

        A rate that is not known is taken to be this prompt's, and this one's to be the mean of the others'. With
        ``for_good`` all of these rates stay what they are.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        first, last = flight.begun_with + 1 - self._forgotten, flight.ended_with - self._forgotten
        changes = self._changes[max(first, 0) : max(last, 0)][::-1]
        if not changes and not flight.outlived_by:
            return Parts((flight.start_s, flight.end_s), (1.0,), (1.0,)), first < 0
        beside = {*flight.outlived_by, *(change.flight for change in changes)}
        known = [rate for other in beside if (rate := other.rate_per_s) is not None]
        own = flight.rate_per_s
        assumed = first < 0 or own is None or len(known) < len(beside)
        if own is None:
            own = statistics.fmean(known) if known else 1.0
        if for_good:
            for one in (flight, *beside):
                one.rate_per_s = one.rate_per_s or own
        # Backwards from its end, because then it is known who was there. One loop: every prompt waits for it.
        rates, count = own + sum(other.rate_per_s or own for other in flight.outlived_by), 1 + len(flight.outlived_by)
        times_s, by_tokens, by_time = [flight.end_s], [own / rates if count > 1 else 1.0], [1 / count]
        for time_s, other, begins in changes:
            more = -1 if begins else 1
            rates += more * (other.rate_per_s or own)
            count += more
            times_s.append(time_s)
            by_tokens.append(own / rates if count > 1 else 1.0)
            by_time.append(1 / count)
        times_s.append(flight.start_s)
        return Parts(tuple(times_s[::-1]), by_tokens[::-1], by_time[::-1]), assumed

    def forget(self) -> None:
        """Forget what no prompt needs any more."""
        needed = min(
            (flight.begun_with for flights in (self._in_flight, self.unwritten) for flight in flights),
            default=self._forgotten + len(self._changes),
        )
        self._forget(needed - self._forgotten)

    def _forget(self, changes: int) -> None:
        if changes > 0:
            del self._changes[:changes]
            self._forgotten += changes
