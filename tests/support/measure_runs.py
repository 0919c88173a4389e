"""Runs of ``greenprompt measure`` against a registry over real HTTP, and what they have written."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from greenprompt_client.measure.experiment import load_plan
from greenprompt_client.measure.run import run_measure

LIMIT_S = 60
"""Longest wait for something that takes milliseconds."""

QUESTIONS = [f"Question {n}?" for n in range(1, 6)]


class Measure:
    """Measures two LLMs by the prompts, into the folder ``out``; ``shown`` is what the last run showed."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self.shown = ""

    def __call__(self, **fields: Any) -> bool:
        out = io.StringIO()
        try:
            return run_measure(load_plan(None, **self._fields | fields), Console(file=out, width=200))
        finally:
            self.shown = out.getvalue()


def lines(folder: Path, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def counted(folder: Path) -> Counter[tuple[str, int, str]]:
    """How many answers that count there are for each LLM, repetition and prompt."""
    return Counter((line["llm"], line["repetition"], line["prompt"]) for line in lines(folder) if not line["warmup"])


def every_prompt_once(folder: Path, llms: Sequence[str] = ("org/a", "org/b"), repetitions: int = 1) -> bool:
    wanted = {(llm, r, str(n + 1)) for llm in llms for r in range(1, repetitions + 1) for n in range(len(QUESTIONS))}
    return counted(folder) == Counter(wanted)


def summary_of(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return told
