"""Describes patches: code of other libraries that this project replaces, or private code that it reads.

A new version of a library can change such code without notice. So each patch is listed in a table,
with guards that detect such a change. The check at each start and the page
docs/reference/patches.md use these tables.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class How(StrEnum):
    """What a patch does with the other library's code."""

    REPLACED = "replaced"
    WRAPPED = "wrapped"
    SUBCLASSED = "subclassed"
    READ = "read"
    EDITED = "edited"
    SET = "set"


class Guard(Protocol):
    """Something that must hold for a patch to work. Its text says what."""

    def problem(self) -> str | None:
        """Return what no longer holds, as text; None if it holds."""


@dataclass(frozen=True, slots=True)
class Has:
    """A module has an attribute (``path``, with dots). Checking it imports the module.

    ``uses``: names of attributes, globals or text constants in its code. ``takes``: its parameters.
    """

    module: str
    path: str
    uses: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [f"{verb} {', '.join(f'`{name}`' for name in names)}" for verb, names in self._wanted() if names]
        return f"`{self.module}.{self.path}` {' and '.join(said) or 'exists'}"

    def _wanted(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return ("uses", self.uses), ("takes", self.takes)

    def problem(self) -> str | None:
        """Return which attribute or name is missing, as text; None if none is."""
        library = self.module.partition(".")[0]
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.path.split("."):
                found = getattr(found, part)
            code = inspect.unwrap(found).__code__ if self.uses or self.takes else None
        except (ImportError, AttributeError) as error:
            return f"{library} has no {self.module}.{self.path} ({error})"
        if getattr(found, "__isabstractmethod__", False):
            return f"{library} has no {self.module}.{self.path} (only an abstract one)"
        if code is None:
            return None
        there = {
            "uses": {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))},
            "takes": set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]),
        }
        for verb, names in self._wanted():
            if missing := [name for name in names if name not in there[verb]]:
                return f"{library}'s {self.module}.{self.path} no longer {verb} {', '.join(missing)}"
        return None


# D106: with its reason, its guards, and how it ends
@dataclass(frozen=True, slots=True)
class Patch:
    """One patch: code of another library that is replaced or read, and why.

    ``put_back``: when the library's own code is restored. "only read" for code that is not changed.
    """

    library: str
    name: str
    how: How
    why: str
    guards: tuple[Guard, ...]
    put_back: str

    def problem(self) -> str | None:
        """Return why this patch does not work with the installed library, as text; None if it works."""
        return next(filter(None, (guard.problem() for guard in self.guards)), None)


def first_problem(patches: Sequence[Patch]) -> str | None:
    """Return the first reason why a patch does not work, with what the patch is for; None if all work."""
    for patch in patches:
        problem = patch.problem()
        if problem is not None:
            return f"{problem}; needed: {patch.why}"
    return None
