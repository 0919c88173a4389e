"""The indices by themselves, where no story of the allocator leads for certain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.fit import Needs, Size
from registry.indices import Pool, Queue, RequestIndex
from registry.ledger import Ledger
from registry.policy import Place, Turns
from registry.state import Limits, LLMSpec, Machine, Measurement, Request, RequestStatus, Wrapper
from registry.transitions import InvariantBroken
from tests.allocator_scene import Scene

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
        index.add(request, Needs(), "t", rank)
    index.remove(ended, Needs(), "t", rank)
    assert [request_id for _, request_id in index.of[("default", 1)]] == ["r1"]
    index.remove(waiting, Needs(), "t", rank)
    assert index.queued == empty.queued
    assert index.unfinished == empty.unfinished
    assert index.queued_count == 0


def test_a_tenant_that_waits_for_nothing_more_is_charged_all_the_same() -> None:
    """A grant counts for its tenant, whether more of its measurements wait or not."""
    turns = Turns(())
    queue = Queue(turns)
    before = turns.key("t")
    queue.charge("t")
    assert turns.key("t") > before
    queue.put(("t", 1), ("t", Place(ONE_OR_TWO), (1, 1, 1)))
    queue.charge("t")
    assert queue.contents() == {("t", 1): ("t", Place(ONE_OR_TWO), (1, 1, 1))}


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
