"""Who had a wrapper when: stretches that follow each other, of one holder each."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.energy.timeline import MOST_GAPS, STRETCH_S, Stretch, Timeline

steps = st.lists(
    st.tuples(st.sampled_from(["hand over", "nobody", "begin", "end", "cut", "pause", "resume"]), st.floats(-5, 200)),
    max_size=40,
)


@given(steps)
def test_stretches_leave_nothing_out(steps: list[tuple[str, float]]) -> None:
    """Stretches never overlap, what is between two of them was paused, and gaps lie inside their stretch."""
    line: Timeline[str] = Timeline(0.0)
    now_s = paused_s = in_flight = holders = 0.0
    paused_at_s: float | None = None
    for what, seconds in steps:
        now_s = max(now_s, now_s + seconds)
        if what == "begin":
            line.begin(now_s)
            in_flight += 1
        elif what == "end" and in_flight:
            line.end(now_s)
            in_flight -= 1
        elif what == "hand over":
            holders += 1
            line.hand_over(f"lease {holders}", now_s)
        elif what == "nobody":
            line.hand_over(None, now_s)
        elif what == "cut":
            line.cut(now_s)
        elif what == "pause" and paused_at_s is None and not in_flight:
            line.pause(now_s)
            paused_at_s = now_s
        elif what == "resume" and paused_at_s is not None and not in_flight:
            line.resume(now_s)
            paused_s += now_s - paused_at_s
            paused_at_s = None
    while in_flight:
        line.end(now_s)
        in_flight -= 1
    if paused_at_s is not None:
        line.resume(now_s)
        paused_s += now_s - paused_at_s
    line.hand_over("the last", now_s)
    stretches = list(line.closed)
    for stretch in stretches:
        assert stretch.start_s <= stretch.end_s
        assert stretch.start_s < stretch.end_s or stretch.last
        assert all(stretch.start_s <= a < b <= stretch.end_s for a, b in stretch.gaps)
        assert all(first[1] <= second[0] for first, second in pairwise(stretch.gaps))
    assert all(earlier.end_s <= later.start_s + 1e-9 for earlier, later in pairwise(stretches))
    total_s = sum(stretch.end_s - stretch.start_s for stretch in stretches)
    assert abs(total_s + paused_s - now_s) < 1e-6
    ended = [stretch.holder for stretch in stretches if stretch.last]
    assert len(ended) == len(set(ended))


def test_stretches_are_bounded() -> None:
    """A stretch ends after some minutes, and after so many prompts, though its holder stays."""
    line: Timeline[str] = Timeline(0.0)
    line.hand_over("a", 0.0)
    line.cut(STRETCH_S - 1)
    assert not line.closed
    line.cut(STRETCH_S)
    assert list(line.closed) == [Stretch("a", 0.0, STRETCH_S, ((0.0, STRETCH_S),), last=False)]
    for number in range(MOST_GAPS + 1):
        line.begin(STRETCH_S + number + 0.5)
        line.end(STRETCH_S + number + 0.6)
    assert len(line.closed) == 2
    assert len(line.closed[1].gaps) == MOST_GAPS
    assert line.holder == "a"


def test_what_is_open() -> None:
    """The stretch that goes on, and the time without a prompt in it, until now; nothing while an LLM is started."""
    line: Timeline[str] = Timeline(0.0)
    assert line.open(0.0) == ([], [])
    assert line.open(2.0) == ([(0.0, 2.0)], [(0.0, 2.0)])
    line.begin(3.0)
    assert line.open(4.0) == ([(0.0, 4.0)], [(0.0, 3.0)])
    line.end(5.0)
    line.pause(6.0)
    assert line.open(7.0) == ([], [])
