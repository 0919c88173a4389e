"""Limits how many answers one prompt may ask for: it counts as one prompt in flight, whatever it asks for."""

# D117: the number of answers to a prompt has a limit

from __future__ import annotations

from typing import Any, Final

from registry.errors import InvalidField

FIELDS: Final = ("n", "best_of")
"""Fields of OpenAI's and vLLM's APIs that say how many answers the engine makes, or how wide its beam search is."""

MOST_ANSWERS: Final = 128
"""Most answers to one prompt. Source: the limit of OpenAI's own API for ``n``. vLLM 0.32 allows 16,384."""


def require_few_answers(body: Any) -> None:
    """Raise InvalidField if a prompt's body asks for too many answers; names its field.

    vLLM would also take a number that is written as text, or with a fraction of zero. Those are refused.
    """
    if not isinstance(body, dict):
        return
    for field in FIELDS:
        value = body.get(field)
        if value is not None and not (isinstance(value, int) and value <= MOST_ANSWERS):
            raise InvalidField(field, f"must be a whole number, at most {MOST_ANSWERS}; send the prompt more than once")
