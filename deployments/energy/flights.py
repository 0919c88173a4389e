"""The prompts of a wrapper: when they began and ended, their tokens, and which were in flight together.

Prompts that are in flight together share the energy by the rates at which their tokens are
processed. A prompt token counts as much as its weight says, an output token as 1. A rate that was
used for a stored figure is fixed, even if it was assumed, so that the shares add up to the whole.
The energy is also divided in other ways: by equal parts, by the low and by the high of the weight,
and for an engine that computes prompts one by one before it generates their answers together. The
range of a share is from the least to the greatest of these results. The share of a prompt whose
tokens are unknown can be anything from 0 to 1.

Each answer waits until the parts of its prompt are computed, so the sums that they need are updated
whenever a prompt begins or ends. The sums are in lists: numpy's arrays are slower for so few
numbers with a cold cache.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal, NamedTuple

from deployments.energy.attribution import Parts, Shares
from deployments.energy.lease_account import LeaseAccount
from deployments.energy.token_weights import UNKNOWN, Weight
from deployments.tokens import Tokens

REMEMBERED_CHANGES = 16_384
"""At least this many starts and ends of prompts are kept, to divide the energy of the prompts that span them."""


class Rate(NamedTuple):
    """Tokens per second that were processed for a prompt.

    ``per_s`` uses the weight known at that time and gives the prompt's share. The next three give its range: prompt
    tokens that were certainly computed, those that may have been, and output tokens. ``told``: 1, or 0 if the rate was
    only assumed; then those three are 0.
    """

    per_s: float
    computed: float = 0.0
    unsure: float = 0.0
    output: float = 0.0
    told: int = 0


@dataclass(slots=True)
class _Place:
    """The time from one change to the next: prompts in flight, how many rates are known, and sums of the rates."""

    count: int = 0
    known: int = 0
    per_s: float = 0.0
    computed: float = 0.0
    unsure: float = 0.0
    output: float = 0.0
    told: int = 0
    tokens: int = 0
    arrived: int = 0
    """Known prompt tokens. ``tokens``: of all prompts in flight; ``arrived``: of those that begin here."""

    def add(self, rate: Rate) -> None:
        self.known += 1
        self.per_s += rate.per_s
        if rate.told:
            self.computed += rate.computed
            self.unsure += rate.unsure
            self.output += rate.output
            self.told += 1


@dataclass(frozen=True, slots=True)
class Had:
    """The finished sums of a long prompt, from its start to ``until_s``; earlier changes can then be forgotten.

    ``until_with`` is the number of the change at ``until_s``. ``shares`` are its shares, ``most``
    the maximum number of prompts in flight, ``prompt_s`` the sum of their seconds in flight.
    """

    until_s: float
    until_with: int
    shares: Shares
    most: int
    prompt_s: float


@dataclass(slots=True, eq=False)
class Flight:
    """One prompt; its times are in the meter's clock.

    ``tokens``, ``words`` and ``rate`` are None while unknown.

    ``begun_with`` and ``ended_with`` are the numbers of the changes at its start and its end.
    ``company`` is how many prompts were in flight when it ended, itself included. ``window_id`` is
    the id of its record, ``prompt_id`` the client's name for the prompt. ``status`` is answered,
    refused (by the engine, before anything was computed), cut (its lease ended, it took too long,
    or its client hung up) or failed. ``had`` has the sums of the first part of a long prompt, None
    if there are none.
    """

    start_s: float
    end_s: float | None = None
    endpoint: str = ""
    account: LeaseAccount | None = None
    tokens: Tokens | None = None
    words: int | None = None
    answer_id: str | None = None
    rate: Rate | None = None
    begun_with: int = 0
    ended_with: int = 0
    company: int = 1
    window_id: str = ""
    prompt_id: str | None = None
    warmup: bool = False
    status: Literal["answered", "refused", "cut", "failed"] = "failed"
    had: Had | None = None

    @property
    def alone(self) -> bool:
        """Whether it has ended, and no other prompt was in flight at any time in between."""
        return self.ended_with == self.begun_with + 1 and self.company == 1


class Flights:
    """The prompts that are in flight or not written yet, and the changes: starts and ends of prompts.

    ``weight`` is the weight of a prompt token; the owner sets it.
    """

    def __init__(self) -> None:
        self.weight: Weight = UNKNOWN
        self.unwritten: deque[Flight] = deque()
        self._in_flight: dict[Flight, None] = {}
        self._unrated: dict[Flight, None] = {}
        """Prompts in flight or not written whose rate is unknown, in the order in which they began."""
        self._rated_in_flight: dict[Flight, Rate] = {}
        self._times_s: list[float] = [-math.inf]
        """Times of the changes, after the time of the last forgotten one. ``_places`` has, at the same index, the
        `_Place` that begins at each of these times."""
        self._places: list[_Place] = [_Place()]
        self._forgotten = 0

    def __len__(self) -> int:
        """How many changes (starts and ends of prompts) are remembered."""
        return len(self._times_s) - 1

    def begin(self, flight: Flight) -> None:
        """Note that a prompt is in flight from now on."""
        self._in_flight[flight] = self._unrated[flight] = None
        flight.begun_with = self._changed(flight.start_s)

    def end(self, flight: Flight, at_s: float) -> bool:
        """Note that a prompt has ended. Idempotent; returns False if it had ended before."""
        if flight.end_s is not None:
            return False
        flight.end_s = max(at_s, math.nextafter(flight.start_s, math.inf))
        del self._in_flight[flight]
        self._rated_in_flight.pop(flight, None)
        flight.company = 1 + len(self._in_flight)
        flight.ended_with = self._changed(flight.end_s)
        if flight.alone:  # it gets all energy of its time, so it needs no rate
            del self._unrated[flight]
        else:
            self._rate(flight)
        self.unwritten.append(flight)
        return True

    def counted(self, flight: Flight, tokens: Tokens) -> None:
        """Note the tokens of a prompt."""
        flight.tokens = tokens
        if not flight.alone:
            self._rate(flight)

    def company_has_ended(self, flight: Flight) -> bool:
        """Whether all prompts that were in flight with an ended one have ended, too: their rates are final then."""
        oldest = next(iter(self._in_flight), None)
        return oldest is None or oldest.begun_with > flight.ended_with

    def _changed(self, time_s: float) -> int:
        """Add a change at this time; return its number."""
        self._times_s.append(time_s)
        place = _Place(len(self._in_flight))
        for rate in self._rated_in_flight.values():
            place.add(rate)
        self._places.append(place)
        last = len(self._times_s) - 1
        number = self._forgotten + last
        if last > 2 * REMEMBERED_CHANGES:
            self._forget(REMEMBERED_CHANGES)
        return number

    def _rate(self, flight: Flight) -> None:
        """Set a prompt's rate once its tokens and its end are known. Without any token, it counts as one token."""
        tokens = flight.tokens
        if flight.rate is not None or flight.end_s is None or tokens is None:
            return
        length_s = flight.end_s - flight.start_s
        computed = tokens.computed
        processed = self.weight.mid * (tokens.prompt if computed is None else computed) + tokens.output
        rate = Rate(
            per_s=max(processed, 1.0) / length_s,
            computed=(computed or 0) / length_s,
            unsure=tokens.prompt / length_s if computed is None else 0.0,
            output=tokens.output / length_s,
            told=1,
        )
        self._rated(flight, rate)

    def _rated(self, flight: Flight, rate: Rate) -> None:
        flight.rate = rate
        del self._unrated[flight]
        if flight.end_s is None:
            self._rated_in_flight[flight] = rate
        prompt = _most_computed(flight) if rate.told else 0
        first, last = self._lay_between(flight)
        for place in self._places[first:last]:
            place.add(rate)
            place.tokens += prompt
        if first < last and flight.begun_with >= self._forgotten:
            self._places[first].arrived += prompt

    def _lay_between(self, flight: Flight) -> tuple[int, int]:
        """Return the range of list indices (begin, end) that a prompt spans, until now if it is in flight."""
        end = self._forgotten + len(self) + 1 if flight.end_s is None else flight.ended_with
        return max(flight.begun_with - self._forgotten, 0), max(end - self._forgotten, 0)

    def parts(self, flight: Flight, *, for_good: bool = False) -> tuple[Parts, bool]:
        """Return an ended prompt's parts for the time that ``had`` does not cover, and whether a rate was assumed.

        Another prompt's unknown rate is assumed to be this prompt's. Its own, if unknown, is
        assumed to be the mean of the known rates, over the time in which they are known. With
        ``for_good`` the assumed rates become final. Times whose changes are forgotten are divided
        like the first remembered time. If all changes are forgotten, the parts are equal, among as
        many prompts as were in flight when this one ended.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        begin_s, begun_with = _not_summed(flight)
        if flight.alone:
            return Parts((begin_s, flight.end_s), (1.0,), (1.0,), (1.0,)), False
        first, last = self._lay_between(flight)
        forgotten = begun_with < self._forgotten
        places = self._places[first:last]
        if not places:
            return Parts((begin_s, flight.end_s), (1 / flight.company,), (0.0,), (1.0,)), True
        times_s = (begin_s, *self._times_s[first + 1 : last + 1])
        rate = Rate(_mean(times_s, places)) if flight.rate is None else flight.rate
        mid, low, high = self._divided(flight, rate, times_s, places)
        if forgotten:
            low[0], high[0] = 0.0, 1.0
        assumed = forgotten or any(place.known < place.count for place in places)
        if for_good and assumed:
            self._assume(flight, Rate(rate.per_s))
        return Parts(times_s, mid, low, high), assumed

    def _divided(
        self, flight: Flight, own: Rate, times_s: Sequence[float], places: Sequence[_Place]
    ) -> tuple[list[float], list[float], list[float]]:
        """Return the parts of a prompt of this rate, and the least and the most that they can be."""
        per_s = own.per_s
        mid = [per_s / (place.per_s + per_s * (place.count - place.known)) for place in places]
        low, high = _hull(own, mid, places, self.weight)
        if own.told:
            _one_by_one(flight, own, times_s, places, self.weight, low, high)
        return mid, low, high

    def sum_up(self, old_s: float, is_final: Callable[[float], bool], shares: Callable[[Parts], Shares]) -> None:
        """Add the shares of each prompt before ``old_s`` to its sums, and forget the changes before that time.

        A change is kept while the rate of a prompt in flight at that time is unknown. If more than
        `REMEMBERED_CHANGES` would be kept, the rate is assumed, provided that the counters' levels at that time
        are final. ``shares`` computes the shares from parts.
        """
        old = bisect_right(self._times_s, old_s) - 1
        unknown = (at for at, place in enumerate(self._places[: max(old, 0)]) if place.known < place.count > 1)
        old = next(unknown, old)
        many = len(self) - REMEMBERED_CHANGES
        if many > old and is_final(self._times_s[many]):
            old = many
        if self.unwritten:  # the last part of a prompt is left for its record
            old = min(old, self.unwritten[0].ended_with - 1 - self._forgotten)
        if old <= 0:
            return
        flights = [*self.unwritten, *self._in_flight]
        spans = [(flight, *self._lay_between(flight)) for flight in flights]
        needed = [(flight, first, min(last, old)) for flight, first, last in spans if first < min(last, old)]
        for flight, first, last in needed:
            if flight.rate is None and any(place.count > 1 for place in self._places[first:last]):
                self._rated(flight, Rate(_mean(self._times_s[first : last + 1], self._places[first:last])))
        for flight, first, last in needed:
            self._sum_up_one(flight, first, last, shares)
        self._forget(old)

    def _sum_up_one(self, flight: Flight, first: int, last: int, shares: Callable[[Parts], Shares]) -> None:
        begin_s, begun_with = _not_summed(flight)
        if begun_with < self._forgotten:
            return  # some of its changes are forgotten, so its sums would be incomplete
        places = self._places[first:last]
        times_s = (begin_s, *self._times_s[first + 1 : last + 1])
        found = shares(Parts(times_s, *self._divided(flight, flight.rate or Rate(1.0), times_s, places)))
        most, prompt_s = _counts(times_s, places)
        had = flight.had
        if had is not None:
            found, most, prompt_s = had.shares + found, max(most, had.most), had.prompt_s + prompt_s
        flight.had = Had(times_s[-1], self._forgotten + last, found, most, prompt_s)

    def in_flight(self, flight: Flight) -> tuple[int, float]:
        """Return how many prompts were in flight during an ended one: the most, and the mean over its time.

        Forgotten times count like the first remembered one.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        first, last = self._lay_between(flight)
        places = self._places[first:last]
        if not places:
            return flight.company, float(flight.company)
        most, prompt_s = _counts((_not_summed(flight)[0], *self._times_s[first + 1 : last + 1]), places)
        if flight.had is not None:
            most, prompt_s = max(most, flight.had.most), prompt_s + flight.had.prompt_s
        return most, prompt_s / (flight.end_s - flight.start_s)

    def _assume(self, flight: Flight, rate: Rate) -> None:
        """Let this be the rate of the prompt, and of those in flight with it, where their own is unknown."""
        for one in list(takewhile(lambda other: other.begun_with < flight.ended_with, self._unrated)):
            if one.end_s is None or one.ended_with > flight.begun_with:
                self._rated(one, rate)

    def written(self) -> None:
        """Note that the first of the unwritten prompts is written."""
        self._unrated.pop(self.unwritten.popleft(), None)

    def forget(self) -> None:
        """Forget the changes that no prompt needs any more."""
        needed = min(
            (flight.begun_with for flights in (self._in_flight, self.unwritten) for flight in flights),
            default=self._forgotten + len(self) + 1,
        )
        self._forget(needed - 1 - self._forgotten)

    def _forget(self, changes: int) -> None:
        if changes > 0:
            del self._times_s[:changes], self._places[:changes]
            self._forgotten += changes


def _not_summed(flight: Flight) -> tuple[float, int]:
    """Return the time up to which a prompt is summed up, at first its start, and the number of the change then."""
    return (flight.start_s, flight.begun_with) if flight.had is None else (flight.had.until_s, flight.had.until_with)


def _counts(times_s: Sequence[float], places: Sequence[_Place]) -> tuple[int, float]:
    """Return the maximum number of prompts in flight, and the sum of their seconds in flight."""
    lengths = zip(places, pairwise(times_s), strict=True)
    return max(place.count for place in places), sum(place.count * (end - begin) for place, (begin, end) in lengths)


def _mean(times_s: Sequence[float], places: Sequence[_Place]) -> float:
    """Return the mean of the known rates, over the time in which they are known; 1 if there are none."""
    seconds = [end_s - start_s for start_s, end_s in pairwise(times_s)]
    known_s = sum(place.known * length_s for place, length_s in zip(places, seconds, strict=True))
    tokens = sum(place.per_s * length_s for place, length_s in zip(places, seconds, strict=True))
    return tokens / known_s if known_s > 0 else 1.0


def _hull(own: Rate, mid: Sequence[float], places: Sequence[_Place], weight: Weight) -> tuple[list[float], list[float]]:
    """Return the least and the greatest part of a prompt at each place, over these divisions and no others.

    They are: ``mid``; equal parts; by the weight's low; by the weight's high. The last two are made with and without
    the tokens that may have been cached. The part of a prompt whose tokens are unknown can be anything from 0 to 1.

    The weight was learned from prompts that ran alone. n prompts together share the cost of a step, so an output token
    may cost as little as 1/n, and a prompt token may weigh up to n times as much.
    """
    if not own.told:
        return [0.0 if place.count > 1 else 1.0 for place in places], [1.0] * len(places)
    equal = [1 / place.count for place in places]
    lows, highs = [mid, equal], [mid, equal]
    for ones in ([weight.low] * len(places), [weight.high] * len(places), [weight.high * p.count for p in places]):
        by_one = [_by_weight(own, one, place) for one, place in zip(ones, places, strict=True)]
        lows.append([least for least, _ in by_one])
        highs.append([most for _, most in by_one])
    low = [least if place.told == place.count else 0.0 for least, place in zip(map(min, *lows), places, strict=True)]
    return low, list(map(max, *highs))


def _by_weight(own: Rate, one: float, place: _Place) -> tuple[float, float]:
    """Return the least and the greatest part at a place by this weight of a prompt token."""
    unsure = one * own.unsure
    least = one * own.computed + own.output
    all_least = one * (place.computed + place.unsure) + place.output - unsure
    all_most = one * place.computed + place.output + unsure
    return least / all_least if all_least > 0 else 1.0, (least + unsure) / all_most if all_most > 0 else 0.0


def _most_computed(flight: Flight) -> int:
    """Return the prompt tokens that may have been computed; 0 if unknown."""
    tokens = flight.tokens
    if tokens is None:
        return 0
    return tokens.prompt if tokens.computed is None else tokens.computed


def _one_by_one(
    flight: Flight,
    own: Rate,
    times_s: Sequence[float],
    places: Sequence[_Place],
    weight: Weight,
    low: list[float],
    high: list[float],
) -> None:
    """Widen the range of a prompt's parts for an engine that computes prompts one by one, while all answers wait.

    A step for all answers costs no less than a step for one, and every output token of a prompt takes one step. So a
    prompt's own prompt tokens take at most the part of the energy that they take when it runs alone. Even if the prompt
    tokens of all prompts are computed while it is in flight, it gets at least its part of the steps of its answer.
    """
    seconds = [end_s - start_s for start_s, end_s in pairwise(times_s)]
    shared_s = sum(length_s for place, length_s in zip(places, seconds, strict=True) if place.count > 1)
    if shared_s <= 0:
        return
    most = max(place.count for place in places)
    steps = own.output * shared_s
    prompts = places[0].tokens + sum(place.arrived for place in places[1:])
    prefill = weight.high * _most_computed(flight)
    part = prefill / (prefill + steps) if prefill + steps > 0 else 0.0
    extra = part * (1 - 1 / most) * sum(seconds) / shared_s
    computed = own.computed * shared_s
    leasts = [
        (one * computed + steps / most) / all_
        for one in (weight.low, weight.high)
        if (all_ := one * prompts + steps) > 0
    ]
    for index, place in enumerate(places):
        if place.count > 1:
            low[index] = min([low[index], *leasts])
            high[index] = min(max(high[index], 1 / place.count + extra), 1.0)
