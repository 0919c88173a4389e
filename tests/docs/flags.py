"""The flags that the code can put on a figure or a measurement, found in its source.

Flags are words in snake case. They are found where the code makes them: as constants whose docstring begins with
"Flag", as values of what is called ``flags``, in functions that return flags, and as arguments of the calls
that say why a counter can't tell.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final

from tests.docs.pages import REFERENCE, modules

_SAYS_WHY: Final = {"unknown", "lost", "CounterLost", "NoWindow", "_Run"}
"""Functions and classes whose text argument is a flag."""

_HOLDS: Final = frozenset({"all_flags", "flags"})
"""Variables, fields and arguments that hold flags; of the meter's also ``problems``."""

_GIVES: Final = {"_not_covered", "flag", "_flags", "budget_flags"}
"""Functions that return or yield flags."""

_COLLECTIONS: Final = {"dict", "frozenset", "list", "set", "sorted", "tuple"}

_WORD: Final = re.compile(r"[a-z]+(_[a-z0-9]+)*")


def flags_of_the_code() -> set[str]:
    """Every flag that the product can set."""
    return {
        flag
        for path, tree in modules()
        for flag in _flags_of(tree, _HOLDS | {"problems"} if "energy" in path.parts else _HOLDS)
        if _WORD.fullmatch(flag)
    }


def flags_of_the_page() -> list[str]:
    """The flags of docs/reference/flags.md, in its order."""
    return re.findall(r"^\| `(\w+)` \|", (REFERENCE / "flags.md").read_text(), re.MULTILINE)


def _flags_of(tree: ast.Module, holds: frozenset[str]) -> Iterator[str]:
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_a_flags_docstring(after):
            yield from _texts(node.value)
    for each in ast.walk(tree):
        for value in _values(each, holds):
            yield from _texts(value)


def _is_a_flags_docstring(node: ast.stmt | None) -> bool:
    says = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and str(node.value.value)
    return bool(says and re.match(r"Flag\b", says))


def _values(node: ast.AST, holds: frozenset[str]) -> Iterator[ast.expr]:
    """The expressions of a node that give flags."""
    match node:
        case ast.keyword(arg=str(name), value=value) if name in holds:
            yield value
        case ast.Assign() | ast.AnnAssign() if node.value is not None and _is_held(node, holds):
            yield node.value
        case ast.Call(func=func, args=args) if _name(func) in _SAYS_WHY:
            yield from args
        case ast.Call(func=ast.Attribute(value=held, attr="add" | "update"), args=args) if _name(held) in holds:
            yield from args
        case ast.FunctionDef(name=name) if name in _GIVES:
            given = (each.value for each in ast.walk(node) if isinstance(each, ast.Return | ast.Yield))
            yield from (value for value in given if value is not None)


def _is_held(node: ast.Assign | ast.AnnAssign, holds: frozenset[str]) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(_name(target) in holds for target in targets)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may give: not those that it looks up or compares with."""
    skipped: set[int] = set()
    for each in ast.walk(node):
        looked_up = isinstance(each, ast.Call) and _name(each.func) not in _COLLECTIONS
        if id(each) in skipped or looked_up or isinstance(each, ast.Subscript | ast.Compare | ast.JoinedStr):
            skipped |= {id(child) for child in ast.walk(each)} - {id(each)}
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value
