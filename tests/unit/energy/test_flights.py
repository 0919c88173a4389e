from __future__ import annotations

import pytest

from deployments.energy import flights as flights_module
from deployments.energy.attribution import Parts, Share, Shares
from deployments.energy.counters.history import Level
from deployments.energy.flights import Flight, Flights
from deployments.energy.token_weights import Weight
from deployments.tokens import Tokens


def began(flights: Flights, at_s: float) -> Flight:
    flight = Flight(at_s)
    flights.begin(flight)
    return flight


def ended(flights: Flights, flight: Flight, at_s: float, tokens: int | None = None) -> None:
    assert flights.end(flight, at_s)
    if tokens is not None:
        flights.counted(flight, Tokens(tokens, 0, 0))


def test_alone() -> None:
    """Prompts one after the other have all of their time, and nothing is assumed."""
    flights = Flights()
    flying = [Flight(1.0), Flight(3.0)]
    for flight in flying:
        flights.begin(flight)
        ended(flights, flight, flight.start_s + 2.0)
        parts = Parts((flight.start_s, flight.start_s + 2.0), (1.0,), (1.0,), (1.0,))
        assert flights.parts(flight) == (parts, False)
    assert not flights.end(flying[0], 9.0)


def test_parts_change_with_those_who_come_and_go() -> None:
    """A part holds for as long as nobody comes or goes; of a prompt without tokens it is that of a single one.

    Its range is that by equal time, by all tokens, and by output tokens only, of which there are none here. As prompts
    may be computed one by one it may have all. Of 28 tokens, those beside it and its own, it has at least the 6 that
    its 3 seconds with others are of its 10 tokens.
    """
    flights = Flights()
    flights.weight = Weight(0.0, 1.0, 1.0)
    before, own = began(flights, 0.0), began(flights, 1.0)
    ended(flights, before, 2.0, 6)
    within = began(flights, 3.0)
    ended(flights, within, 4.0, 0)
    after = began(flights, 5.0)
    ended(flights, own, 6.0, 10)
    ended(flights, after, 7.0, 12)
    parts, assumed = flights.parts(own)
    assert parts.times_s == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert parts.mid == pytest.approx([2 / 5, 1.0, 2 / 3, 1.0, 1 / 4])
    assert parts.low == pytest.approx([6 / 28, 1.0, 6 / 28, 1.0, 6 / 28])
    assert parts.high == pytest.approx([1.0, 1.0, 1.0, 1.0, 1.0])
    assert not assumed
    assert not own.alone


def test_rates_that_are_not_known() -> None:
    """What is not known is assumed: others to be as fast as this one, this one as fast as the others.

    The range says that it could be anything: nothing or all of it.
    """
    flights = Flights()
    flights.weight = Weight(1.0, 1.0, 1.0)
    unknown, fast, own = (began(flights, 0.0) for _ in range(3))
    ended(flights, own, 1.0, 10)
    assert flights.parts(own) == (Parts((0.0, 1.0), [1 / 3], [0.0], [1.0]), True)
    ended(flights, fast, 1.0, 30)
    ended(flights, unknown, 1.0)
    parts, assumed = flights.parts(unknown)
    assert parts.reserved_s == pytest.approx(20 / 60)
    assert (parts.reserved_low_s, parts.reserved_high_s) == (0.0, 1.0)
    assert assumed
    parts, _ = flights.parts(own)
    assert (parts.reserved_low_s, parts.reserved_high_s) == (0.0, 1.0)


def test_range_of_an_unknown_weight() -> None:
    """(810 + 150) and (3 + 150) tokens together: by equal time 1:1, by all tokens 6.27:1, by output tokens 1:1.

    The middle of the weight, 0.5, gives 555 to 151.5. Two share a step, so a prompt token weighs up to 2: 1770 of 1926
    for the large one. Computed one by one its prompt is up to 810 of 960, and it has half of the rest: 92.19 %. To the
    small one it leaves half of its 150 steps and its own 3 tokens, of 813 tokens and 150 steps.
    """
    flights = Flights()
    large, small = began(flights, 0.0), began(flights, 0.0)
    for flight, prompt in ((large, 810), (small, 3)):
        flights.end(flight, 1.0)
        flights.counted(flight, Tokens(prompt, 0, 150))
    parts = [flights.parts(flight)[0] for flight in (large, small)]
    assert [part.reserved_s for part in parts] == pytest.approx([555 / 706.5, 151.5 / 706.5])
    assert [part.reserved_low_s for part in parts] == pytest.approx([1 / 2, 78 / 963])
    assert [part.reserved_high_s for part in parts] == pytest.approx([1 / 2 + 810 / 960 / 2, 1 / 2 + 3 / 153 / 2])


def test_range_of_a_known_weight() -> None:
    """The same with a weight of 0.01 (0 to 0.02): 158.1 to 150.03.

    A prompt token weighs up to 0.04 where two share a step, 182.4 of 332.52; one by one it is 16.2 of 166.2 and half of
    the rest, 54.87 %. The small one has 75.06 of 166.26 at least.
    """
    flights = Flights()
    flights.weight = Weight(0.0, 0.01, 0.02)
    large, small = began(flights, 0.0), began(flights, 0.0)
    for flight, prompt in ((large, 810), (small, 3)):
        flights.end(flight, 1.0)
        flights.counted(flight, Tokens(prompt, 0, 150))
    parts = [flights.parts(flight)[0] for flight in (large, small)]
    assert [part.reserved_s for part in parts] == pytest.approx([158.1 / 308.13, 150.03 / 308.13])
    assert [part.reserved_low_s for part in parts] == pytest.approx([1 / 2, 75.06 / 166.26])
    assert [part.reserved_high_s for part in parts] == pytest.approx(
        [1 / 2 + 16.2 / 166.2 / 2, 1 / 2 + 0.06 / 150.06 / 2]
    )


def test_cached_tokens_that_are_not_told() -> None:
    """Of 100 prompt tokens all or none may have been cached.

    Beside them 100 prompt tokens were computed, and 10 came out; all tokens weigh the same. So the least is half of 10
    steps of a time of 200 prompt tokens and 10 steps, the most 100 of 110 and half of the rest.
    """
    flights = Flights()
    flights.weight = Weight(1.0, 1.0, 1.0)
    unsure, sure = began(flights, 0.0), began(flights, 0.0)
    for flight, cached in ((unsure, None), (sure, 0)):
        flights.end(flight, 1.0)
        flights.counted(flight, Tokens(100, cached, 10))
    parts = [flights.parts(flight)[0] for flight in (unsure, sure)]
    assert [part.reserved_s for part in parts] == pytest.approx([1 / 2, 1 / 2])
    assert [part.reserved_low_s for part in parts] == pytest.approx([5 / 210, 1 / 2])
    assert [part.reserved_high_s for part in parts] == pytest.approx([1 / 2 + 100 / 110 / 2] * 2)


def test_weight_that_changes_divides_once() -> None:
    """A prompt's share goes by the weight of when its rate was known: together they are always the whole."""
    flights = Flights()
    one, other = began(flights, 0.0), began(flights, 0.0)
    ended(flights, one, 1.0, 100)
    flights.weight = Weight(0.1, 0.1, 0.1)
    ended(flights, other, 1.0, 100)
    flights.weight = Weight(0.9, 0.9, 0.9)
    assert sum(flights.parts(flight)[0].reserved_s for flight in (one, other)) == pytest.approx(1.0)


def test_rate_that_went_into_a_record_stays() -> None:
    """Once assumed for good a rate does not change, so that the shares of all are the whole."""
    flights = Flights()
    own, slow = began(flights, 0.0), began(flights, 0.0)
    ended(flights, own, 1.0, 10)
    waited_for = flights.company_has_ended(own)
    first, _ = flights.parts(own, for_good=True)
    ended(flights, slow, 1.0, 1000)
    assert (waited_for, flights.company_has_ended(own)) == (False, True)
    second, assumed = flights.parts(slow)
    assert first.reserved_s + second.reserved_s == pytest.approx(1.0)
    assert not assumed


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came and went before the last so many changes is taken to have been as it was then, and is assumed."""
    monkeypatch.setattr(flights_module, "REMEMBERED_CHANGES", 10)
    flights = Flights()
    long, beside = began(flights, 0.0), began(flights, 0.0)
    short = Flight(0.0)
    for second in range(100):
        short = began(flights, second + 0.1)
        ended(flights, short, second + 0.6, 1)
        assert len(flights) <= 20
    ended(flights, long, 100.0, 200)
    ended(flights, beside, 100.0, 200)
    parts, assumed = flights.parts(long)
    assert assumed
    assert (parts.times_s[0], parts.times_s[-1]) == (0.0, 100.0)
    assert 0.4 < parts.reserved_s / 100 <= 0.5
    while flights.unwritten:
        flights.written()
    flights.forget()
    assert len(flights) == 0
    parts, assumed = flights.parts(short)
    assert assumed
    assert (parts.mid, parts.low, parts.high) == ((1 / 3,), (0.0,), (1.0,))  # it ended beside the two long ones


def test_rates_are_assumed_for_company_alone() -> None:
    """Those that are not known stay unknown where nobody has been beside them in a record."""
    flights = Flights()
    first, beside = began(flights, 0.0), began(flights, 0.5)
    ended(flights, first, 1.0, 10)
    ended(flights, beside, 1.5)
    later = began(flights, 2.0)
    ended(flights, later, 3.0)
    flights.parts(first, for_good=True)
    rates = [flight.rate and (flight.rate.per_s, flight.rate.told) for flight in (first, beside, later)]
    assert rates == [(5.0, 1), (5.0, 0), None]  # 10 prompt tokens, of half an output token each
    for flight in (first, beside, later):
        assert flights.unwritten[0] is flight
        flights.written()


def share_of(parts: Parts) -> Shares:
    """100 W until 50 s, 300 W from then on, by a counter that is exact."""
    joules = [100 * time_s + 200 * max(time_s - 50, 0) for time_s in parts.times_s]
    return Shares.of(parts, [[Level(j, j, j, provisional=False) for j in joules]])


def units_of(shares: Shares) -> float:
    [share] = shares.counters
    assert isinstance(share, Share)
    return share.units


def test_what_a_long_prompt_had_is_summed_up() -> None:
    """100 W for 50 s, then 300 W for 50 s: 20,000 J. Beside a long prompt one takes 10 to 20 s, one 60 to 70 s.

    Each is written down with half of its time, as the long one's rate is not known: 500 J and 1,500 J. So 18,000 J are
    left for the long one, also when what it had of the first 65 s was summed up and forgotten.
    """
    flights = Flights()
    long = began(flights, 0.0)
    others_j = []
    for begin_s in (10.0, 60.0):
        short = began(flights, begin_s)
        ended(flights, short, begin_s + 10, 10)
        parts, _ = flights.parts(short, for_good=True)
        others_j.append(units_of(share_of(parts)))
        flights.written()
        flights.sum_up(begin_s + 5, lambda _: True, share_of)
    assert len(flights) == 1  # the end of the second one
    ended(flights, long, 100.0, 1000)
    parts, _ = flights.parts(long)
    assert long.had is not None
    assert others_j == pytest.approx([500.0, 1500.0])
    assert units_of(long.had.shares + share_of(parts)) == pytest.approx(18_000.0)
    most, mean = flights.in_flight(long)
    assert most == 2
    assert mean == pytest.approx(1.2)


def test_rates_that_will_be_known_are_waited_for() -> None:
    """Two prompts of more than a minute: what they had is not divided before their tokens are known."""
    flights = Flights()
    one, other = began(flights, 0.0), began(flights, 1.0)
    began(flights, 2.0)
    flights.sum_up(90.0, lambda _: True, share_of)
    assert (one.had and one.had.until_s, other.had, len(flights)) == (1.0, None, 1)


def test_range_contains_a_prompt_that_is_computed_alone() -> None:
    """An engine computes prompts of 3000 and 10 tokens in 0.6 s at 650 W, then both decode 5 tokens in 0.1 s at 450 W.

    Alone a decode step of 20 ms at 450 W is 9 J, a prompt token 0.13 J: a weight of 0.0144. Of 436.3 J the large one
    truly has 390 + 22.5 = 412.5 J, the small one 1.3 + 22.5 = 23.8 J, 5.45 %. By the weight alone it was 5.14 of 53.3
    tokens: the small one would have had 9.6 % at least.
    """
    flights = Flights()
    flights.weight = Weight(0.0144, 0.0144, 0.0145)
    large, small = began(flights, 0.0), began(flights, 0.0)
    for flight, prompt in ((large, 3000), (small, 10)):
        flights.end(flight, 0.7)
        flights.counted(flight, Tokens(prompt, 0, 5))
    large_part, small_part = (flights.parts(flight)[0] for flight in (large, small))
    assert large_part.reserved_low_s / 0.7 <= 412.5 / 436.3 <= large_part.reserved_high_s / 0.7
    assert small_part.reserved_low_s / 0.7 <= 23.8 / 436.3 <= small_part.reserved_high_s / 0.7
