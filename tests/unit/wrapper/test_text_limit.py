"""Texts that an LLM may have to read, and those that are too long for it."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.wrapper.text_limit import CHARS_PER_TOKEN, LEAST_CHARS, require_short_text
from registry.errors import InvalidField

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (2 * LEAST_CHARS)}}


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {"prompt": "x" * LEAST_CHARS},
        {"prompt": ["x" * (LEAST_CHARS // 2)] * 2, "suffix": "x" * LEAST_CHARS},
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "x" * 1000}]}]},
        {"prompt": [1] * LEAST_CHARS},
    ],
)
def test_what_is_usual_passes(body: Any) -> None:
    """A million characters pass for the shortest context; media and tokens are no text."""
    require_short_text(body, 512)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x" * (LEAST_CHARS + 1)}, "prompt"),
        ({"prompt": ["x" * LEAST_CHARS, "x"]}, "prompt"),
        (
            {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "x" * (LEAST_CHARS)}]}]},
            "messages",
        ),
    ],
)
def test_a_long_text_is_refused(body: Any, field: str) -> None:
    """The error names the field and the limit."""
    with pytest.raises(InvalidField, match=rf"^{field}: has 1\d{{6}} characters; at most {LEAST_CHARS} are read"):
        require_short_text(body, 512)


def test_a_long_context_allows_more() -> None:
    """The limit grows with the LLM's context."""
    tokens = LEAST_CHARS // 4
    require_short_text({"prompt": "x" * (CHARS_PER_TOKEN * tokens)}, tokens)
    with pytest.raises(InvalidField):
        require_short_text({"prompt": "x" * (CHARS_PER_TOKEN * tokens + 1)}, tokens)
