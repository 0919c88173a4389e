"""For the tests of runs of ``greenprompt measure``: a registry over HTTP, prompts, and the function that measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina

from tests.support.fake_registry_http import HttpRegistry
from tests.support.measure_runs import QUESTIONS, Measure


@pytest.fixture
def registry() -> Iterator[HttpRegistry]:
    with HttpRegistry() as server, stamina.set_testing(True, attempts=3):
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompts file with the questions."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": each}) + "\n" for each in QUESTIONS))
    return path


@pytest.fixture
def measure(registry: HttpRegistry, prompts: Path, tmp_path: Path) -> Measure:
    return Measure(llms=["org/a", "org/b"], prompts=prompts, output=tmp_path / "out", url=registry.url)
