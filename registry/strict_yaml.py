"""Reads YAML and JSON written by people, and refuses ambiguous values.

PyYAML follows YAML 1.1, in which ``NO`` is false, ``010`` is eight and ``1:30`` is ninety. Here each of these is
an error that says what to write instead. A duplicate key is an error, too. Dates are text, and ``1e-1`` is a number.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import yaml

_AMBIGUOUS: Final = "!ambiguous"

_REFUSED: Final[tuple[tuple[str, str, str], ...]] = (
    (r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)", "yYnNoO", "write true or false, or put it in quotes"),
    (r"[-+]?0[0-9_]+", "-+0", "a number that begins with 0 may mean octal: leave the 0 out, or put it in quotes"),
    (r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", "-+0123456789", "put it in quotes: YAML reads it as base 60"),
    (
        r"[-+]?(?:0[bo][0-9_]+|[0-9][0-9.]*_[0-9_.]*)",
        "-+0123456789",
        "write the number in plain digits, or put it in quotes",
    ),
)
"""(pattern, first characters, remedy) of plain values that YAML versions interpret differently."""


class _Loader(yaml.SafeLoader):
    """A stricter version of PyYAML's safe loader."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises MarkedYAMLError for a duplicate key."""
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key_node.value} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> None:
    remedy = next(remedy for pattern, _, remedy in _REFUSED if re.fullmatch(pattern, node.value))
    raise yaml.MarkedYAMLError(None, None, f"{node.value} can be read in two ways: {remedy}", node.start_mark)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return PyYAML's resolvers of plain values, without dates, and with ours first."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items():
        table[first] = [kind for kind in kinds if kind[0] != "tag:yaml.org,2002:timestamp"]
    for pattern, firsts, _ in _REFUSED:
        for first in firsts:
            table.setdefault(first, []).insert(0, (_AMBIGUOUS, re.compile(f"^(?:{pattern})$")))
    number = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
    for first in "-+.0123456789":
        table.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", number))
    return table


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_constructor(_AMBIGUOUS, _refuse)


def load_yaml(text: str) -> Any:
    """Read one YAML document as plain data; None for an empty one.

    Raises:
        yaml.YAMLError: it is not YAML, contains more than plain data, an ambiguous value or a duplicate key. A problem
            with a known line is a MarkedYAMLError, whose ``problem`` quotes only the value.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # Errors of PyYAML's constructors, e.g. for `!!int x`, a tagged date 2024-13-01, or deep nesting.
        raise yaml.YAMLError(f"a value can't be read: {str(error) or type(error).__name__}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r} occurs twice")
            seen.add(name)
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


# D100: a key that occurs twice is refused
STRICT_JSON: Final = json.JSONDecoder(object_pairs_hook=_each_once, parse_constant=_no_number)
"""Raises ValueError for text that is not strict JSON (e.g. NaN), and for duplicate keys in an object."""


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object with STRICT_JSON. Raises ValueError: the text is something else, or is nested too deeply."""
    try:
        found = STRICT_JSON.decode(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - callers get one kind of error
    return found
