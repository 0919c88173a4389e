"""Which machines run other versions than the others."""

from __future__ import annotations

import pytest

from registry.service.version_skew import differing_versions, joined


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, {}),
        ({"a": {"vllm": "1"}}, {"a": []}),
        ({"a": {"vllm": "1"}, "b": {"vllm": "1"}}, {"a": [], "b": []}),
        (
            {"a": {"vllm": "1"}, "b": {"vllm": "2"}},
            {"a": ["vllm 1, elsewhere 2"], "b": ["vllm 2, elsewhere 1"]},
        ),
        (
            {"a": {"vllm": "1"}, "b": {"vllm": "2"}, "c": {"vllm": "2"}},
            {"a": ["vllm 1, elsewhere 2"], "b": [], "c": []},
        ),
        (
            {"a": {"v": "1"}, "b": {"v": "2"}, "c": {"v": "3"}, "d": {"v": "3"}},
            {
                "a": ["v 1, elsewhere 3, 2"],
                "b": ["v 2, elsewhere 3, 1"],
                "c": ["v 3, elsewhere 1, 2"],
                "d": ["v 3, elsewhere 1, 2"],
            },
        ),
        ({"a": {"ray": "1", "driver": "7"}, "b": {"ray": "1"}, "c": {}}, {"a": [], "b": [], "c": []}),
    ],
    ids=["nobody", "one", "alike", "one of two", "one of three", "no majority", "not everywhere"],
)
def test_what_most_have_is_usual(versions: dict[str, dict[str, str]], expected: dict[str, list[str]]) -> None:
    """Who has what more than half have does not differ, all others do; what one does not have is no difference."""
    assert differing_versions(versions) == expected


def test_wrappers_of_a_machine_may_differ() -> None:
    """A machine on which both versions run has both, so it is like none of the others."""
    both = joined([{"vllm": "2", "ray": "1"}, {"vllm": "1"}])
    assert both == {"vllm": "1 and 2", "ray": "1"}
    assert differing_versions({"a": both, "b": {"vllm": "2"}, "c": {"vllm": "2"}})["a"] == ["vllm 1 and 2, elsewhere 2"]
    assert joined([]) == {}
