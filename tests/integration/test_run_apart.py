"""A process apart whose answer is too long."""

from __future__ import annotations

import multiprocessing

import pytest

from deployments.engine.warm.forkserver import ANSWER_BYTES, run_apart


def test_a_long_answer_is_refused() -> None:
    """It is not read into memory, and its process is ended."""
    with pytest.raises(RuntimeError, match=f"longer than {ANSWER_BYTES} bytes"):
        run_apart(multiprocessing.get_context("fork"), lambda: "x" * (ANSWER_BYTES + 1), 30)
    assert multiprocessing.active_children() == []
