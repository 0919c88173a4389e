from collections.abc import Iterable
from itertools import pairwise

import pytest

from registry.core.decision import Limits
from registry.core.fit import Size
from registry.core.policy import Place, Turns, may_be_overtaken, rank, victim
from registry.core.records import LLMSpec, Measurement, Request, Wrapper
from registry.wire.words import Priority


def wrapper(wrapper_id: str, *, gpus: int = 0, machine_id: str = "m") -> Wrapper:
    return Wrapper(wrapper_id, machine_id, "http://w", gpus=gpus)


HERE, ELSEWHERE = Size(2, "H100", 80), Size(2, "A100", 40)


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        (Place(frozenset({HERE, ELSEWHERE})), True),
        (Place(frozenset({ELSEWHERE})), False),
        (Place(frozenset()), False),
        (Place(frozenset({HERE}), machine_id="m"), True),
        (Place(frozenset({HERE}), machine_id="other"), False),
        (Place(frozenset({HERE}), not_on=frozenset({"w"})), False),
        (Place(frozenset({HERE}), not_on=frozenset({"x"})), True),
    ],
)
def test_a_place_allows_exactly_the_wrappers_that_meet_all_its_conditions(place, allowed):
    """Size, machine and failures each rule a wrapper out."""
    assert place.allows(wrapper("w", gpus=2), HERE) is allowed


def test_rank_is_priority_then_arrival():
    """Inside a tenant a higher priority goes first, and equals go in order of arrival."""

    def ranked(measurement_id: int, arrival: int, priority: Priority = Priority.NORMAL) -> tuple[int, int, int]:
        request = Request(f"r{measurement_id}", measurement_id, arrival, LLMSpec("A", "t"), "{}")
        return rank(Measurement(measurement_id, 1, priority=priority), request)

    late_high, early, late, low = ranked(1, 9, Priority.HIGH), ranked(2, 1), ranked(3, 2), ranked(4, 0, Priority.LOW)
    assert sorted([low, late, early, late_high]) == [late_high, early, late, low]


@pytest.mark.parametrize(
    ("overtaken", "waited_s", "allowed"),
    [(0, 0.0, True), (3, 59.9, True), (4, 0.0, False), (0, 60.0, False)],
)
def test_a_request_is_overtaken_neither_too_often_nor_for_too_long(overtaken, waited_s, allowed):
    """Both bounds are exclusive: at the limit nobody goes before it any more."""
    request = Request("r", 1, 1, LLMSpec("A", "t"), "{}", overtaken=overtaken, created_s=100.0)
    assert may_be_overtaken(request, Limits(max_overtakes=4, max_overtake_s=60.0), 100.0 + waited_s) is allowed


HIGH, EARLY, LATE = (0, 9, 1), (1, 1, 2), (1, 2, 3)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ({}, "a"),
        ({"a": LATE}, "b"),
        ({"a": LATE, "b": LATE}, "c"),
        ({"a": EARLY, "b": LATE, "c": HIGH}, "b"),
        ({"a": HIGH, "b": EARLY, "c": EARLY}, "b"),
    ],
)
def test_the_victim_is_the_first_that_nobody_wants_else_the_one_wanted_last(wanted, chosen):
    """An LLM that somebody in the queue wants is given up only when there is no other, and the first in line last."""
    found = victim([wrapper("a"), wrapper("b"), wrapper("c")], lambda w: wanted.get(w.wrapper_id))
    assert found is not None
    assert found.wrapper_id == chosen


def test_no_candidates_no_victim():
    """Where nothing can be given up, nothing is."""
    assert victim([], lambda _: EARLY) is None


def waiting(*tenants: str, weights: Iterable[tuple[str, float]] = ()) -> Turns:
    """Turns of tenants that wait, in this order."""
    turns = Turns(weights)
    for tenant in tenants:
        turns.begin(tenant)
    return turns


def turns_taken(turns: Turns, tenants: list[str], count: int) -> list[str]:
    taken = []
    for _ in range(count):
        tenant = min(tenants, key=turns.key)
        turns.charge(tenant)
        taken.append(tenant)
    return taken


def test_tenants_of_equal_weight_alternate():
    """Nobody gets two turns in a row while somebody else asks."""
    taken = turns_taken(waiting("b", "a"), ["b", "a"], 10)
    assert all(one != other for one, other in pairwise(taken))


def test_turns_follow_weights():
    """Three times the weight, three times the turns."""
    taken = turns_taken(waiting("big", "small", weights=[("big", 3.0)]), ["big", "small"], 40)
    assert (taken.count("big"), taken.count("small")) == (30, 10)


def test_a_tenant_that_was_away_does_not_save_up_turns():
    """After a long absence a tenant is next after those who wait already, and then takes turns like everybody."""
    turns = waiting("busy", "away")
    turns.end("away")
    turns_taken(turns, ["busy"], 100)
    turns.begin("away")
    taken = turns_taken(turns, ["away", "busy"], 20)
    assert taken[:2] == ["busy", "away"]
    assert taken.count("busy") == 10


def test_new_names_do_not_go_first():
    """A tenant that waits is served before all who come after it, however many new names there are.

    By hand: "old" begins to wait at 0, its turn is at 1. Each new one that comes meanwhile has its turn at 1, too, and
    has waited less.
    """
    turns = waiting("first", "old")
    tenants = ["first", "old"]
    taken = []
    for n in range(10):
        turns.begin(f"new-{n}")
        tenants.append(f"new-{n}")
        (tenant,) = turns_taken(turns, tenants, 1)
        taken.append(tenant)
        turns.end(tenant)
        tenants.remove(tenant)
    assert taken[:3] == ["first", "old", "new-0"]


def test_leaving_and_coming_back_gains_nothing():
    """A tenant that stops waiting after each turn has as many as one that never does."""
    turns = waiting("stays", "leaves")
    taken = []
    for _ in range(20):
        (tenant,) = turns_taken(turns, ["stays", "leaves"], 1)
        taken.append(tenant)
        if tenant == "leaves":
            turns.end(tenant)
            turns.begin(tenant)
    assert taken.count("leaves") == 10
