"""The prompts of a wrapper: when they began and ended, their tokens, and which of them were in flight together.

Prompts that are in flight together share what flows by the rates at which their tokens are processed, a prompt token
counting less than an output token, or more, by its weight. Once a rate has gone into a figure that is kept it stays,
also where it was only assumed: so the shares are one division of the whole. Their range is the hull of the divisions by
equal parts and by the weight's low and high, and of those in which prompts are computed one by one before their answers
are together; what is not known of a prompt can be anything.

Every prompt waits for its own parts, so what can be summed up when somebody comes or goes is. In lists: numpy's arrays
take longer for so few numbers as prompts are in flight, on a processor that has just done something else.
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

REMEMBERED_CHANGES = 16_384
"""Begins and ends of prompts that are kept at least, to share out the energy of those that they lie in."""


class Tokens(NamedTuple):
    """Tokens of a prompt, as vLLM counts them.

    ``cached`` are those of the prompt that were not computed again; None if that was not told.
    """

    prompt: int
    cached: int | None
    output: int

    @property
    def computed(self) -> int | None:
        """Tokens of the prompt that were computed; None if that was not told."""
        return None if self.cached is None else self.prompt - self.cached


class Rate(NamedTuple):
    """How many tokens a second were processed for a prompt.

    ``per_s`` is by the weight of that time, and is what its share goes by. Its range goes by the other three: prompt
    tokens that were certainly computed, those that may have been, and output tokens. ``told``: 1, or 0 where the rate
    was only assumed, and then those three are 0.
    """

    per_s: float
    computed: float = 0.0
    unsure: float = 0.0
    output: float = 0.0
    told: int = 0


@dataclass(slots=True)
class _Place:
    """What is in flight from one change to the next: how many prompts, of how many the rate is known, and its sums."""

    count: int = 0
    known: int = 0
    per_s: float = 0.0
    computed: float = 0.0
    unsure: float = 0.0
    output: float = 0.0
    told: int = 0
    tokens: int = 0
    arrived: int = 0
    """Prompt tokens of all that are in flight, and of those that begin here, as far as they are told."""

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
    """What a prompt had before a time, summed up: its shares, and with how many others it was in flight.

    ``until_with`` is the number of the change at that time.
    """

    until_s: float
    until_with: int
    shares: Shares
    most: int
    prompt_s: float


@dataclass(slots=True, eq=False)
class Flight:
    """One prompt, in the meter's clock. ``tokens`` and ``words`` are None until, and unless, they are known.

    ``rate`` is None if it is not known, or not yet.
    ``begun_with`` and ``ended_with`` are the numbers of the changes that its begin and its end were, and ``company`` is
    how many were in flight, itself among them, when it ended.
    ``window_id`` is that of its record, ``prompt_id`` the client's own name of the prompt. ``status`` is answered,
    refused (by the engine, before anything was computed), cut (its lease ended, it took too long, or its client hung
    up) or failed. ``had`` is the part of a long one that is summed up already.
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


class Flights:
    """The prompts that are in flight, those that are not written down yet, and how they came and went.

    ``weight`` is that of a prompt token, for its owner to set.
    """

    def __init__(self) -> None:
        self.weight: Weight = UNKNOWN
        self.unwritten: deque[Flight] = deque()
        self._in_flight: dict[Flight, None] = {}
        self._unrated: dict[Flight, None] = {}
        """Of those in flight and those not written down: whose rate is not known. In the order in which they began."""
        self._rated_in_flight: dict[Flight, Rate] = {}
        self._times_s: list[float] = [-math.inf]
        """When prompts began and ended: the changes, and before them the last that is forgotten. From each to the next
        there is one place in the list below."""
        self._places: list[_Place] = [_Place()]
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
        place = _Place(len(self._in_flight))
        for rate in self._rated_in_flight.values():
            place.add(rate)
        self._places.append(place)
        if len(self) > 2 * REMEMBERED_CHANGES:
            self._forget(REMEMBERED_CHANGES)
        return self._forgotten + len(self)

    def _rate(self, flight: Flight) -> None:
        """Once its tokens and its end are known, so is its rate. One without any counts as one with a single token."""
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
        """Where in the lists a prompt is that has ended, or that is in flight until now, as far as is remembered."""
        end = self._forgotten + len(self) + 1 if flight.end_s is None else flight.ended_with
        return max(flight.begun_with - self._forgotten, 0), max(end - self._forgotten, 0)

    def parts(self, flight: Flight, *, for_good: bool = False) -> tuple[Parts, bool]:
        """The parts of a prompt that has ended, after what is summed up, and whether a rate was assumed for them.

        A rate that is not known is taken to be this prompt's, and this one's to be the mean of the others', over the
        time that they were known in. With ``for_good`` all of these rates stay what they are. What was forgotten is
        taken to have been as it was then; where that is all of it, as when the prompt ended, all at the same rate.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        first, last = self._lay_between(flight)
        begin_s, begun_with = _not_summed(flight)
        forgotten = begun_with < self._forgotten
        places = self._places[first:last]
        if not places:
            least = 1.0 if flight.company == 1 else 0.0
            return Parts((begin_s, flight.end_s), (1 / flight.company,), (least,), (1.0,)), True
        if len(places) == 1 and places[0].count == 1:
            return Parts((begin_s, flight.end_s), (1.0,), (1.0,), (1.0,)), forgotten
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
        """The parts of a prompt of this rate, and the least and the most that they can be."""
        per_s = own.per_s
        mid = [per_s / (place.per_s + per_s * (place.count - place.known)) for place in places]
        low, high = _hull(own, mid, places, self.weight)
        if own.told:
            _one_by_one(flight, own, times_s, places, self.weight, low, high)
        return mid, low, high

    def sum_up(self, old_s: float, settled: Callable[[float], bool], shares: Callable[[Parts], Shares]) -> None:
        """Sum up what each prompt had before a time, and forget the changes before it.

        Changes stay as long as a rate that divides them is not known, up to `REMEMBERED_CHANGES`: then it is assumed,
        if the counters have ``settled`` there. ``shares`` tells what parts are of what flowed.
        """
        old = bisect_right(self._times_s, old_s) - 1
        unknown = (at for at, place in enumerate(self._places[: max(old, 0)]) if place.known < place.count > 1)
        old = next(unknown, old)
        many = len(self) - REMEMBERED_CHANGES
        if many > old and settled(self._times_s[many]):
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
            return  # a part of it is lost, and the rest can't be told from it
        places = self._places[first:last]
        times_s = (begin_s, *self._times_s[first + 1 : last + 1])
        found = shares(Parts(times_s, *self._divided(flight, flight.rate or Rate(1.0), times_s, places)))
        most, prompt_s = _counts(times_s, places)
        had = flight.had
        if had is not None:
            found, most, prompt_s = had.shares + found, max(most, had.most), had.prompt_s + prompt_s
        flight.had = Had(times_s[-1], self._forgotten + last, found, most, prompt_s)

    def in_flight(self, flight: Flight) -> tuple[int, float]:
        """How many prompts were in flight while one that has ended was: at most, and the mean over its time.

        What was forgotten is taken to have been as it was then.
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
        """Let this be the rate of it, and of those beside it, whose own is not known."""
        for one in list(takewhile(lambda other: other.begun_with < flight.ended_with, self._unrated)):
            if one.end_s is None or one.ended_with > flight.begun_with:
                self._rated(one, rate)

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
            del self._times_s[:changes], self._places[:changes]
            self._forgotten += changes


def _not_summed(flight: Flight) -> tuple[float, int]:
    """Since when nothing is summed up of a prompt, and the number of the change at that time."""
    return (flight.start_s, flight.begun_with) if flight.had is None else (flight.had.until_s, flight.had.until_with)


def _counts(times_s: Sequence[float], places: Sequence[_Place]) -> tuple[int, float]:
    """How many prompts were in flight at most, and their seconds in flight together."""
    lengths = zip(places, pairwise(times_s), strict=True)
    return max(place.count for place in places), sum(place.count * (end - begin) for place, (begin, end) in lengths)


def _mean(times_s: Sequence[float], places: Sequence[_Place]) -> float:
    """The mean of the rates that are known, over the time in which they are; 1 if there are none."""
    seconds = [end_s - start_s for start_s, end_s in pairwise(times_s)]
    known_s = sum(place.known * length_s for place, length_s in zip(places, seconds, strict=True))
    tokens = sum(place.per_s * length_s for place, length_s in zip(places, seconds, strict=True))
    return tokens / known_s if known_s > 0 else 1.0


def _hull(own: Rate, mid: Sequence[float], places: Sequence[_Place], weight: Weight) -> tuple[list[float], list[float]]:
    """The least and the most that a prompt's part is at each place, by these divisions and no others.

    That is the hull of the divisions by equal parts, by the weight's low and by its high, with the tokens that may have
    been cached counted and not. A prompt that has not told its tokens can have nothing or all. The weight is that of a
    prompt alone: n together share the cost of a step, so an output token may cost as little as an nth, and a prompt
    token weighs up to n times as much.
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
    """The least and the most of a place by this weight of a prompt token."""
    unsure = one * own.unsure
    least = one * own.computed + own.output
    all_least = one * (place.computed + place.unsure) + place.output - unsure
    all_most = one * place.computed + place.output + unsure
    return least / all_least if all_least > 0 else 1.0, (least + unsure) / all_most if all_most > 0 else 0.0


def _most_computed(flight: Flight) -> int:
    """Prompt tokens of a prompt that may have been computed; 0 if that is not told."""
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
    """Widen the range of a prompt's parts to where an engine computes prompts one by one, while all answers wait.

    A step of all answers costs no less than that of one alone, and every output token of a prompt takes one. So its own
    prompt tokens are at most such a part of what flows as they are of a prompt alone; and those of all that are in
    flight with it leave it at least its part of its own steps.
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
