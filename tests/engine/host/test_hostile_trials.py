"""Hostile tokenizers and chat templates in the process that tries them, with a real vLLM."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from deployments.engine import checkpoint_trial
from deployments.engine.checkpoint_trial import CheckpointTrial, Tokenizer, TrialFailed, attempt
from deployments.engine.host import EngineHost
from deployments.engine.warm.forkserver import run_apart
from tests.engine.host.started import engines_of
from tests.support.hostile.tokenizers import ROWS, HostileTokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="package")]

CPU_S, MEMORY_BYTES, WALL_S = 1, 2**30, 60.0
"""Limits of a trial: seconds, bytes, seconds. The last one lets no row hang; the first ones end it."""


def files_in(folder: Path) -> list[Path]:
    """All that is in a folder, at any depth."""
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if row.quick else pytest.mark.long) for row in ROWS]
)
async def test_a_hostile_tokenizer_ends_within_limits(
    host: EngineHost, llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: HostileTokenizer
) -> None:
    """It is found, or it is over; nothing of it runs outside the trial, and nothing is left."""
    folder = tmp_path / "llm"
    shutil.copytree(llms / "a", folder)
    row.change(folder)
    before = files_in(tmp_path)
    assert host._prepared.forkserver is not None
    context = host._prepared.forkserver.context

    def attempt_here() -> str | None:
        os.chdir(tmp_path)  # what a template creates is seen there
        return attempt(Tokenizer(str(folder)), CPU_S, MEMORY_BYTES)

    def run(_function: object) -> str | None:
        return run_apart(context, attempt_here, WALL_S)

    monkeypatch.setattr(checkpoint_trial, "CPU_S", CPU_S)  # the reason names it
    passing = asyncio.to_thread(CheckpointTrial().passes, Tokenizer(str(folder)), run, WALL_S)
    if row.problem is None:
        await passing
    else:
        with pytest.raises(TrialFailed, match=row.problem):
            await passing
    assert engines_of(host) == set()
    assert files_in(tmp_path) == before
