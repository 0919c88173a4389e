"""Limits what one prompt may ask of the engine: the size of grammars, the number of answers, and the length of texts.

The engine compiles grammars and reads texts in threads that nothing can stop.
"""

# D118: one file for what has one subject and one caller

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from registry.errors import InvalidField

GRAMMARS: Final = ("response_format", "structured_outputs", "tools", "text", "output_config")
"""Fields of OpenAI's, Anthropic's and vLLM's APIs that contain JSON schemas, regular expressions or grammars."""

JSON_TEXTS: Final = ("json", "structural_tag")
"""Fields of ``structured_outputs`` that can be a text of JSON, which contains a schema, too."""

MAX_GRAMMAR_BYTES: Final = 64 * 1024
"""Longest of these fields as JSON, bytes."""

MAX_REGEX: Final = 4096
"""Longest regular expression, characters."""

REGEXES: Final = ("regex", "pattern", "whitespace_pattern")
"""Names of regular expressions in these fields. The names in ``patternProperties`` are regular expressions, too."""

MAX_GRAMMAR_DEPTH: Final = 128
"""Most objects and arrays inside each other in these fields. vLLM reads them with recursion, and fails at some 400."""

COUNTS: Final = ("n", "best_of")
"""Fields of OpenAI's and vLLM's APIs that say how many answers the engine makes, or how wide its beam search is."""

MOST_ANSWERS: Final = 128
"""Most answers to one prompt. Source: the limit of OpenAI's own API for ``n``. vLLM 0.32 allows 16,384."""

LISTS: Final = ("prompt", "prompt_embeds")
"""Fields of vLLM's completions API that can contain a list of prompts."""

MOST_ANSWERS_OF_A_LIST: Final = 1024
"""Most answers to all prompts of a list. Source: vLLM's own limit of the list, VLLM_MAX_COMPLETION_PROMPTS."""

CHARS_PER_TOKEN: Final = 16
"""Characters per token of the context. Of usual texts a token has 3 to 5, of long runs of spaces more."""

LEAST_CHARS: Final = 1_000_000
"""Limit of an LLM with a short context, characters. A tokenizer reads them in about a second."""

_MEDIA: Final = frozenset(
    {"url", "data", "image_url", "audio_url", "video_url", "input_audio", "image_embeds", "audio_embeds", "file_data"}
)  # fmt: skip
"""Keys whose values are media, which no tokenizer reads; ``models.media_max_mib`` limits them."""


def require_within_limits(body: Any, max_model_len: int) -> None:
    """Check the body of a prompt. ``max_model_len``: context of the LLM, tokens.

    Raises:
        InvalidField: A field asks for a grammar that is too large, for too many answers, or has too much text.
    """
    if isinstance(body, dict):
        _require_small_grammars(body)
        _require_few_answers(body)
        require_short_text(body, max_model_len)


# D110: grammars of prompts have a limit
def _require_small_grammars(body: dict[str, Any]) -> None:
    for field in GRAMMARS:
        value = _with_json_texts(body.get(field))
        if value is None:
            continue
        if _depth(value) > MAX_GRAMMAR_DEPTH:
            raise InvalidField(field, f"is nested too deeply: at most {MAX_GRAMMAR_DEPTH} levels")
        if len(json.dumps(value)) > MAX_GRAMMAR_BYTES:
            raise InvalidField(field, f"is too large: at most {MAX_GRAMMAR_BYTES} bytes as JSON")
        for where, regex in _regexes(value, field):
            if len(regex) > MAX_REGEX:
                raise InvalidField(where, f"is too long: at most {MAX_REGEX} characters")


def _with_json_texts(value: Any) -> Any:
    """Return the value of a grammar field, with its texts of JSON parsed. Invalid JSON is left for vLLM to refuse."""
    if not isinstance(value, dict):
        return value
    parsed = dict(value)
    for name in JSON_TEXTS:
        text = parsed.get(name)
        if isinstance(text, str) and len(text) <= MAX_GRAMMAR_BYTES:  # a longer one is refused as it is
            with suppress(ValueError, RecursionError):
                parsed[name] = json.loads(text)
    return parsed


def _depth(value: Any) -> int:
    """Count the levels of objects and arrays. Without recursion: the parser allows more levels than Python's stack."""
    depth, level = 0, [value]
    while containers := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _regexes(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the regular expressions in a value of at most MAX_GRAMMAR_DEPTH levels, with their fields."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in REGEXES and isinstance(inner, str):
                yield f"{where}.{name}", inner
            elif name == "patternProperties" and isinstance(inner, dict):
                yield from ((f"{where}.{name}", regex) for regex in inner)
                yield from _regexes(inner, f"{where}.{name}")
            else:
                yield from _regexes(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _regexes(inner, f"{where}[{number}]")


# D117: a call counts as one prompt in flight, whatever it asks for, so its number of answers has a limit
def _require_few_answers(body: dict[str, Any]) -> None:
    """Raise InvalidField if the number is too large or not an integer. vLLM would also accept ``"2"`` and ``2.0``."""
    each = 1
    for field in COUNTS:
        value = body.get(field)
        if value is not None and not (isinstance(value, int) and value <= MOST_ANSWERS):
            raise InvalidField(field, f"must be a whole number, at most {MOST_ANSWERS}; send the prompt more than once")
        each = max(each, value or 1)
    prompts = {field: _prompts(body.get(field)) for field in LISTS}
    answers = each * sum(prompts.values())  # vLLM answers the prompts of both fields
    if answers > MOST_ANSWERS_OF_A_LIST:
        field = max(LISTS, key=prompts.__getitem__)
        limit = f"at most {MOST_ANSWERS_OF_A_LIST} (prompts times n) are made; send the prompts in several calls"
        raise InvalidField(field, f"asks for {answers} answers; {limit}")


def _prompts(value: Any) -> int:
    """Return the number of prompts in a value. A list of integers is one prompt, as tokens."""
    if not isinstance(value, list):
        return 0 if value is None else 1
    return 1 if value and all(isinstance(token, int) for token in value) else len(value)


# D138: texts of prompts have a limit
def require_short_text(body: dict[str, Any], max_model_len: int) -> None:
    """Raise InvalidField if a field has more text than any prompt for this LLM needs.

    vLLM's own limit applies neither to ``/tokenize`` nor to ``truncate_prompt_tokens``, and is several times as high
    for tokenizers that have a token for many spaces.
    """
    limit = max(LEAST_CHARS, CHARS_PER_TOKEN * max_model_len)
    for field, value in body.items():
        chars = _chars(value)
        if chars > limit:
            raise InvalidField(field, f"has {chars} characters; at most {limit} are read for this LLM")


def _chars(value: Any) -> int:
    """Count the characters of all texts in a value, without media. Without recursion, see ``_depth``."""
    count, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            count += len(each)
        elif isinstance(each, dict):
            left += (inner for key, inner in each.items() if key not in _MEDIA)
        elif isinstance(each, list):
            left += each
    return count
