"""Where the product sets flags, found in its source: by the enum `registry.wire.flags.Flag`, or wrongly by a text.

A place that sets a flag is a constant whose docstring begins with "Flag", a value of what is called ``flags``, what a
function that returns flags returns, or an argument of a call that says why a counter can't tell.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final

from registry.wire.flags import CHECK, ESTIMATE, KEPT, UNKNOWN, Flag
from tests.docs.markdown import MADE, cell, code, table
from tests.docs.modules import ROOT, modules

_SAYS_WHY: Final = {"unknown", "lost", "CounterLost", "NoWindow", "_Run"}
"""Functions and classes whose text argument is a flag."""

_HOLDS: Final = frozenset({"all_flags", "flags"})
"""Variables, fields and arguments that hold flags; of the meter's also ``problems``."""

_GIVES: Final = {"_not_covered", "flag", "_flags", "budget_flags"}
"""Functions that return or yield flags."""

_COLLECTIONS: Final = {"dict", "frozenset", "list", "set", "sorted", "tuple"}

_WORD: Final = re.compile(r"[a-z]+(_[a-z0-9]+)*")


def flags_as_texts() -> list[str]:
    """Return each place outside of the enum that sets a flag by a text, or has a flag's word as a text."""
    found = list[str]()
    for path, tree in modules():
        house, *folders = path.relative_to(ROOT).parts
        if (house, *folders) == ("registry", "wire", "flags.py"):
            continue
        set_here = set(_flags_of(tree, _HOLDS | {"problems"} if "energy" in folders else _HOLDS))
        if house != "greenprompt_client":  # which reads them, and has columns named like some
            set_here |= {*_constants(tree)} & {*Flag}
        found += [f"{path.name}: {word}" for word in sorted(set_here) if _WORD.fullmatch(word)]
    return found


def flags_used() -> set[str]:
    """Return the names of the members of `Flag` that the product uses."""
    return {
        node.attr
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == Flag.__name__
    }


def flags_page() -> str:
    """Return the page of flags."""
    page = f"""\
# Flags

{MADE}
A flag is a word that says what is unusual about a figure. Flags stand in `flags` of answers, energy
windows, requests, measurements and reports.

"Figure" says what becomes of a figure with this flag: **{KEPT}** means that it counts, **{UNKNOWN}**
that it is `null`, **{ESTIMATE}** that it is `modeled`, and **{CHECK}** that you should look at it
before you cite it.

"""
    for group in dict.fromkeys(flag.about for flag in Flag):
        rows = [(code(flag), cell(flag.meaning), cell(flag.figure)) for flag in Flag if flag.about == group]
        page += f"## {group}\n\n{table(('flag', 'meaning', 'figure'), rows)}"
    return page.rstrip() + "\n"


def _constants(tree: ast.Module) -> Iterator[str]:
    return (each.value for each in ast.walk(tree) if isinstance(each, ast.Constant) and isinstance(each.value, str))


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
