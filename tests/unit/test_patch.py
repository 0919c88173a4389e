"""The tables of what is replaced or privately read: each guard finds out when its thing is gone or renamed."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deployments.engine.warm.patches import PYTHON, VLLM
from deployments.launch.patches import HAPROXY, RAY, TEMPLATE, HasLine, first_missing_line, text_of_serve
from deployments.patch import Has, How, Patch, first_problem

GUARDS = [
    pytest.param(patch, guard, id=f"{guard.module}.{guard.path}".replace("vllm.", ""))
    for patch in (*VLLM, *PYTHON, *RAY)
    for guard in patch.guards
    if isinstance(guard, Has)
]


def fake(guard: Has, *, without: str | None = None) -> ModuleType:
    """A module that is as the guard wants it; ``without`` a name that its code uses, or the last part of the path."""
    *owners, last = guard.path.split(".")
    names = [name for name in guard.uses if name != without]
    takes = "".join(f", {name}" for name in guard.takes if name != without)
    scope: dict[str, Any] = {}
    used = "".join(f"it.{name}, " if name.isidentifier() else f"{name!r}, " for name in names)
    exec(f"def code(it{takes}):\n    return ({used})", scope)
    module = ModuleType(guard.module)
    owner: Any = module
    for part in owners:
        setattr(owner, part, SimpleNamespace())
        owner = getattr(owner, part)
    if last != without:
        setattr(owner, last, scope["code"])
    return module


@pytest.mark.parametrize(("patch", "guard"), GUARDS)
def test_each_thing_that_is_gone_is_named(patch: Patch, guard: Has, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check names the attribute that was removed, or the name that its code no longer uses."""
    monkeypatch.setitem(sys.modules, guard.module, fake(guard))
    assert guard.problem() is None
    last = guard.path.rpartition(".")[2]
    for name in (last, *guard.uses, *guard.takes):
        monkeypatch.setitem(sys.modules, guard.module, fake(guard, without=name))
        problem = guard.problem()
        assert problem is not None
        assert name in problem
        assert guard.module in problem
        assert replace(patch, guards=(guard,)).problem() == problem


def test_an_abstract_method_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a method was renamed and its base class still declares it, the guard is not deceived."""
    guard = Has("nowhere", "Base.it")

    class Base(ABC):
        @abstractmethod
        def it(self) -> None: ...

    monkeypatch.setitem(sys.modules, "nowhere", module := ModuleType("nowhere"))
    monkeypatch.setattr(module, "Base", Base, raising=False)
    assert guard.problem() == "nowhere has no nowhere.Base.it (only an abstract one)"
    assert str(Has("a", "b", ("c",), ("d", "e"))) == "`a.b` uses `c` and takes `d`, `e`"


def test_the_first_problem_says_what_the_patch_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log line of a cold start has the missing thing and what needs it."""
    monkeypatch.setitem(sys.modules, "nowhere", None)  # importing it fails
    patch = Patch("nowhere", "nowhere.it", How.READ, "the hang watch", (Has("nowhere", "it"),), "only read")
    assert first_problem([]) is None
    text = first_problem([patch])
    assert text is not None
    assert text.startswith("nowhere has no nowhere.it (")
    assert text.endswith("needed: the hang watch")


def test_python_and_ray_are_as_they_must_be() -> None:
    """The installed Python and Ray pass their guards; for vLLM, which brings pyzmq, the tests of the engine say so."""
    python = [patch for patch in PYTHON if patch.library != "pyzmq"]
    assert first_problem((*python, *HAPROXY, *RAY)) is None


LINES = [guard for patch in HAPROXY for guard in patch.guards if isinstance(guard, HasLine)]


@pytest.mark.parametrize("guard", LINES, ids=lambda guard: guard.pattern)
def test_each_line_that_is_gone_is_named(guard: HasLine) -> None:
    """A template of HAProxy's configuration that lacks a line is found out, by its pattern."""
    template = text_of_serve(TEMPLATE)
    assert first_missing_line(template) is None
    kept = [line for line in template.splitlines() if guard.missing_in(line)]
    assert len(kept) < len(template.splitlines())
    others = {other for other in LINES if other.missing_in("\n".join(kept))}
    assert guard in others
    assert first_missing_line("\n".join(kept)) in {other.pattern for other in others}
