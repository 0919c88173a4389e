"""The prompts of a wrapper: when they began and ended, their tokens, and which of them were in flight together.

Prompts that are in flight together share what flows by the rates at which their tokens are processed. Once a rate has
gone into a figure that is kept it stays, also where it was only assumed: so the shares are one division of the whole.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from itertools import takewhile

from deployments.attribution import Prompt
from deployments.lease_account import LeaseAccount

REMEMBERED_PROMPTS = 1024
"""Ended prompts that are kept, to share out the energy of those they overlapped with."""
_STILL_RUNS_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Tokens:
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
    """One prompt, in the meter's clock. ``tokens`` and ``words`` are None until, and unless, they are known."""

    start_s: float
    end_s: float | None = None
    endpoint: str = ""
    account: LeaseAccount | None = None
    tokens: Tokens | None = None
    words: int | None = None
    answer_id: str | None = None
    rate_per_s: float | None = None

    @property
    def known_rate_per_s(self) -> float | None:
        """Tokens a second, None if that is not known, or not yet. One without any counts as one with a single token."""
        if self.rate_per_s is not None or self.end_s is None or self.tokens is None:
            return self.rate_per_s
        return max(self.tokens.processed, 1) / (self.end_s - self.start_s)


class Flights:
    """The prompts that are in flight, those that ended, and those among them that are not written down yet."""

    def __init__(self) -> None:
        self.unwritten: deque[Flight] = deque()
        self._in_flight: dict[Flight, None] = {}
        self._ended: deque[Flight] = deque(maxlen=REMEMBERED_PROMPTS)

    def begin(self, flight: Flight) -> None:
        """It is in flight from now on."""
        self._in_flight[flight] = None

    def end(self, flight: Flight, at_s: float) -> bool:
        """It is over; False if it was before."""
        if flight.end_s is not None:
            return False
        flight.end_s = max(at_s, math.nextafter(flight.start_s, math.inf))
        del self._in_flight[flight]
        self._ended.append(flight)
        self.unwritten.append(flight)
        return True

    def all_ended_beside(self, flight: Flight) -> bool:
        """Whether every prompt that shares with this one, which has ended, has ended, too."""
        assert flight.end_s is not None  # callers ask for ended ones
        return all(other.start_s >= flight.end_s for other in self._in_flight)

    def together(self, flight: Flight, *, for_good: bool = False) -> tuple[list[Prompt], bool]:
        """A prompt that has ended and all that were in flight with it, itself first; whether a rate was assumed.

        A rate that is not known is taken to be this prompt's, and this one's to be the mean of the others'.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        end_s = flight.end_s
        ended = takewhile(lambda other: (other.end_s or 0.0) > flight.start_s, reversed(self._ended))
        beside = [other for other in (*ended, *self._in_flight) if other is not flight and other.start_s < end_s]
        known = [rate for other in beside if (rate := other.known_rate_per_s) is not None]
        own = flight.known_rate_per_s
        assumed = own is None or len(known) < len(beside)
        default = own if own is not None else statistics.fmean(known) if known else 1.0
        prompts = []
        for one in (flight, *beside):
            rate = one.known_rate_per_s or default
            if for_good:
                one.rate_per_s = rate
            until_s = one.start_s + _STILL_RUNS_S if one.end_s is None else one.end_s
            prompts.append(Prompt(one.start_s, until_s, rate * (until_s - one.start_s)))
        return prompts, assumed and bool(beside)

    def forget(self) -> None:
        """Forget the prompts that no other one needs any more."""
        needed_s = min(
            (flight.start_s for flights in (self._in_flight, self.unwritten) for flight in flights), default=math.inf
        )
        while self._ended and (self._ended[0].end_s or 0.0) <= needed_s:
            self._ended.popleft()
