"""Grammars that a prompt may ask for, and those that are too large."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.wrapper.structured_output import FIELDS, MAX_BYTES, MAX_REGEX, require_small_grammars
from registry.errors import InvalidField

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "pattern": "[a-z]+"}}}


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "text",
        {},
        {"response_format": None},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"structured_outputs": {"regex": "x" * MAX_REGEX}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]},
        {"prompt": "x" * (2 * MAX_BYTES), "pattern": "x" * (2 * MAX_REGEX)},
    ],
)
def test_what_is_usual_passes(body: Any) -> None:
    """Only grammars are limited, not prompts."""
    require_small_grammars(body)


@pytest.mark.parametrize("field", FIELDS)
def test_a_large_schema_is_refused(field: str) -> None:
    """The error names the field and the limit."""
    many = {f"property {number}": {"type": "string"} for number in range(3000)}
    with pytest.raises(InvalidField, match=rf"^{field}: is too large: at most 65536 bytes as JSON$"):
        require_small_grammars({field: {"json": {"properties": many}}})


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"structured_outputs": {"regex": "x" * (MAX_REGEX + 1)}}, "structured_outputs.regex"),
        ({"tools": [{"function": {"pattern": "x" * (MAX_REGEX + 1)}}]}, "tools[0].function.pattern"),
        ({"text": {"format": {"schema": {"pattern": "x" * (MAX_REGEX + 1)}}}}, "text.format.schema.pattern"),
    ],
)
def test_a_long_regular_expression_is_refused(body: Any, where: str) -> None:
    """Wherever it is, the error names its place."""
    with pytest.raises(InvalidField) as raised:
        require_small_grammars(body)
    assert str(raised.value) == f"{where}: is too long: at most {MAX_REGEX} characters"


def test_a_property_may_have_the_name_of_a_regex() -> None:
    """A property called ``pattern`` is a schema, not a text."""
    require_small_grammars({"response_format": {"schema": {"properties": {"pattern": {"type": "string"}}}}})
