"""Errors of ours as Ray delivers them from another process: one of a class that Ray makes, around the real one."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from registry.errors import RegistryError
from tests.unit.registry.test_errors import ERRORS, example, fields_of


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_delivered_by_ray_has_its_fields(kind: type[RegistryError]) -> None:
    """Each field has its value, not its default, whether the error is unwrapped or not."""
    error = example(kind)
    delivered = RayTaskError("method", "a traceback", error).as_instanceof_cause()
    assert isinstance(delivered, kind)
    for field in fields_of(kind):
        assert getattr(delivered, field.name) == getattr(error, field.name)
