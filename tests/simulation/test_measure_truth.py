"""Checks the summary of ``greenprompt measure``, on simulated machines, against the final windows and the truth."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import Any

import pytest
import stamina
from pydantic import TypeAdapter
from rich.console import Console, RenderableType

from deployments.serve.energy_pages import report_json
from greenprompt_client.figures_table import READING
from greenprompt_client.measure.experiment import Plan, load_plan
from greenprompt_client.measure.run import run_measure
from greenprompt_client.report.table import report_table
from registry.accounting.report import Gathered, MeasurementReport
from registry.accounting.window_report import WindowReport, window_report
from registry.accounting.windows import KeptWindow
from registry.core.records import Measurement
from registry.service.views import iso as utc_text
from registry.store.store import Store
from registry.wire.schemas import RequestState
from registry.wire.words import WindowKind
from tests.energy_world.driver import MEASUREMENT, TENANT, Run, drive
from tests.energy_world.experiment import Experiment
from tests.energy_world.judge import Judge
from tests.energy_world.machine import KINDS
from tests.energy_world.world import EnergyWorld
from tests.support.energy_windows import iso, request
from tests.support.fake_registry_http import HttpRegistry, Reply, answer

LLMS = ("alpha-8b", "gamma-1b")
PROMPTS, REPETITIONS, WARMUPS = 20, 2, 2
WIDTH = 200


@dataclass
class Measured:
    """An experiment that was measured, with the simulated truth.

    ``run``: what the meter recorded. ``store``: the registry's database with these records. ``folder``: the results of
    ``greenprompt measure``. ``shown``: its output.
    """

    plan: Plan
    run: Run
    store: Store
    folder: Path
    shown: str

    @cached_property
    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the figures of ``summary.json``, by LLM."""
        told = json.loads((self.folder / "summary.json").read_text())
        assert told["complete"]
        return {each["llm"]: each["figures"][0] for each in told["llms"]}

    @cached_property
    def report(self) -> dict[str, Any]:
        """Return the answer of GET /measurements/…/report."""
        requests = [request(lease.id, lease.llm, n) for n, lease in enumerate(self.run.world.history.leases, 1)]
        windows = Gathered(requests, utc_text)
        windows.add(self.store.windows((TENANT, MEASUREMENT)))
        told: dict[str, Any] = json.loads(report_json(Measurement(MEASUREMENT, 1), windows))
        return told

    def counted(self, llm: str) -> list[KeptWindow]:
        """Return the final windows of an LLM's counted prompts."""
        prompts = self.run.prompts
        own = [each for each in self.run.windows if each.window.kind is WindowKind.PROMPT]
        return [e for e in own if (p := prompts[e.window.window_id]).llm == llm and not p.warm_up]


def measured(seed: int, kind: str, in_flight: int, folder: Path) -> Measured:
    """Simulate an experiment on a machine. Then run ``greenprompt measure`` with a registry that has its records."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": f"q{n}", "question": f"Question {n}?"}) + "\n" for n in range(PROMPTS))
    )
    with HttpRegistry() as registry, stamina.set_testing(True, attempts=3):
        plan = load_plan(
            None,
            llms=list(LLMS),
            prompts=prompts,
            output=folder / "out",
            url=registry.url,
            repetitions=REPETITIONS,
            concurrency=in_flight,
            warmup=WARMUPS,
            measurement_id=MEASUREMENT,
        )
        turns = [llm for repetition in range(1, REPETITIONS + 1) for llm in plan.order(repetition)]
        leases = {f"r{n}": llm for n, llm in enumerate(turns)}
        experiment = Experiment(leases, [each.id for each in plan.prompts], WARMUPS, in_flight)
        with EnergyWorld(seed, kind, wrappers=1, history=experiment.history) as world:
            (folder / "machine").mkdir()
            run = drive(world, folder / "machine")
        answer_as(registry, run)
        store = Store.open(f"sqlite:///{folder}/registry.db")
        store.keep_windows(run.windows)
        shown = io.StringIO()
        assert run_measure(plan, Console(file=shown, width=WIDTH))
    return Measured(plan, run, store, folder / "out", shown.getvalue())


def answer_as(registry: HttpRegistry, run: Run) -> None:
    """Let a registry answer prompts with the meter's provisional figures, and serve the windows of the meter."""
    windows: dict[str | None, list[WindowReport]] = {}
    for kept in run.windows:
        told = replace(window_report(kept, None, iso), detail=None)
        windows.setdefault(told.requestId, []).append(told)
    open_ = {
        (prompt.lease_id, f"Question {(prompt.name or '')[1:]}?", prompt.warm_up): window_id
        for window_id, prompt in run.prompts.items()
    }

    def reply(state: RequestState, question: str) -> Reply:
        number, warm_up, text = question.partition(") ")
        name = (state.requestId, text, True) if warm_up else (state.requestId, number, False)
        return 200, answer() | run.answers[open_[name]]

    registry.on_prompt = reply
    registry.on_windows = lambda found: windows[found[0].requestId] if found else []


@contextmanager
def measured_anew(seed: int, kind: str, in_flight: int) -> Iterator[Measured]:
    """Like ``measured``, in a temporary folder that is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(seed, kind, in_flight, Path(folder))
        try:
            yield found
        finally:
            found.store.close()


def judged(made: Measured) -> None:
    """Compare all figures of an experiment with its final windows, the truth and the report."""
    for llm, figures in made.summary.items():
        if any(each.window.total_j is not None for each in made.counted(llm)):
            sums_of_final_windows(made, llm, figures)
            truth(made, llm, figures)
        else:  # a counter can't be read
            assert figures["joules_per_token"]["value"] is None
        report = next(each for each in made.report["llms"] if each["llm"] == llm)
        assert report["figures"] == [figures]
    tables = report_table(TypeAdapter(MeasurementReport).validate_python(made.report))
    in_report = {line.rstrip() for line in printed(tables).splitlines()}
    assert [line for line in shown_tables(made) if line not in in_report] == []


def sums_of_final_windows(made: Measured, llm: str, figures: dict[str, Any]) -> None:
    """The figures of a summary, in JSON and CSV, are sums of the final windows. They don't use the answers' figures."""
    known = [each.window for each in made.counted(llm) if each.window.total_j is not None]
    tokens = sum(made.run.prompts[each.window_id].output_tokens for each in known)
    joules = fsum(each.total_j or 0.0 for each in known)
    assert figures["joules_per_token"]["value"] == pytest.approx(joules / tokens, rel=1e-9)
    assert figures["joules_per_prompt"]["value"] == pytest.approx(joules / len(known), rel=1e-9)
    grams = fsum((each.o_g or 0.0) + (each.m_g or 0.0) for each in known)
    if figures["gco2eq_per_unit"]["value"] is not None:  # None: estimates, which the operator does not allow
        assert figures["gco2eq_per_unit"]["value"] == pytest.approx(grams / tokens, rel=1e-9)
    with (made.folder / "summary.csv").open(newline="") as file:
        [row] = [each for each in csv.DictReader(file) if each["llm"] == llm]
    assert float(row["joules_per_token_value"]) == figures["joules_per_token"]["value"]
    with (made.folder / "windows.csv").open(newline="") as file:
        of_csv = {each["window"]: each["joules"] for each in csv.DictReader(file)}
    assert fsum(float(of_csv[each.window_id]) for each in known) == pytest.approx(joules, rel=1e-9)
    of_moment = fsum(made.run.answers[each.window_id]["energy"]["total_j"] or 0.0 for each in known)
    assert of_moment != pytest.approx(joules, rel=1e-9)


def truth(made: Measured, llm: str, figures: dict[str, Any]) -> None:
    """Bounds and interval contain the truth. The figure differs from the truth by at most its systematic errors.

    Errors of shares cancel in their sum. If all windows are known, the figure is as exact as the counters
    over the stretch.
    """
    judge, found, batch = Judge(made.run), figures["joules_per_token"], figures["batch"]["joules_per_token"]
    details = {each.window.window_id: json.loads(each.window.detail) for each in made.run.windows}
    known = [each for each in made.counted(llm) if each.window.total_j is not None]
    tokens = sum(made.run.prompts[each.window.window_id].output_tokens for each in known)
    true = fsum(judge.truth_j(each, details[each.window.window_id]) for each in known) / tokens
    assert found["bound_low"] <= true <= found["bound_high"]
    assert found["value"] - found["systematic_low"] <= true <= found["value"] + found["systematic_high"]
    if not found["left_out"] and batch["value"] is not None:
        assert abs(found["value"] / true - 1) <= (batch["bound_high"] - batch["bound_low"]) / 2 / batch["value"]


def printed(tables: RenderableType) -> str:
    """Return tables as a terminal shows them."""
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(tables)
    return text.getvalue()


def shown_tables(made: Measured) -> list[str]:
    """Return the lines of the tables that ``greenprompt measure`` has shown."""
    lines = [line.rstrip() for line in made.shown.splitlines()]
    begin, end = (next(n for n, line in enumerate(lines) if line.startswith(word)) for word in ("LLM ", READING))
    assert len(LLMS) * 4 <= end - begin  # two lines (value, interval) per LLM, in each of the two tables
    return lines[begin:end]


@pytest.mark.parametrize(
    ("in_flight", "kind"),
    [
        (4, "h100_intel"),
        pytest.param(1, "calm", marks=pytest.mark.slow),
        pytest.param(1, "gh200", marks=pytest.mark.slow),
        pytest.param(4, "sampled", marks=pytest.mark.slow),
        pytest.param(16, "calm", marks=pytest.mark.slow),
        pytest.param(16, "h200_amd", marks=pytest.mark.slow),
    ],
)
def test_the_summary_is_the_truth(in_flight: int, kind: str) -> None:
    """With 1, 4 and 16 prompts in flight, the summary is the sum of the final windows (1e-9), and contains the truth.

    The report of the registry has the same digits, in its JSON and as a table.
    """
    with measured_anew(1, kind, in_flight) as made:
        judged(made)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_is_the_truth_on_every_machine(kind: str) -> None:
    """The same on every kind of machine, for five more seeds each."""
    for seed in range(2, 7):
        for in_flight in (1, 4, 16):
            with measured_anew(seed, kind, in_flight) as made:
                judged(made)
