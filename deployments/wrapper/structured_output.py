"""Limits the grammars that prompts ask for: the engine compiles them in a thread that nothing can stop."""

# D110: grammars of prompts have a limit

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from registry.errors import InvalidField

FIELDS: Final = ("response_format", "structured_outputs", "tools", "text")
"""Fields of OpenAI's APIs, and of vLLM's, that contain JSON schemas, regular expressions or grammars."""

MAX_BYTES: Final = 64 * 1024
"""Longest of these fields as JSON, bytes."""

MAX_REGEX: Final = 4096
"""Longest regular expression, characters."""


def require_small_grammars(body: Any) -> None:
    """Raise InvalidField if a prompt's body asks for a grammar that is too large; names its field."""
    if not isinstance(body, dict):
        return
    for field in FIELDS:
        value = body.get(field)
        if value is None:
            continue
        if len(json.dumps(value)) > MAX_BYTES:
            raise InvalidField(field, f"is too large: at most {MAX_BYTES} bytes as JSON")
        for where, regex in _regexes(value, field):
            if len(regex) > MAX_REGEX:
                raise InvalidField(where, f"is too long: at most {MAX_REGEX} characters")


def _regexes(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the regular expressions in a value, with their fields. Its depth is limited where it was parsed."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("regex", "pattern") and isinstance(inner, str):
                yield f"{where}.{name}", inner
            else:
                yield from _regexes(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _regexes(inner, f"{where}[{number}]")
