from __future__ import annotations

from deployments.energy.contention import Contention, at_once


def test_strangers_in_a_gap_of_the_poller_are_seen_in_all_of_it() -> None:
    """The poller stood still from 2 s to 13 s. CPU time tells of strangers since 2 s: in every window of the gap."""
    contention = Contention([lambda now_s: (now_s == 13.0, 2.0 if now_s == 13.0 else now_s)])
    for now_s in (0.0, 1.0, 2.0, 13.0):
        contention.look(now_s)
    assert not contention.found(0.0, 1.9)[0]
    assert all(contention.found(start_s, start_s + 0.5)[0] for start_s in (2.0, 4.1, 7.7, 12.4))
    assert not contention.found(14.5, 15.0)[0]


def test_gap_of_the_poller_is_not_known_to_what_tells_of_the_moment() -> None:
    """Who was on the GPU from 2 s to 13 s, in which nothing looked, can't be told; before and after it can."""
    contention = Contention([at_once(lambda now_s: False)])
    for now_s in (0.0, 1.0, 2.0, 13.0, 14.0, 15.0):
        contention.look(now_s)
    assert not contention.found(0.0, 1.9)[1]
    assert all(contention.found(start_s, start_s + 0.5)[1] for start_s in (2.0, 4.1, 7.7, 12.4))
    assert not contention.found(14.1, 15.0)[1]
    assert not contention.found(0.0, 15.0)[0]
