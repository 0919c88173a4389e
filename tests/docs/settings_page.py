"""docs/reference/settings.md: every field of the configuration, from ``registry.settings``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from registry.environment import ENV_PREFIX
from registry.settings import Settings
from registry.wire.schemas import LLMConfig
from tests.docs.markdown import MADE, cell, code, table, text

_INTRODUCTION = f"""\
# Settings

{MADE}
A registry reads one YAML file; [Configure a registry](../how-to/configure.md) says how. The variable of a field
overrides the file. Lists and sections are given as JSON in a variable. Fields that end in `_s` are seconds.

"""
_SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


class Setting(NamedTuple):
    """A field by its path; ``variable`` is None inside of lists and mappings."""

    section: str
    name: str
    field: FieldInfo
    variable: str | None


class Part(NamedTuple):
    """A section by its path, with its fields that are no sections themselves."""

    path: str
    doc: str | None
    settings: list[Setting]


def parts() -> Iterator[Part]:
    """Every section, the top level first."""
    yield from _parts(Settings, "", ENV_PREFIX)


def _parts(model: type[BaseModel], path: str, prefix: str | None) -> Iterator[Part]:
    """``prefix`` is how the names of the section's variables begin; None: they have none."""
    own, inner = list[Setting](), list[Part]()
    for name, field in model.model_fields.items():
        below, place = _section(field.annotation, f"{path}.{name}".lstrip("."))
        variable = None if prefix is None else f"{prefix}{name}".upper()
        alone = below is not None and place.endswith(name)
        if not alone or not (isinstance(field.default, BaseModel) or field.is_required()):
            own.append(Setting(path, name, field, variable))
        if below is not None:
            inner += _parts(below, place, f"{variable}__" if alone and variable is not None else None)
    yield Part(path, model.__doc__, own)
    yield from inner


def _section(annotation: Any, path: str) -> tuple[type[BaseModel] | None, str]:
    """The class of the section that a field is or holds, and the section's path; an llmconfig is none of ours."""
    for choice in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        holds = get_args(choice)
        where = {tuple: f"{path}[]", dict: f"{path}.<name>"}.get(get_origin(choice))
        for kind in (holds[:1] if get_origin(choice) is tuple else holds[-1:]) if where else (choice,):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not LLMConfig:
                return kind, where or path
    return None, path


def _type(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    limits = "".join(
        f" {sign} {getattr(limit, name):g}"
        for limit in metadata
        for sign, name in [_SIGNS.get(type(limit), ("", ""))]
        if sign
    )
    if origin is Annotated:
        return _type(inner[0], inner[1:])
    if origin in (Union, UnionType):
        return " or ".join("null" if each is type(None) else _type(each, metadata) for each in inner)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}s".replace("texts", "text").replace("`s", "`")
    if origin is dict:
        return f"mapping of names to {_type(inner[1])}s"
    return _NAMES.get(annotation, "section") + limits


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, str) or not isinstance(default, BaseModel | tuple | dict | bool | int | float | None):
        return code(str(default))
    return code(json.dumps(default))


def settings_page() -> str:
    """Return the page."""
    page = _INTRODUCTION
    for part in parts():
        head = ["field", "type", "default", "meaning", "variable"]
        rows = [
            [
                code(each.name),
                _type(each.field.annotation, each.field.metadata),
                _default(each.field),
                cell(each.field.description),
                "" if each.variable is None else code(each.variable),
            ]
            for each in part.settings
        ]
        if all(each.variable is None for each in part.settings):
            head, rows = head[:-1], [row[:-1] for row in rows]
        page += f"## {code(part.path)}\n\n{text(part.doc)}\n\n" if part.path else ""
        page += table(head, rows) if rows else ""
    return page.rstrip() + "\n"
