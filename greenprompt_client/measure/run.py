"""``greenprompt measure``: runs an experiment from file to figures, over HTTP only, as a Prompting Service does.

Each repetition requests all its LLMs in one POST, uses one after another as they are handed over,
and releases them. Every answer is on disk before it counts (`results`), so that the next run can
resume an interrupted one. The next run releases the LLMs of the interrupted one, and asks only the
prompts without an answer. Prompts, LLMs and repetitions may be added.

The energy in an answer is provisional. Figures are made from the final windows, which reach the
registry some seconds later. The run fetches them after each lease, and waits for the rest at the
end.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import stamina.instrumentation
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from greenprompt_client.answers import AnswerError
from greenprompt_client.client import ENDED, RegistryClient
from greenprompt_client.held_lease import HeldLease
from greenprompt_client.measure.experiment import Plan
from greenprompt_client.measure.figures import LLMSummary, as_csv, summarized, without_window
from greenprompt_client.measure.prompt_files import Prompt
from greenprompt_client.measure.prompting import LEASE_LOST, Unanswered, answer_of
from greenprompt_client.measure.results import Results
from greenprompt_client.measure.table import notes, results_table
from greenprompt_client.notation import state_words
from registry.accounting.figures import of_kind
from registry.accounting.report_csv import windows_csv
from registry.accounting.window_report import WindowReport
from registry.wire.schemas import LLMConfig, MeasurementState, RequestState
from registry.wire.words import WindowKind

MAX_BARREN_LEASES = 3
"""A run stops using an LLM after this many leases in a row without an answer."""

OF_REQUEST = ("priority", "gpu_type", "grade", "like", "max_joules", "max_gco2eq")
"""Fields of an experiment that are added to each POST, besides its LLMs and the measurementId."""

MAX_UNANSWERED = 3
"""Prompts in a row without an answer after which their lease is given up."""

WINDOWS_WAIT_S = 60.0
"""Longest wait for the final windows after the last answer, seconds."""

WINDOWS_POLL_S = 1.0
"""Seconds between attempts to fetch them."""

SPEED_OVER_S = 3600.0
"""The remaining time is computed from the speed in this last period, seconds, so that it includes starts of LLMs."""


def run_measure(plan: Plan, console: Console, api_key: str | None = None, ca_file: Path | None = None) -> bool:
    """Run or resume an experiment, and show its progress.

    ``api_key`` and ``ca_file``: for a registry that needs them, see ``RegistryClient``.

    However it ends, even by Ctrl-C: LLMs are released, and the folder has the figures of all answers so far.

    Returns:
        False if answers or final windows are missing, or an LLM has refused every prompt.

    Raises:
        BadSettings: The folder can't be used, or can't be written any more.
        AnswerError: The registry refuses the experiment.
        httpx.TransportError: The registry could not be reached for RETRY_FOR_S seconds.
    """
    experiment = plan.experiment
    with (
        RegistryClient(experiment.url, tenant=experiment.tenant, api_key=api_key, ca_file=ca_file) as registry,
        Results(experiment.output, plan, measurement_id=experiment.measurement_id or new_id()) as results,
    ):
        plan = results.plan
        run = _Run(plan, results, registry, console)
        advice = ": repeat the command to continue."
        try:
            run.all()
        except AnswerError as error:
            if not error.passing and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                advice = "."  # a repetition would be refused, too
            raise
        finally:
            found = run.summarize()
            if missing := sum(each.missing for each in found):
                console.print(f"\n{missing} of {plan.answers} answers are missing{advice}")
            if provisional := sum(each.provisional for each in found):
                console.print(f"\n{provisional} answers have no final window yet: repeat the command to fetch it.")
        console.print()
        console.print(results_table(found))
        for line in notes(found, run.measurement):
            console.print(line, style="dim", markup=False, highlight=False)
        console.print(f"Results: {experiment.output}", markup=False, highlight=False, soft_wrap=True)
        return all(each.complete for each in found)


class _Run:
    """One run of ``greenprompt measure``. ``measurement``: its state in the registry, None until the run has ended."""

    def __init__(self, plan: Plan, results: Results, registry: RegistryClient, console: Console) -> None:
        self._plan = plan
        self._experiment = plan.experiment
        self._results = results
        self._registry = registry
        self._console = console
        self._barren: dict[str, int] = dict.fromkeys(plan.llms, 0)
        self._unanswered: set[tuple[str, int, str]] = set()  # left to the next run
        self._ahead: list[tuple[str, str]] = []  # LLMs of the next repetition, with their request ids
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
            speed_estimate_period=SPEED_OVER_S,
        )
        self._bar = self._progress.add_task("", total=plan.answers, completed=results.done)
        self.measurement: MeasurementState | None = None

    def all(self) -> None:
        """Get all missing answers, as far as their LLMs are available."""
        with self._progress, _retries_told(self._say):
            if self._results.begun:
                self._end_dead_run()
            try:
                for repetition in range(1, self._experiment.repetitions + 1):
                    while llms := self._to_do(repetition):
                        self._use_in_turn(llms, repetition)
            finally:
                self._give_back(self._ahead)
            self.measurement = self._measurement()
            self._note_leases(self.measurement)
            self._wait_for_windows()

    def summarize(self) -> list[LLMSummary]:
        """Return the figures by LLM, in the experiment's order, and write them to the folder."""
        each = len(self._plan.prompts) * self._experiment.repetitions
        lines, windows = self._results.answers(), self._results.windows()
        of_llm = {line["requestId"]: line["llm"] for line in self._results.leases()}
        figures = [
            summarized(llm, lines, [each for each in windows if of_llm.get(each.requestId) == llm], expected=each)
            for llm in self._plan.llms
        ]
        measurement = self.measurement
        self._results.write_json(
            "summary.json",
            {
                "measurement_id": self._results.measurement_id,
                "complete": all(each.complete for each in figures),
                "flags": None if measurement is None else measurement.flags,
                "versions": None if measurement is None else measurement.versions,
                "llms": [asdict(each) for each in figures],
            },
        )
        self._results.write("summary.csv", as_csv(figures))
        self._results.write("windows.csv", windows_csv(_named(windows, lines)))
        return figures

    def _wait_for_windows(self) -> None:
        """Fetch the final windows of all leases; wait for at most WINDOWS_WAIT_S seconds."""
        until_s = time.monotonic() + WINDOWS_WAIT_S
        failed = (
            {each.requestId for each in self.measurement.requests if each.status == "failed"}
            if self.measurement
            else set()
        )
        while leases := self._leases_without_windows(failed):
            self._say(f"waiting for the final windows of {len(leases)} leases")
            if not self._fetch(leases) or time.monotonic() >= until_s:
                return
            if self._leases_without_windows(failed):
                time.sleep(WINDOWS_POLL_S)

    def _leases_without_windows(self, failed: Collection[str]) -> list[str]:
        """Return the leases that lack the window of an answer, or their own window, which is written last.

        A failed lease lost its wrapper and has no window of its own.
        """
        windows = self._results.windows()
        answered = [line for line in self._results.answers() if line["error"] is None]
        open_ = {line["request_id"] for line in without_window(answered, windows)}
        ended = {window.requestId for window in of_kind(windows, WindowKind.LEASE)}
        leases = self._results.current_leases()
        return [each for each in leases if each in open_ or (each not in ended and each not in failed)]

    def _fetch(self, request_ids: Sequence[str]) -> bool:
        """Store the windows of these leases that the registry has so far; return False if that fails."""
        try:
            for request_id in request_ids:
                self._results.add_windows(self._registry.windows(self._results.measurement_id, request_id=request_id))
        except (AnswerError, httpx.TransportError) as error:
            self._print(f"Final windows can't be fetched: {str(error) or type(error).__name__}")
            return False
        return True

    def _end_dead_run(self) -> None:
        """Release the requests that the previous run left open, and report how far it came.

        If the registry has lost its measurement and anything is missing, continue with a new
        measurementId.
        """
        measurement = self._measurement()
        held = [] if measurement is None else [each for each in measurement.requests if each.status not in ENDED]
        for state in held:
            self._registry.release(state.requestId)
        if not self._results.resumed:
            return
        released = f"; {len(held)} requests of the last run were released" if held else ""
        self._print(f"Continuing: {self._results.done} of {self._plan.answers} answers exist already{released}.")
        if self._results.grown:
            self._print(f"Added: {', '.join(self._results.grown)}.")
        if measurement is None and (self._results.done < self._plan.answers or self._results.without_window()):
            self._go_on_without(self._results.measurement_id)

    def _go_on_without(self, lost: int) -> None:
        """Continue with a new measurementId, because the registry does not know the previous one."""
        again = self._results.begin_measurement(new_id())
        self._progress.update(self._bar, completed=self._results.done)
        asked = f"; {again} prompts are asked again, because their final windows are lost" if again else ""
        now = self._results.measurement_id
        self._print(f"The registry has no measurement {lost}; continuing as measurement {now}{asked}.")

    def _note_leases(self, measurement: MeasurementState | None) -> None:
        """Record leases that an interrupted run did not record; the registry's report includes them."""
        noted = {line["requestId"] for line in self._results.leases()}
        names = {LLMConfig.model_validate(config).model_dump_json(): llm for llm, config in self._plan.llms.items()}
        for state in () if measurement is None else measurement.requests:
            llm = names.get(LLMConfig.model_validate(state.llmconfig).model_dump_json())
            if llm is not None and state.deployedAt is not None and state.requestId not in noted:
                self._results.add_lease(_lease_line(llm, None, state))

    def _measurement(self) -> MeasurementState | None:
        """Return the registry's state of the measurement, None if it does not know it (yet, or any more)."""
        try:
            return self._registry.measurement(self._results.measurement_id)
        except AnswerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None

    def _to_do(self, repetition: int) -> list[str]:
        """Return the LLMs of a repetition that have open prompts, in their order, without those given up."""
        order = self._plan.order(repetition)
        return [llm for llm in order if self._barren[llm] < MAX_BARREN_LEASES and self._open(llm, repetition)]

    def _open(self, llm: str, repetition: int) -> list[Prompt]:
        return [
            each
            for each in self._plan.prompts
            if not self._results.has(llm, repetition, each.id) and (llm, repetition, each.id) not in self._unanswered
        ]

    def _use_in_turn(self, llms: Sequence[str], repetition: int) -> None:
        """Request LLMs and use one after another; if one is lost, release the rest to keep the order."""
        if [llm for llm, _ in self._ahead] == list(llms):
            waiting, self._ahead = self._ahead, []
        else:  # the first repetition, or the open LLMs have changed since
            self._give_back(self._ahead)
            waiting = self._request(llms)
        try:
            self._results.accept()
            while waiting:
                (llm, request_id), *waiting = waiting
                if not self._use(llm, request_id, repetition, last=not waiting):
                    break
        finally:
            self._give_back(waiting)

    def _request(self, llms: Sequence[str]) -> list[tuple[str, str]]:
        """Request LLMs; return each with its request id."""
        ids = self._registry.request(
            self._results.measurement_id,
            [self._plan.llms[llm] for llm in llms],
            **self._experiment.model_dump(mode="json", include=set(OF_REQUEST)),
            idempotency_key=uuid.uuid4().hex,
        )
        return list(zip(llms, ids, strict=True))

    def _give_back(self, requests: list[tuple[str, str]]) -> None:
        """Release requests that are no longer needed, and remove them from the list."""
        while requests:
            _, request_id = requests.pop()
            self._registry.release(request_id)

    def _ask_ahead(self, repetition: int) -> None:
        """Request the next repetition while this one's last LLM is held, so that the measurement keeps its machine."""
        if repetition < self._experiment.repetitions and (llms := self._to_do(repetition + 1)):
            try:
                self._ahead = self._request(llms)
            except LEASE_LOST as error:
                self._print(f"Repetition {repetition + 1} is requested later: {str(error) or type(error).__name__}")

    def _use(self, llm: str, request_id: str, repetition: int, *, last: bool) -> bool:
        """Let an LLM answer its open prompts once it is deployed; return False if it was lost before the last answer.

        If it is the ``last`` LLM of a repetition, the next repetition is requested before it is released.
        """
        title = f"{llm}, repetition {repetition} of {self._experiment.repetitions}"
        done = self._results.done
        begun_s = time.monotonic()
        try:
            with self._registry.lease(
                request_id, on_change=lambda state: self._say(f"{title}: {state_words(state)}")
            ) as lease:
                self._results.add_lease(_lease_line(llm, repetition, lease.state))
                self._say(f"{title}: warm-up")
                self._ask(lease, llm, repetition, self._warmup(), warmup=True)
                self._say(title)
                self._ask(lease, llm, repetition, self._open(llm, repetition), warmup=False)
                if last:
                    self._ask_ahead(repetition)
            self._fetch([request_id])
        except LEASE_LOST as error:
            self._barren[llm] = 0 if self._results.done > done else self._barren[llm] + 1
            what = "is skipped until the next run" if self._barren[llm] == MAX_BARREN_LEASES else "is requested again"
            self._print(f"{title}: {what}: {str(error) or type(error).__name__}")
            return False
        asked_in_vain = self._results.done == done
        self._barren[llm] = self._barren[llm] + 1 if asked_in_vain else 0
        took_s = time.monotonic() - begun_s
        self._print(f"{title}: {self._results.done - done} answers, {took_s:.1f} s including the wait")
        return True

    def _warmup(self) -> list[Prompt]:
        """Return the warm-up prompts: the first prompts, each with a changed beginning.

        Otherwise the engine's prefix cache would hold beginnings of the counted prompts.
        """
        first = self._plan.prompts[: self._experiment.warmup]
        return [replace(each, question=f"({n}) {each.question}") for n, each in enumerate(first, 1)]

    def _ask(self, lease: HeldLease, llm: str, repetition: int, prompts: Sequence[Prompt], *, warmup: bool) -> None:
        """Send prompts to an LLM with the experiment's concurrency; store each answer as it arrives.

        Raises LEASE_LOST, also after MAX_UNANSWERED prompts in a row without an answer.
        """
        same = {"llm": llm, "repetition": repetition, "warmup": warmup}
        same |= {"request_id": lease.state.requestId, "machine": lease.state.machine}
        pool = ThreadPoolExecutor(self._experiment.concurrency)
        in_vain = 0
        try:
            asked: dict[Future[dict[str, Any]], Prompt] = {
                pool.submit(answer_of, lease, each, self._experiment.prompt_timeout_s, warmup=warmup): each
                for each in prompts
            }
            for answer in as_completed(asked):
                prompt, failed = asked[answer], answer.exception()
                if isinstance(failed, Unanswered):
                    in_vain += 1
                    self._unanswered_by(llm, repetition, prompt, failed, warmup=warmup)
                    if in_vain == MAX_UNANSWERED:
                        raise failed.error
                    continue
                in_vain = 0
                self._results.add({**same, **answer.result(), **same})
                self._progress.update(self._bar, completed=self._results.done)
        finally:
            # Not waited for: prompts in flight end with the lease, which is released next.
            pool.shutdown(wait=False, cancel_futures=True)

    def _unanswered_by(self, llm: str, repetition: int, prompt: Prompt, failed: Unanswered, *, warmup: bool) -> None:
        """Leave a prompt to the next run."""
        if not warmup:
            self._unanswered.add((llm, repetition, prompt.id))
            self._print(f"{llm}, repetition {repetition}: prompt {prompt.id} is not answered: {failed.error}")

    def _say(self, what: str) -> None:
        self._progress.update(self._bar, description=what)

    def _print(self, what: str) -> None:
        self._console.print(what, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _retries_told(say: Callable[[str], None]) -> Iterator[None]:
    """Report retries to the user instead of stamina's log lines."""
    before = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([lambda retry: say(f"trying again: {retry.caused_by}")])
    try:
        yield
    finally:
        stamina.instrumentation.set_on_retry_hooks(before)


def _named(windows: Sequence[WindowReport], lines: Sequence[dict[str, Any]]) -> Iterator[WindowReport]:
    """Yield windows with the client's id of their prompt, taken from the answers."""
    names = {line["window"]: line["prompt"] for line in lines if line.get("window")}
    for window in windows:
        yield replace(window, prompt=names.get(window.window, window.prompt))


def _lease_line(llm: str, repetition: int | None, state: RequestState) -> dict[str, Any]:
    return {"llm": llm, "repetition": repetition, **state.model_dump(mode="json", exclude={"url", "address"})}


def new_id() -> int:
    """Return a new measurementId: microseconds since 1970."""
    return time.time_ns() // 1000
