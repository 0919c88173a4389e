"""How many answers a prompt may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.wrapper.answer_count import FIELDS, MOST_ANSWERS, require_few_answers
from registry.errors import InvalidField


@pytest.mark.parametrize("body", [None, [], "text", {}, {"n": None}, {"n": 1}, {"n": MOST_ANSWERS}, {"top_n": 5000}])
def test_what_is_usual_passes(body: Any) -> None:
    """Only the number of answers is limited."""
    require_few_answers(body)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [MOST_ANSWERS + 1, 16384, 10**30, "16384", 16384.0, [5]])
def test_too_many_answers_are_refused(field: str, value: object) -> None:
    """Also numbers in forms that vLLM would read as such; the error names the field, the limit and what to do."""
    with pytest.raises(InvalidField, match=rf"^{field}: must be a whole number, at most 128; send the prompt more"):
        require_few_answers({"prompt": "Why?", field: value})
