"""Summarises an experiment by LLM from its answers and final windows. Unknown values are counted, never taken as 0."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.accounting.figures import Figure, MachineFigures, figures_of, of_kind
from registry.accounting.window_report import WindowReport
from registry.wire.words import WindowKind

FIGURES = (
    "gco2eq_per_unit",
    "operational_per_unit",
    "embodied_per_unit",
    "joules_per_token",
    "joules_per_prompt",
    "seconds_per_prompt",
    "with_idle",
)
BATCH_FIGURES = ("joules_per_token", "gco2eq_per_unit")
_ABOUT = ("machine", "prompts", "warmups", "units", "output_tokens")
_ABOUT_BATCH = ("leases", "prompts", "output_tokens", "seconds", "in_flight_max", "in_flight_mean")


@dataclass(frozen=True, slots=True)
class LLMSummary:
    """The results of an experiment for one LLM.

    ``answers``: answered prompts; ``provisional`` of them have no final window yet and are in no figure. ``errors``:
    refused prompts; ``refusal`` is the first reason. ``missing``: prompts without answer or error. ``figures`` use all
    final windows of its leases, as in the report, separately for each machine.
    """

    llm: str
    answers: int
    errors: int
    missing: int
    provisional: int
    refusal: str | None
    figures: tuple[MachineFigures, ...]

    @property
    def complete(self) -> bool:
        """Whether each prompt was answered or refused, at least one was answered, and all figures are final."""
        return bool(self.answers) and not self.missing and not self.provisional


def summarized(
    llm: str, lines: Sequence[Mapping[str, Any]], windows: Sequence[WindowReport], *, expected: int
) -> LLMSummary:
    """Summarise the answers of an LLM (``expected`` in total) and the final windows of its leases."""
    counted = [line for line in lines if line["llm"] == llm and not line["warmup"]]
    answers = [line for line in counted if line["error"] is None]
    return LLMSummary(
        llm=llm,
        answers=len(answers),
        errors=len(counted) - len(answers),
        missing=expected - len(counted),
        provisional=len(without_window(answers, windows)),
        refusal=next((line["error"].get("message") for line in counted if line["error"] is not None), None),
        figures=figures_of(windows),
    )


def without_window(answers: Sequence[Mapping[str, Any]], windows: Sequence[WindowReport]) -> list[Mapping[str, Any]]:
    """Return the answers without a final window.

    If an answer does not name its window, its window exists once the window of its lease exists, because
    that is written after all windows of the prompts.
    """
    there = {window.window for window in windows}
    ended = {window.requestId for window in of_kind(windows, WindowKind.LEASE)}
    return [
        answer
        for answer in answers
        if (answer["window"] not in there if answer.get("window") else answer["request_id"] not in ended)
    ]


def as_csv(summaries: Sequence[LLMSummary]) -> str:
    """Return a CSV row per LLM and machine; unknown values are empty."""
    text = io.StringIO()
    plain = ("llm", "answers", "errors", "missing", "provisional")
    names = Figure.__dataclass_fields__
    columns = [*plain, *_ABOUT, *(f"{name}_{part}" for name in FIGURES for part in names)]
    columns += [f"batch_{name}" for name in _ABOUT_BATCH]
    columns += [f"batch_{name}_{part}" for name in BATCH_FIGURES for part in names]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for each in summaries:
        row = {name: getattr(each, name) for name in plain}
        writer.writerows([row | _cells(of_machine) for of_machine in each.figures] or [row])
    return text.getvalue()


def _cells(figures: MachineFigures) -> dict[str, Any]:
    cells = {name: getattr(figures, name) for name in _ABOUT}
    for name in FIGURES:
        cells |= {f"{name}_{part}": value for part, value in asdict(getattr(figures, name)).items()}
    batch = figures.batch
    if batch is not None:
        cells |= {f"batch_{name}": getattr(batch, name) for name in _ABOUT_BATCH}
        for name in BATCH_FIGURES:
            cells |= {f"batch_{name}_{part}": value for part, value in asdict(getattr(batch, name)).items()}
    return cells
