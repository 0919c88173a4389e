"""``python -m tests.bench.engine`` on a machine with GPUs, where starts alone are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import engine, starts
from tests.bench.report import Result, counted


def test_starts_need_no_pytest() -> None:
    """The environment of ``make bench-gpu`` has what wrappers need, and nothing for tests."""
    program = "import sys; sys.modules['pytest'] = None; import tests.bench.engine"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("gpus", "given", "visible"), [("0", None, None), ("2", None, "0,1"), ("1", "GPU-7", "GPU-7"), ("0", "", "")]
)
def test_the_host_is_told_its_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: str, given: str | None, visible: str | None
) -> None:
    """They are the first ones, unless whoever calls has chosen; without them no LLM sleeps."""
    seen = []

    async def measure(*_: object) -> list[Result]:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [counted("engine", "stop_s", 1.0, "s", of=1)]

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(starts, "measure", measure)
    assert engine.main(["--only", "starts", "--gpus", gpus, "--output", str(tmp_path / "results.json")]) == 0
    assert seen == [visible]
