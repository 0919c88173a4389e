"""The prompts of a wrapper: when they began and ended, their tokens, and which of them were in flight together.

Prompts that are in flight together share what flows by the rates at which their tokens are processed. Once a rate has
gone into a figure that is kept it stays, also where it was only assumed: so the shares are one division of the whole.

Every prompt waits for its own parts, so what can be summed up when somebody comes or goes is. In lists: numpy's arrays
take longer for so few numbers as prompts are in flight, on a processor that has just done something else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import mul, sub
from typing import Literal, NamedTuple

from deployments.attribution import Parts
from deployments.lease_account import LeaseAccount

REMEMBERED_CHANGES = 16_384
"""Begins and ends of prompts that are kept at least, to share out the energy of those that they lie in."""


class Tokens(NamedTuple):
    """Tokens of a prompt, as vLLM counts them.

    ``cached`` are those of the prompt that were not computed again, None where vLLM does not say.
    """

    prompt: int
    cached: int | None
    output: int

    @property
    def processed(self) -> int:
        """Those that took energy, as far as is known."""
        return self.prompt - (self.cached or 0) + self.output


@dataclass(slots=True, eq=False)
class Flight:
    """One prompt, in the meter's clock. ``tokens`` and ``words`` are None until, and unless, they are known.

    ``rate_per_s`` is how many tokens a second were processed for it, None if that is not known, or not yet.
    ``begun_with`` and ``ended_with`` are the numbers of the changes that its begin and its end were, and ``company`` is
    how many were in flight, itself among them, when it ended.
    ``window_id`` is that of its record. ``status`` is answered, refused (by the engine, before anything was computed),
    cut (its lease ended, it took too long, or its client hung up) or failed.
    """

    start_s: float
    end_s: float | None = None
    endpoint: str = ""
    account: LeaseAccount | None = None
    tokens: Tokens | None = None
    words: int | None = None
    answer_id: str | None = None
    rate_per_s: float | None = None
    begun_with: int = 0
    ended_with: int = 0
    company: int = 1
    window_id: str = ""
    warmup: bool = False
    status: Literal["answered", "refused", "cut", "failed"] = "failed"


class Flights:
    """The prompts that are in flight, those that are not written down yet, and how they came and went."""

    def __init__(self) -> None:
        self.unwritten: deque[Flight] = deque()
        self._in_flight: dict[Flight, None] = {}
        self._unrated: dict[Flight, None] = {}
        """Of those in flight and those not written down: whose rate is not known. In the order in which they began."""
        self._rated_in_flight: dict[Flight, float] = {}
        self._times_s: list[float] = [-math.inf]
        """When prompts began and ended: the changes, and before them the last that is forgotten. From each to the next
        there is one place in the lists below."""
        self._count: list[int] = [0]
        self._known: list[int] = [0]
        """Of how many of those in flight the rate is known."""
        self._rates: list[float] = [0.0]
        """The sum of those."""
        self._forgotten = 0

    def __len__(self) -> int:
        """How many begins and ends of prompts are remembered."""
        return len(self._times_s) - 1

    def begin(self, flight: Flight) -> None:
        """It is in flight from now on."""
        self._in_flight[flight] = self._unrated[flight] = None
        flight.begun_with = self._changed(flight.start_s)

    def end(self, flight: Flight, at_s: float) -> bool:
        """It is over; False if it was before."""
        if flight.end_s is not None:
            return False
        flight.end_s = max(at_s, math.nextafter(flight.start_s, math.inf))
        del self._in_flight[flight]
        self._rated_in_flight.pop(flight, None)
        flight.company = 1 + len(self._in_flight)
        flight.ended_with = self._changed(flight.end_s)
        self._rate(flight)
        self.unwritten.append(flight)
        return True

    def counted(self, flight: Flight, tokens: Tokens) -> None:
        """Its tokens are known."""
        flight.tokens = tokens
        self._rate(flight)

    def company_has_ended(self, flight: Flight) -> bool:
        """Whether all prompts that were in flight with one that has ended have, too: rates are as known as they get."""
        oldest = next(iter(self._in_flight), None)
        return oldest is None or oldest.begun_with > flight.ended_with

    def _changed(self, time_s: float) -> int:
        """The number of this change."""
        self._times_s.append(time_s)
        self._count.append(len(self._in_flight))
        self._known.append(len(self._rated_in_flight))
        self._rates.append(sum(self._rated_in_flight.values()))
        if len(self) > 2 * REMEMBERED_CHANGES:
            self._forget(REMEMBERED_CHANGES)
        return self._forgotten + len(self)

    def _rate(self, flight: Flight) -> None:
        """Once its tokens and its end are known, so is its rate. One without any counts as one with a single token."""
        if flight.rate_per_s is None and flight.end_s is not None and flight.tokens is not None:
            self._rated(flight, max(flight.tokens.processed, 1) / (flight.end_s - flight.start_s))

    def _rated(self, flight: Flight, rate_per_s: float) -> None:
        flight.rate_per_s = rate_per_s
        del self._unrated[flight]
        if flight.end_s is None:
            self._rated_in_flight[flight] = rate_per_s
        known, rates = self._known, self._rates
        for index in range(*self._lay_between(flight)):
            known[index] += 1
            rates[index] += rate_per_s

    def _lay_between(self, flight: Flight) -> tuple[int, int]:
        """Where in the lists a prompt is that has ended, or that is in flight until now, as far as is remembered."""
        end = self._forgotten + len(self) + 1 if flight.end_s is None else flight.ended_with
        return max(flight.begun_with - self._forgotten, 0), max(end - self._forgotten, 0)

    def parts(self, flight: Flight, *, for_good: bool = False) -> tuple[Parts, bool]:
        """The parts of a prompt that has ended, and whether a rate was assumed for them.

        A rate that is not known is taken to be this prompt's, and this one's to be the mean of the others', over the
        time that they were known in. With ``for_good`` all of these rates stay what they are. What was forgotten is
        taken to have been as it was then; where that is all of it, as when the prompt ended, all at the same rate.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        first, last = self._lay_between(flight)
        forgotten = flight.begun_with < self._forgotten
        count = self._count[first:last]
        if not count:
            return Parts((flight.start_s, flight.end_s), (1 / flight.company,), (1 / flight.company,)), True
        if count == [1]:
            return Parts((flight.start_s, flight.end_s), (1.0,), (1.0,)), forgotten
        times_s = (flight.start_s, *self._times_s[first + 1 : last + 1])
        known, rates = self._known[first:last], self._rates[first:last]
        own = _mean(times_s, known, rates) if flight.rate_per_s is None else flight.rate_per_s
        assumed = forgotten or sum(known) < sum(count)
        by_tokens = [own / (rate + own * (all_ - of)) for rate, all_, of in zip(rates, count, known, strict=True)]
        by_time = [1 / all_ for all_ in count]
        if for_good and assumed:
            self._assume(flight, own)
        return Parts(times_s, by_tokens, by_time), assumed

    def _assume(self, flight: Flight, rate_per_s: float) -> None:
        """Let this be the rate of it, and of those beside it, whose own is not known."""
        for one in list(takewhile(lambda other: other.begun_with < flight.ended_with, self._unrated)):
            if one.end_s is None or one.ended_with > flight.begun_with:
                self._rated(one, rate_per_s)

    def written(self) -> None:
        """The first of those that were not written down is."""
        self._unrated.pop(self.unwritten.popleft(), None)

    def forget(self) -> None:
        """Forget what no prompt needs any more."""
        needed = min(
            (flight.begun_with for flights in (self._in_flight, self.unwritten) for flight in flights),
            default=self._forgotten + len(self) + 1,
        )
        self._forget(needed - 1 - self._forgotten)

    def _forget(self, changes: int) -> None:
        if changes > 0:
            for kept in (self._times_s, self._count, self._known, self._rates):
                del kept[:changes]
            self._forgotten += changes


def _mean(times_s: Sequence[float], known: Sequence[int], rates: Sequence[float]) -> float:
    """The mean of the rates that are known, over the time in which they are; 1 if there are none."""
    seconds = list(map(sub, times_s[1:], times_s))
    known_s = sum(map(mul, known, seconds))
    return sum(map(mul, rates, seconds)) / known_s if known_s > 0 else 1.0
