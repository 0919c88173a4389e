"""For all unit tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_engine_is_loaded() -> Iterator[None]:
    """No unit test imports vLLM or torch while it runs; tests/unit/test_house.py looks at the imports of modules."""
    before = {"vllm", "torch"} & sys.modules.keys()
    yield
    assert {"vllm", "torch"} & sys.modules.keys() <= before
