"""What a prompt may ask of the engine: grammars, answers and texts, and which of them are too much."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.wrapper.json_bodies import read_json
from deployments.wrapper.prompt_limits import (
    CHARS_PER_TOKEN,
    COUNTS,
    GRAMMARS,
    JSON_TEXTS,
    LEAST_CHARS,
    LISTS,
    MAX_GRAMMAR_BYTES,
    MAX_GRAMMAR_DEPTH,
    MAX_REGEX,
    MOST_ANSWERS,
    MOST_ANSWERS_OF_A_LIST,
    require_within_limits,
)
from registry.errors import InvalidField

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "pattern": "[a-z]+"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (2 * LEAST_CHARS)}}


def within_limits(body: Any) -> None:
    """Check a prompt for an LLM with a short context."""
    require_within_limits(body, 512)


# --- grammars ---


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
        {"prompt": "x" * (2 * MAX_GRAMMAR_BYTES), "pattern": "x" * (2 * MAX_REGEX)},
    ],
)
def test_usual_grammars_pass(body: Any) -> None:
    """Only grammars are limited, not prompts."""
    within_limits(body)


@pytest.mark.parametrize("field", GRAMMARS)
def test_a_large_schema_is_refused(field: str) -> None:
    """The error names the field and the limit."""
    many = {f"property {number}": {"type": "string"} for number in range(3000)}
    with pytest.raises(InvalidField, match=rf"^{field}: is too large: at most 65536 bytes as JSON$"):
        within_limits({field: {"json": {"properties": many}}})


def nested(levels: int) -> Any:
    """A schema of so many objects and arrays inside each other."""
    return {} if levels == 1 else {"anyOf": nested(levels - 1)} if levels % 2 else [nested(levels - 1)]


@pytest.mark.parametrize("field", GRAMMARS)
def test_a_deep_schema_is_refused(field: str) -> None:
    """128 levels pass, one more does not."""
    within_limits({field: nested(MAX_GRAMMAR_DEPTH)})
    with pytest.raises(InvalidField, match=rf"^{field}: is nested too deeply: at most 128 levels$"):
        within_limits({field: nested(MAX_GRAMMAR_DEPTH + 1)})


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"structured_outputs": {"regex": "x" * (MAX_REGEX + 1)}}, "structured_outputs.regex"),
        ({"tools": [{"function": {"pattern": "x" * (MAX_REGEX + 1)}}]}, "tools[0].function.pattern"),
        ({"text": {"format": {"schema": {"pattern": "x" * (MAX_REGEX + 1)}}}}, "text.format.schema.pattern"),
        (
            {"output_config": {"format": {"schema": {"pattern": "x" * (MAX_REGEX + 1)}}}},
            "output_config.format.schema.pattern",
        ),
        (
            {"structured_outputs": {"json": {"patternProperties": {"x" * (MAX_REGEX + 1): {}}}}},
            "structured_outputs.json.patternProperties",
        ),
        (
            {"structured_outputs": {"json": json.dumps({"pattern": "x" * (MAX_REGEX + 1)})}},
            "structured_outputs.json.pattern",
        ),
        (
            {"structured_outputs": {"structural_tag": json.dumps([{"pattern": "x" * (MAX_REGEX + 1)}])}},
            "structured_outputs.structural_tag[0].pattern",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": "x" * (MAX_REGEX + 1)}},
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_a_long_regular_expression_is_refused(body: Any, where: str) -> None:
    """Wherever it is, the error names its place."""
    with pytest.raises(InvalidField) as raised:
        within_limits(body)
    assert str(raised.value) == f"{where}: is too long: at most {MAX_REGEX} characters"


@pytest.mark.parametrize("field", JSON_TEXTS)
@pytest.mark.parametrize("text", ["{", "[" * 60_000, '"' + "x" * 5000 + '"', "7"])
def test_texts_that_are_no_schema_are_left_to_vllm(field: str, text: str) -> None:
    """They are no grammar of ours to judge: vLLM refuses them by name."""
    within_limits({"structured_outputs": {field: text}})


@pytest.mark.parametrize("field", JSON_TEXTS)
def test_a_deep_schema_in_a_text_is_refused(field: str) -> None:
    """Written as a text, a schema is as deep as it is."""
    with pytest.raises(InvalidField, match=r"^structured_outputs: is nested too deeply"):
        within_limits({"structured_outputs": {field: json.dumps(nested(MAX_GRAMMAR_DEPTH + 1))}})


def test_a_property_may_have_the_name_of_a_regex() -> None:
    """A property called ``pattern`` is a schema, not a text."""
    within_limits({"response_format": {"schema": {"properties": {"pattern": {"type": "string"}}}}})


@pytest.mark.parametrize("depth", [129, 500, 700])
def test_depth_is_no_fault_of_ours(depth: int) -> None:
    """A grammar deeper than the limit is refused, also close to the parser's own limit; other fields have none."""
    for field in GRAMMARS:
        deep = read_json(b'{"%s":' % field.encode() + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(InvalidField, match="nested too deeply"):
            within_limits(deep)
    within_limits(read_json(b'{"x":' + b'{"y":' * depth + b'"z"' + b"}" * depth + b"}"))


# --- answers ---


@pytest.mark.parametrize("body", [None, [], "text", {}, {"n": None}, {"n": 1}, {"n": MOST_ANSWERS}, {"top_n": 5000}])
def test_usual_numbers_of_answers_pass(body: Any) -> None:
    """Only the number of answers is limited."""
    within_limits(body)


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [MOST_ANSWERS + 1, 16384, 10**30, "16384", 16384.0, [5]])
def test_too_many_answers_are_refused(field: str, value: object) -> None:
    """Also numbers in forms that vLLM would read as such; the error names the field, the limit and what to do."""
    with pytest.raises(InvalidField, match=rf"^{field}: must be a whole number, at most 128; send the prompt more"):
        within_limits({"prompt": "Why?", field: value})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["Why?"] * MOST_ANSWERS_OF_A_LIST},
        {"prompt": [[1]] * 8, "n": MOST_ANSWERS},
        {"prompt": [1] * 5000, "n": MOST_ANSWERS},
        {"prompt": [], "prompt_embeds": ["AAAA"] * MOST_ANSWERS_OF_A_LIST},
        {"prompt": None, "prompt_embeds": "A" * 5000, "n": None},
        {"input": ["Why?"] * 5000},
    ],
)
def test_usual_lists_of_prompts_pass(body: Any) -> None:
    """A list of tokens is one prompt, and texts of embeddings have no answers."""
    within_limits(body)


@pytest.mark.parametrize("field", LISTS)
@pytest.mark.parametrize("prompt", ["Why?", [1], [1, 2]])
@pytest.mark.parametrize(
    ("count", "more", "answers"),
    [(1000, {"n": 128}, 128_000), (1025, {}, 1025), (9, {"n": 128}, 1152), (600, {"n": 1, "best_of": 2}, 1200)],
)
def test_lists_of_prompts_do_not_get_round_the_limit(
    field: str, prompt: Any, count: int, more: dict[str, int], answers: int
) -> None:
    """All prompts of a list are answered at once, each ``n`` times; the error names the field, limit and remedy."""
    with pytest.raises(InvalidField, match=rf"^{field}: asks for {answers} answers; at most 1024 .* in several calls$"):
        within_limits({field: [prompt] * count, **more})


def test_the_prompts_of_both_lists_are_counted() -> None:
    """VLLM answers them all; tokens that are no integers make no single prompt."""
    with pytest.raises(InvalidField, match=r"^prompt: asks for 1100 answers"):
        within_limits({"prompt": ["Why?"] * 600, "prompt_embeds": ["AAAA"] * 500})
    with pytest.raises(InvalidField, match=r"^prompt: asks for 2000 answers"):
        within_limits({"prompt": [1, "Why?"] * 1000})


# --- texts ---


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
def test_usual_texts_pass(body: Any) -> None:
    """A million characters pass for the shortest context; media and tokens are no text."""
    within_limits(body)


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
        within_limits(body)


def test_a_long_context_allows_more() -> None:
    """The limit grows with the LLM's context."""
    tokens = LEAST_CHARS // 4
    require_within_limits({"prompt": "x" * (CHARS_PER_TOKEN * tokens)}, tokens)
    with pytest.raises(InvalidField):
        require_within_limits({"prompt": "x" * (CHARS_PER_TOKEN * tokens + 1)}, tokens)
