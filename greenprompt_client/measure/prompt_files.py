"""Reads prompts from JSONL or a JSON array, with or without a BOM, with LF or CRLF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from registry.errors import BadSettings
from registry.strict_yaml import STRICT_JSON
from registry.wire.words import MAX_PROMPT_ID

_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with its id. ``fields`` are its other fields; they are copied to the results."""

    id: str
    question: str
    fields: dict[str, Any] = field(default_factory=dict)


def load_prompts(path: Path, question_field: str = "question") -> tuple[Prompt, ...]:
    """Return the prompts of a file: objects with the question and optionally an ``id``, or plain texts.

    Without an ``id``, a prompt's id is its line number in JSONL, or its position (from 1) in an array.

    Raises:
        BadSettings: The file can't be read, or a prompt is invalid: the text names the line.
    """
    prompts: dict[str, Prompt] = {}
    text = read_text(path)
    try:
        for line, number, value in _entries(text):
            prompt = _prompt(value, number, question_field, line)
            if prompt.id in prompts:
                raise _Unusable(line, f"id: {prompt.id!r} is also the id of another prompt")
            prompts[prompt.id] = prompt
    except _Unusable as error:
        raise BadSettings(str(path), str(error)) from None
    if not prompts:
        raise BadSettings(str(path), "contains no prompts")
    return tuple(prompts.values())


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a BOM. Raises BadSettings."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadSettings(str(path), f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadSettings(str(path), f"is not UTF-8: {error}") from None


class _Unusable(Exception):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line, self.problem = line, problem

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


def _entries(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (line, number, value): the number is the line in JSONL, the position in an array."""
    begin = _skip(text, 0)
    if text.startswith("[", begin):
        yield from _of_array(text, begin)
        return
    # Not splitlines(): it also splits at characters that JSON texts may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value, end = _value(line, _skip(line, 0), number)
            if _skip(line, end) < len(line):
                raise _Unusable(number, "has more than one JSON value")
            yield number, number, value


def _of_array(text: str, begin: int) -> Iterator[tuple[int, int, Any]]:
    at, number = _skip(text, begin + 1), 0
    line = _line(text, 0, at, 1)
    while not (number == 0 and text.startswith("]", at)):
        value, end = _value(text, at, line)
        number += 1
        yield line, number, value
        after = _skip(text, end)
        line = _line(text, at, after, line)
        if text.startswith("]", after):
            at = after
            break
        if not text.startswith(",", after):
            raise _Unusable(line, "is not JSON: a comma or ] is missing here")
        at = _skip(text, after + 1)
        line = _line(text, after, at, line)
    rest = _skip(text, at + 1)
    if rest < len(text):
        raise _Unusable(_line(text, at, rest, line), "is not JSON: there is more after the end of the array")


def _value(text: str, at: int, line: int) -> tuple[Any, int]:
    """Return the JSON value at position ``at``, which is in line ``line``, and the position after it."""
    try:
        return STRICT_JSON.raw_decode(text, at)
    except RecursionError:
        raise _Unusable(line, "is nested too deeply") from None
    except ValueError as error:
        where = getattr(error, "pos", at)
        problem = getattr(error, "msg", str(error))
        raise _Unusable(_line(text, at, where, line), f"is not JSON: {problem}") from None


def _prompt(value: Any, number: int, question_field: str, line: int) -> Prompt:
    data = {question_field: value} if isinstance(value, str) else value
    if not isinstance(data, dict):
        raise _Unusable(line, f"is no prompt: give an object with {question_field!r}, or a text")
    if question_field not in data:
        there = ", ".join(map(repr, data)) or "none"
        problem = f"is missing; the prompt's fields are {there}: question_field names the one with the question"
        raise _Unusable(line, f"{question_field}: {problem}")
    question, name = data[question_field], data.get("id", number)
    if not isinstance(question, str) or not question:
        raise _Unusable(line, f"{question_field}: give a text that is not empty")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise _Unusable(line, "id: give a text that is not empty, or a whole number")
    for what, text in ((question_field, question), ("id", str(name))):
        if not text.isascii() and _has_half_a_character(text):
            raise _Unusable(line, f"{what}: contains a lone surrogate, which can't be sent")
    if len(quote(str(name), safe="")) > MAX_PROMPT_ID:
        raise _Unusable(line, f"id: is longer than {MAX_PROMPT_ID} characters after percent-encoding")
    return Prompt(str(name), question, {key: value for key, value in data.items() if key not in ("id", question_field)})


def _has_half_a_character(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _skip(text: str, at: int) -> int:
    """Return the position of the next character that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _line(text: str, begin: int, end: int, line: int) -> int:
    """Return the line number of ``end``, if ``begin`` is in line ``line``."""
    return line + text.count("\n", begin, end)
