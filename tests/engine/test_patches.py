"""The tables of patches against the real vLLM and Python: each row notices a rename of what our code uses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from deployments.engine.warm.patches import PYTHON, VLLM, VLLM_ENGINES
from tests.engine.patch_cases import CASES

pytestmark = pytest.mark.vllm

ROWS = {patch.name: patch for patch in (*VLLM, *PYTHON)}


@pytest.fixture(scope="module")
def answers() -> Any:
    """What the check of a start says to each rename, from a process that can be thrown away."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.patch_cases"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_row_has_a_case() -> None:
    """A row that is added to the tables needs a rename that its guard notices."""
    assert CASES.keys() == ROWS.keys()


def test_the_installed_vllm_passes(answers: Any) -> None:
    """Without a rename the checks of the wrapper and of the forkserver name nothing, before and after all others."""
    assert (answers["before"], answers["after"]) == ([None, None], [None, None])


@pytest.mark.parametrize("row", ROWS)
def test_the_check_names_exactly_what_was_renamed(answers: Any, row: str) -> None:
    """One row notices each rename. LLMs start cold for it, and the log line has the name and what needs it.

    The forkserver checks only what is changed in it, and Python.
    """
    patch = ROWS[row]
    for answer in answers["rows"][row]:
        assert answer["noticed"] == [row], answer
        assert answer["renamed"] in answer["wrapper"]
        assert answer["wrapper"].endswith(f"; needed: {patch.why}")
        assert answer["forkserver"] == (answer["wrapper"] if patch in (*VLLM_ENGINES, *PYTHON) else None)
