"""Every error of ours: crosses processes whole, has a code of its own, and says something to people."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from inspect import Parameter, signature

import pytest

import deployments
import greenprompt_client
import registry
from registry.errors import EngineStartFailed, RegistryError

NOT_IMPORTED = (
    "deployments.engine.warm.preload",  # changes the process that imports it
    "registry.store.migrations",  # belongs to alembic
)
EXAMPLES: dict[str, object] = {
    "int": 7,
    "str": "a «word»: with %s and {braces}",
    "bool": True,
    "str | None": "a reason",
    "float": 1.5,
    "float | None": 2.5,
}


def all_errors() -> list[type[RegistryError]]:
    """RegistryError and everything below it, in whatever module of ours it is."""
    for package in (registry, deployments, greenprompt_client):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(NOT_IMPORTED):
                importlib.import_module(module.name)
    found, todo = [], [RegistryError]
    while todo:
        error = todo.pop()
        found.append(error)
        todo += error.__subclasses__()
    return sorted(found, key=lambda error: error.__name__)


def example(error: type[RegistryError]) -> RegistryError:
    """An error of this class with a value for every field."""
    return error(*(EXAMPLES[str(field.annotation)] for field in fields_of(error)))


def fields_of(error: type[RegistryError]) -> list[Parameter]:
    """What the class is made with."""
    fields = [] if error is RegistryError else list(signature(error).parameters.values())
    assert all(field.kind is Parameter.POSITIONAL_OR_KEYWORD for field in fields)
    return fields


ERRORS = all_errors()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[RegistryError]) -> None:
    """An error that crosses a process keeps its class, its text and all of its fields."""
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_by_keyword_survive_pickling(kind: type[RegistryError]) -> None:
    """An error that is made with named fields crosses a process whole, too."""
    error = kind(**{field.name: EXAMPLES[str(field.annotation)] for field in fields_of(kind)})
    copy = pickle.loads(pickle.dumps(error))
    assert (vars(copy), copy.args) == (vars(error), example(kind).args)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_have_http_status_and_text(kind: type[RegistryError]) -> None:
    """Each error has an HTTP error status of its own making, and those that pass are 409, 429 or 5xx."""
    assert 400 <= kind.http_status <= 599
    assert not kind.retryable or kind.http_status in (429, 503)
    if kind is not RegistryError:
        assert str(example(kind)) not in ("", kind.__name__)


def test_codes_are_unique() -> None:
    """No two errors have the same code, and none has inherited it."""
    assert len({kind.code for kind in ERRORS}) == len(ERRORS)
    assert [kind.__name__ for kind in ERRORS if "code" not in vars(kind)] == []


def test_fields_are_in_the_text() -> None:
    """What a field says is in the text that people read."""
    silent = [
        (kind.__name__, name)
        for kind in ERRORS
        for name, value in vars(example(kind)).items()
        if not isinstance(value, bool)
        and str(value) not in str(example(kind))
        and repr(value) not in str(example(kind))
    ]
    assert silent == []


def test_permanent_is_no_default() -> None:
    """A failed start can be tried elsewhere unless the engine itself has ruled that out."""
    assert not EngineStartFailed("llm", "no memory").permanent


def test_a_subclass_with_its_own_init_keeps_it() -> None:
    """Ray makes such subclasses, which hold the original error and read its fields from it."""

    class OfRay(EngineStartFailed):
        code = "of_ray"

        def __init__(self, cause: EngineStartFailed) -> None:
            self.cause = cause

        def __getattr__(self, name: str) -> object:
            return getattr(self.cause, name)

    assert OfRay(EngineStartFailed("llm", "no memory", permanent=True)).permanent is True
