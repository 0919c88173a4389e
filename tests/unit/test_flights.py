from __future__ import annotations

import pytest

from deployments import flights as flights_module
from deployments.attribution import Parts
from deployments.flights import Flight, Flights, Tokens


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
        assert flights.parts(flight) == (Parts((flight.start_s, flight.start_s + 2.0), (1.0,), (1.0,)), False)
    assert not flights.end(flying[0], 9.0)


def test_parts_change_with_those_who_come_and_go() -> None:
    """A part holds for as long as nobody comes or goes; of a prompt without tokens it is that of a single one."""
    flights = Flights()
    before, own = began(flights, 0.0), began(flights, 1.0)
    ended(flights, before, 2.0, 6)
    within = began(flights, 3.0)
    ended(flights, within, 4.0, 0)
    after = began(flights, 5.0)
    ended(flights, own, 6.0, 10)
    ended(flights, after, 7.0, 12)
    parts, assumed = flights.parts(own)
    assert parts.times_s == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert parts.by_tokens == pytest.approx([2 / 5, 1.0, 2 / 3, 1.0, 1 / 4])
    assert parts.by_time == pytest.approx([1 / 2, 1.0, 1 / 2, 1.0, 1 / 2])
    assert not assumed
    assert not parts.alone


def test_rates_that_are_not_known() -> None:
    """What is not known is assumed: others to be as fast as this one, this one as fast as the others."""
    flights = Flights()
    unknown, fast, own = (began(flights, 0.0) for _ in range(3))
    ended(flights, own, 1.0, 10)
    assert flights.parts(own) == (Parts((0.0, 1.0), [1 / 3], [1 / 3]), True)
    ended(flights, fast, 1.0, 30)
    ended(flights, unknown, 1.0)
    parts, assumed = flights.parts(unknown)
    assert parts.reserved_s == pytest.approx(20 / 60)
    assert assumed


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
    assert (parts.by_tokens, parts.by_time) == ((1 / 3,), (1 / 3,))  # it ended beside the two long ones


def test_rates_are_assumed_for_company_alone() -> None:
    """Those that are not known stay unknown where nobody has been beside them in a record."""
    flights = Flights()
    first, beside = began(flights, 0.0), began(flights, 0.5)
    ended(flights, first, 1.0, 10)
    ended(flights, beside, 1.5)
    later = began(flights, 2.0)
    ended(flights, later, 3.0)
    flights.parts(first, for_good=True)
    assert [flight.rate_per_s for flight in (first, beside, later)] == [10.0, 10.0, None]
    for flight in (first, beside, later):
        assert flights.unwritten[0] is flight
        flights.written()
