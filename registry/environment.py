"""Finds, parses and checks environment variables that are settings: ``GREENPROMPT_<SECTION>__<FIELD>``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from registry.strict_yaml import STRICT_JSON

ENV_PREFIX: Final = "GREENPROMPT_"

NOT_SETTINGS: Final = (
    "URL",
    "API_KEY",
    "CA_FILE",
    "ENGINE_OWNER_PID",
    "ENGINE_PHASE_FILE",
    "ENGINE_PRELOAD",
    "REPEATED_UP",
    "SECRETS_FILE",
)
"""Variables with our prefix that are not settings. The command line reads the first three; processes set the others."""

EMPTY: Final = "is empty; leave it out, or give it a value"
EMPTY_VARIABLE: Final = "is empty; unset it, or give it a value"

_COLLECTIONS: Final = (dict, frozenset, list, set, tuple)


class StrictVariables(EnvSettingsSource):
    """Reads sections and lists as strict JSON, without duplicate keys."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Parse the value of a variable. Raises ValueError if it is not strict JSON."""
        return STRICT_JSON.decode(value)


def variables(environment: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the variables that are settings, with the field they set: ``GREENPROMPT_HTTP__PORT``, ``[http, port]``."""
    for name in environment:
        # Lower-case names are accepted, as by pydantic.
        if name.upper().startswith(ENV_PREFIX) and name.upper().removeprefix(ENV_PREFIX) not in NOT_SETTINGS:
            yield name, name[len(ENV_PREFIX) :].lower().split("__")


def problems_of(settings: type[BaseModel], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (variable, problem) for each variable that names no field, is empty, or is not the JSON its field needs.

    Pydantic ignores unknown sections. So with a typo in a variable's name, a command could start or end
    the wrong registry.
    """
    for name, parts in variables(environment):
        value = environment[name]
        if not _is_there(settings, parts):
            yield name, f"there is no {_what(settings, parts)}{_hint(settings, name)}"
        elif not value.strip():
            yield name, EMPTY_VARIABLE
        elif _takes_json(settings, parts):
            try:
                given = STRICT_JSON.decode(value)
            except (RecursionError, ValueError) as error:
                yield name, f"lists and sections are given as JSON: {error}"
            else:
                yield from ((name, f"{field}: {EMPTY}") for field in empty_values(given, tuple(parts)))


def empty_values(value: object, field: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names of the fields in ``value``, below ``field``, that are empty or blank text.

    An empty path would mean the current directory. The LLMs of ``deploy`` are not checked.
    """
    if field[:1] == ("deploy",):
        return
    if isinstance(value, str) and not value.strip():
        yield ".".join(field)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from empty_values(inner, (*field, str(name)))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from empty_values(inner, (*field, str(n)))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message that suggests the most similar of ``names``; empty if none is similar."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def fields_of(settings: type[BaseModel], parts: Sequence[object]) -> tuple[str, ...]:
    """Return the field names of the section at this path; empty if it has no fixed fields."""
    found = _annotation(settings, parts)
    model = _model(found)
    return () if model is None else tuple(model.model_fields)


def _is_there(settings: type[BaseModel], parts: Sequence[str]) -> bool:
    return _annotation(settings, parts) is not None


def _takes_json(settings: type[BaseModel], parts: Sequence[str]) -> bool:
    found = _annotation(settings, parts)
    return _model(found) is not None or any(get_origin(choice) in _COLLECTIONS for choice in _choices(found))


def _annotation(settings: type[BaseModel], parts: Sequence[object]) -> Any:
    """Return the type of the field at this path: ``Any`` below a mapping, None if there is no such field."""
    found: Any = settings
    for part in parts:
        model = _model(found)
        if model is not None:
            field = model.model_fields.get(str(part))
            found = None if field is None else field.annotation
        elif any(get_origin(choice) is dict for choice in _choices(found)) or found is Any:
            found = Any
        else:
            return None
    return found


def _model(annotation: Any) -> type[BaseModel] | None:
    kinds = (choice for choice in _choices(annotation) if isinstance(choice, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _what(settings: type[BaseModel], parts: Sequence[str]) -> str:
    section, *rest = parts
    return f"field {'.'.join(parts)!r}" if rest and section in settings.model_fields else f"section {section!r}"


def _hint(settings: type[BaseModel], name: str) -> str:
    names = [f"{ENV_PREFIX}URL", *_names(settings, ENV_PREFIX)]
    return did_you_mean(name.upper(), names) or f"; there are {', '.join(settings.model_fields)}"


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the names of the variables of all fields that are not sections."""
    for name, field in model.model_fields.items():
        inner = _model(field.annotation)
        if inner is None:
            yield f"{prefix}{name}".upper()
        else:
            yield from _names(inner, f"{prefix}{name}__")
