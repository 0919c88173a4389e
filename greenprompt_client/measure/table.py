"""Shows an experiment to people: its figures as tables, and notes for reading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType

from greenprompt_client.figures_table import READING, batch_table, parts, problems, prompts_table, rows_of, short_name
from greenprompt_client.measure.figures import LLMSummary
from greenprompt_client.notation import LEGEND
from registry.wire.schemas import MeasurementState


def results_table(summaries: Sequence[LLMSummary]) -> RenderableType:
    """Return the table of prompts and, if there are any, that of leases' counted stretches."""
    rows = rows_of([(each.llm, each.figures) for each in summaries])
    tables = prompts_table(rows), batch_table(rows)
    return Group(*(table for table in tables if table is not None))


def notes(summaries: Sequence[LLMSummary], measurement: MeasurementState | None) -> Iterator[str]:
    """Yield the notes for reading the tables, one sentence each."""
    yield READING
    yield f"{LEGEND}."
    for each in summaries:
        name = short_name(each.llm)
        if each.provisional:
            lack = f"{each.provisional} of {each.answers} answers have no final window yet, and are in no figure"
            yield f"{name}: provisional: {lack}."
        if each.errors and not each.answers:
            yield f"{name}: refused all {each.errors} prompts; the reason of the first refusal: {each.refusal}"
        elif each.errors:
            yield f"{name}: refused prompts: {each.errors}; answers.jsonl says why."
        if each.missing:
            yield f"{name}: answers still missing: {each.missing}."
        if not each.figures:
            yield f"{name}: no final window has arrived, so no figure is known."
        for figures in each.figures:
            if figures.flags:
                yield f"{name}: flags: {', '.join(f'{flag} ({count})' for flag, count in figures.flags.items())}"
    rows = rows_of([(each.llm, each.figures) for each in summaries])
    yield from parts(rows)
    yield from problems(rows)
    if measurement is not None and measurement.flags:
        yield f"The measurement's flags: {', '.join(measurement.flags)}"
