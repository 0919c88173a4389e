"""Renames something in a module of another library, as a new version of it might."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any


@contextmanager
def renamed(module_name: str, name: str) -> Iterator[None]:
    """Rename everything with this name in a module, within a context: globals, attributes, parameters, constants.

    ``Class.attribute`` renames only this attribute of the class, even if it is inherited.
    """
    module, (owner_name, _, name) = importlib.import_module(module_name), name.rpartition(".")
    with ExitStack() as undo:
        if owner_name:
            for owner in getattr(module, owner_name).__mro__:
                _remove(owner, name, undo)
        else:
            _remove(module, name, undo)
            for each in [each for each in vars(module).values() if getattr(each, "__module__", None) == module_name]:
                if inspect.isclass(each):
                    _remove(each, name, undo)
                    for member in list(vars(each).values()):
                        _recompile(member, name, undo)
                else:
                    _recompile(each, name, undo)
        yield


def _remove(owner: ModuleType | type, name: str, undo: ExitStack) -> None:
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
        with suppress(AttributeError):  # a name that exists only for type checkers
            delattr(owner, name)


def _recompile(member: Any, name: str, undo: ExitStack) -> None:
    """Rename attributes, globals, parameters and constants in a function, also in a method or property."""
    for each in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
        function = inspect.unwrap(each) if callable(each) else None
        if isinstance(function, FunctionType) and (code := _renamed(function.__code__, name)) != function.__code__:
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = code


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return f"{name}_renamed" if value == name else value
    if isinstance(value, tuple):
        return tuple(_renamed(each, name) for each in value)
    if isinstance(value, CodeType):
        parts = ("co_names", "co_varnames", "co_consts", "co_cellvars", "co_freevars")
        return value.replace(**{part: _renamed(getattr(value, part), name) for part in parts})
    return value
