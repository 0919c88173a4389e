"""The indices by themselves, where no story of the allocator leads for certain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.core.decision import Limits
from registry.core.fit import Needs, Size
from registry.core.indices import Pool, Queue, RequestIndex
from registry.core.ledger import Ledger
from registry.core.policy import PRIORITY_TURNS, Place, Turns
from registry.core.records import LLMSpec, Machine, Measurement, Request, Wrapper
from registry.core.transitions import InvariantBroken
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene

SPEC = LLMSpec("a", "text-generation")
ONE_OR_TWO = frozenset({Size(1), Size(2)})


def test_the_smallest_wrapper_that_is_allowed_is_found() -> None:
    """Where the smallest wrapper has failed the LLM before, the next larger one is taken."""
    pool = Pool()
    for wrapper_id, gpus in (("small", 1), ("large", 2)):
        pool.add(Wrapper(wrapper_id, "m", "http://m", gpus=gpus), Size(gpus))
    assert pool.smallest(Place(ONE_OR_TWO)) == "small"
    assert pool.smallest(Place(ONE_OR_TWO, not_on=frozenset({"small"}))) == "large"
    assert pool.smallest(Place(ONE_OR_TWO, not_on=frozenset({"small", "large"}))) is None


def test_an_ended_request_leaves_the_index_as_it_was() -> None:
    """What was put in can be taken out again, also when it had ended and so was in few places only."""
    index, empty = RequestIndex(), RequestIndex()
    rank = (1, 1, 1)
    waiting = Request("r1", 1, 1, SPEC, "{}")
    ended = replace(waiting, request_id="r2", seq=2, status=RequestStatus.RELEASED)
    for request in (waiting, ended):
        index.add(request, Needs(), rank)
    index.remove(ended, Needs(), rank)
    assert [request_id for _, request_id in index.of[("default", 1)]] == ["r1"]
    index.remove(waiting, Needs(), rank)
    assert index.queued == empty.queued
    assert index.unfinished == empty.unfinished
    assert index.queued_count == 0


PLACE = Place(ONE_OR_TWO)


def served(queue: Queue) -> tuple[str, int]:
    """Who is next, and is served."""
    found = queue.next([PLACE])
    assert found is not None
    queue.charge(found[0])
    queue.put(found[0], None)
    return found[0]


def test_a_tenant_keeps_its_turn_while_its_place_changes() -> None:
    """Only who stops waiting and comes back waits from then on."""
    queue = Queue(Turns(()))
    queue.put(("a", 1), (PLACE, (1, 1, 1)))
    queue.put(("b", 1), (PLACE, (1, 2, 1)))
    queue.put(("a", 1), (PLACE, (0, 1, 1)))
    assert queue.contents() == {("a", 1): (PLACE, (0, 1, 1)), ("b", 1): (PLACE, (1, 2, 1))}
    assert served(queue) == ("a", 1)
    assert served(queue) == ("b", 1)
    assert queue.contents() == {}
    assert queue.next([]) is None


def test_the_line_is_of_those_who_wait_for_the_places() -> None:
    """Tenants in turn; one that waits only elsewhere is not in it."""
    elsewhere = Place(ONE_OR_TWO, machine_id="m")
    queue = Queue(Turns(()))
    for seq, (key, place) in enumerate(
        [(("a", 1), elsewhere), (("b", 1), PLACE), (("b", 2), PLACE), (("c", 1), PLACE)], start=1
    ):
        queue.put(key, (place, (1, seq, key[1])))
    assert list(queue.line([PLACE])) == [("b", 1), ("c", 1), ("b", 2)]
    assert list(queue.line([elsewhere])) == [("a", 1)]


def test_low_is_served_after_so_many_turns() -> None:
    """Of 9 turns of a tenant in a row one goes to its oldest, though more important ones never end.

    By hand: the low one came first. High ones are served 8 times, then the low one, then high ones again.
    """
    queue = Queue(Turns(()))
    queue.put(("t", 1), (PLACE, (2, 1, 1)))
    order = []
    for n in range(2, 14):
        queue.put(("t", n), (PLACE, (0, n, n)))
        order.append(served(queue)[1])
    assert order == [*range(2, 2 + PRIORITY_TURNS), 1, *range(10, 13)]


def test_a_measurement_that_keeps_adding_does_not_hold_the_line() -> None:
    """What is added later has its own place: behind those of the same tenant that came before it."""
    scene = Scene()
    scene.machine()
    scene.ask(1, "A", "B")
    scene.ask(2, "A")
    scene.hand_over()
    scene.ask(1, "C")
    scene.release("1a")
    scene.hand_over()
    scene.release("1b")
    assert scene.request_on("m-0") == "2a"


def test_writing_down_what_is_known_changes_nothing() -> None:
    """A request that is put again as it is causes no row to be written."""
    ledger = Ledger(Limits())
    ledger.put_machine(Machine("m", "n", "a"))
    ledger.put_measurement(Measurement(1, 1))
    request = Request("r", 1, 1, SPEC, "{}")
    ledger.put_request(request)
    ledger.take_decision()
    ledger.put_request(request)
    assert ledger.take_decision().changes.empty


def test_what_does_not_fit_together_is_told() -> None:
    """``check`` is no ornament: a lease without a wrapper that runs its LLM is found."""
    scene = Scene()
    ledger = scene.allocator._ledger
    ledger.wrappers["w"] = Wrapper("w", "m", "http://m", request_id="nobody")
    with pytest.raises(InvariantBroken, match="wrapper w"):
        scene.allocator.check()
