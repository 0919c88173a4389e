"""Accounts for a wrapper's energy: notes what its time is used for, sums up energy, and writes records of windows.

Every moment of a wrapper is charged once: to a prompt, to the idle time of a lease or of the machine, or to the start
of an LLM. Answering a prompt writes no record: a record is written when its window is final.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Self

from deployments.energy.build import grid_of, sci_settings, sources_of
from deployments.energy.figures import Energy
from deployments.energy.flights import Flight, Flights
from deployments.energy.lease_account import LeaseAccount
from deployments.energy.lease_usage import LeaseUsage
from deployments.energy.meter import Meter
from deployments.energy.record_dates import RecordDates
from deployments.energy.sci import Score
from deployments.energy.scorer import Scorer
from deployments.energy.timeline import Timeline
from deployments.energy.window_log import EnergyLog, energy_json
from deployments.energy.window_writer import Start, WindowWriter
from deployments.machine.machine_cpu import MachineCPU
from deployments.machine.wrapper_activity import WrapperActivity
from deployments.tokens import Tokens
from registry.contract.messages import Belief, LeaseGrant, StartedFor
from registry.contract.windows import EnergyWindow
from registry.settings import EnergySettings


class PromptMeter:
    """The meter of a wrapper for its prompts, leases and LLM starts. Not thread-safe."""

    def __init__(
        self,
        settings: EnergySettings,
        *,
        gpus: int,
        cpus: float | None = None,
        on_machine: int = 1,
        wrapper_id: str = "",
        process: str = "",
        utc_s: Callable[[], float] = time.time,
        wrapper_activity: WrapperActivity | None = None,
        writes_text: Callable[[str], bool] = lambda _llmconfig: True,
    ) -> None:
        """Probe this machine's counters with real calls.

        ``gpus``: how many GPUs the wrapper holds; ``cpus``: how many CPUs are its own, None for all
        of the machine; ``on_machine``: how many wrappers share it. ``process``: id of the wrapper's
        process. ``utc_s``: the clock that dates records. ``wrapper_activity`` records when prompts
        and LLM starts begin and end, and says when other wrappers work. ``writes_text``: whether
        the LLM of an llmconfig (JSON) answers with text.

        Raises:
            BadSettings: The grid zone is unknown, or a figure of the CPU model is out of range.
        """
        self._writes_text = writes_text
        self._sci = sci_settings(settings)
        self._grid = grid_of(settings)
        self._grid_json = None if self._grid is None else asdict(self._grid)
        self._wrapper_activity = wrapper_activity
        others_worked = (lambda: False) if wrapper_activity is None else wrapper_activity.others_worked
        machine = MachineCPU(os.getpid(), others=dict if wrapper_activity is None else wrapper_activity.processes)
        self._meter = Meter(
            sources_of(self._sci, gpus, cpus, machine, on_machine),
            poll_s=settings.poll_s,
            others_worked=others_worked,
            strangers=machine.strangers,
        )
        self._process = process
        self._flights = Flights()
        self._timeline: Timeline[LeaseAccount] = Timeline(self._meter.mark())
        self._scorer = Scorer(self._meter, self._flights, self._sci, self._grid)
        self._usage = LeaseUsage(self._scorer, self._timeline)
        self._log = EnergyLog(wrapper_id, process)
        dates = RecordDates(self._meter.mark, utc_s)
        self._writer = WindowWriter(self._scorer, self._flights, self._timeline, self._log, dates)
        self._begun = 0
        self._load: Energy | None = None

    @property
    def counts_words(self) -> bool:
        """Whether the functional unit is words, so that answers must be read."""
        return self._sci.functional_unit == "word"

    def start(self) -> None:
        """Start polling the counters. Accounting begins when this returns, within a second."""
        self._meter.start()
        self._timeline.resume(self._meter.mark())

    def stop(self) -> None:
        """Stop polling."""
        self._meter.stop()

    def describe(self) -> dict[str, object]:
        """Return what is counted and how, what is not and why, and the energy of the last LLM start, as plain JSON."""
        load = None if self._load is None else energy_json(self._load)
        windows = {"kept": len(self._log), "dropped": self._log.dropped}
        return {**self._meter.describe(), "last_load": load, "windows": windows}

    # --- what the wrapper is used for -------------------------------------------------------------------

    def hand_over(self, grant: LeaseGrant | None, at_s: float) -> None:
        """Charge the wrapper's time from ``at_s`` on to this lease, None: to no lease.

        If it is the same lease, only its limits are updated. ``at_s`` is in seconds of
        `time.monotonic`. The previous lease ends when its last prompt is over.
        """
        holder = self._timeline.holder
        if holder is not None and grant is not None and holder.grant.request_id == grant.request_id:
            holder.grant = grant
            self._timeline.stay()
            return
        at_s = min(at_s, self._meter.mark())
        account = None
        if grant is not None:
            account = LeaseAccount(grant, at_s, self._writer.model, self._writes_text(grant.llmconfig))
        self._timeline.hand_over(account, at_s)

    @contextmanager
    def load(self, model: str = "", started_for: StartedFor | None = None) -> Iterator[Start]:
        """Charge the time in this context, an LLM start, to the request ``started_for`` (None: to none).

        The time is never charged to a lease.
        """
        start = Start(model, self._meter.mark(), started_for=started_for)
        self._timeline.pause(start.start_s)
        self._meter.work_begins(start.start_s)
        try:
            with self.at_work():
                yield start
        finally:
            start.end_s = self._meter.mark()
            self._meter.work_ends(start.end_s)
            self._writer.started(start)
            if self._timeline.holder is not None:
                self._timeline.holder.model = model
            self._timeline.resume(start.end_s)
            if start.end_s > start.start_s:
                self._load = self._meter.window(start.start_s, start.end_s, estimate_short=True)

    @property
    def meter(self) -> Meter:
        """The underlying meter."""
        return self._meter

    def at_work(self) -> AbstractContextManager[None]:
        """Return a context for work that disturbs the measurements of other wrappers."""
        return nullcontext() if self._wrapper_activity is None else self._wrapper_activity.busy()

    def prompt(
        self, endpoint: str = "process_prompt", *, warmup: bool = False, prompt_id: str | None = None
    ) -> MeteredPrompt:
        """Note that a prompt begins; the end of the returned context ends it.

        A ``warmup`` does not belong to the counted stretch of its lease. ``prompt_id``: the client's name for it.
        """
        if self._wrapper_activity is not None:
            self._wrapper_activity.begin()
        self._begun += 1
        flight = Flight(self._meter.mark(), endpoint=endpoint, account=self._timeline.holder, warmup=warmup)
        flight.window_id = f"{self._process}-p{self._begun}"
        flight.prompt_id = prompt_id
        self._flights.begin(flight)
        self._meter.work_begins(flight.start_s)
        self._timeline.begin(flight.start_s)
        if flight.account is not None:
            flight.account.unwritten += 1
            flight.account.counted.begin(flight.start_s, warmup=warmup)
        return MeteredPrompt(flight, self._end, self._flights.counted, self._cost, self._grid_json)

    def _end(self, flight: Flight) -> None:
        now_s = self._meter.mark()
        if self._flights.end(flight, now_s):
            self._meter.work_ends(now_s)
            self._timeline.end(now_s)
            if flight.account is not None:
                flight.account.counted.end(now_s, warmup=flight.warmup)
            if self._wrapper_activity is not None:
                self._wrapper_activity.end()

    # --- what it costs ----------------------------------------------------------------------------------

    def _cost(self, flight: Flight) -> tuple[Energy, Score, Sequence[str]]:
        energy, found = self._scorer.prompt(flight)
        return energy, found, [*found.flags, *self._usage.budget_flags(flight.account)]

    def use(self) -> dict[str, Any] | None:
        """Return what the lease has used so far, idle time included, and its budget; None without a lease."""
        return self._usage.so_far()

    def require_budget(self) -> None:
        """Raise BudgetUsed if the lease has used up its budget."""
        self._usage.require_budget()

    # --- what is written down ---------------------------------------------------------------------------

    async def windows(self, belief: Belief) -> tuple[EnergyWindow, ...]:
        """Return the oldest finished windows that the registry has not stored yet.

        Windows that it has stored are dropped first; a ``belief`` about an earlier process is ignored.
        """
        if belief.as_of is not None and belief.as_of.process == self._process:
            self._log.confirm(belief.windows_kept)
        self._timeline.cut(self._meter.mark())
        await self.write()
        return self._log.oldest()

    async def write(self) -> None:
        """Write every window that is final or has waited long enough.

        Records never change, and prompts and idle time add up to their lease. A figure that is
        still unknown when its record is written stays unavailable.
        """
        await self._writer.write()


class MeteredPrompt:
    """One prompt on a `PromptMeter`, as a context: at its exit the prompt ends. ``flight`` has the prompt's data."""

    __slots__ = ("_cost", "_count", "_end", "_grid", "flight")

    def __init__(
        self,
        flight: Flight,
        end: Callable[[Flight], None],
        count: Callable[[Flight, Tokens], None],
        cost: Callable[[Flight], tuple[Energy, Score, Sequence[str]]],
        grid: Mapping[str, Any] | None,
    ) -> None:
        """``cost`` returns the energy, score and flags of an ended prompt; ``grid`` goes into its account."""
        self.flight = flight
        self._end = end
        self._count = count
        self._cost = cost
        self._grid = grid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Note that the prompt is over, answered or not. Idempotent."""
        self._end(self.flight)

    def counted(self, tokens: Tokens) -> None:
        """Note its tokens."""
        self._count(self.flight, tokens)

    def refused(self) -> None:
        """Note that the engine refused it before computing anything: no tokens and no words."""
        self.flight.status, self.flight.words = "refused", 0
        self.counted(Tokens(0, 0, 0))

    def account(self, *, usage: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
        """Note that the prompt, which has ended, is answered; return its energy and carbon, for the answer.

        Args:
            usage: The token counts of vLLM's answer, as in `tokens_of`.
            answer: The generated text, None if it was not read.

        Returns:
            ``sci_score`` (gCO2eq per unit, or None), ``sci_method``, ``sci_low``, ``sci_high``,
            ``unit``, ``units``, ``energy``, ``carbon``, ``methods``, ``flags``; the id of the
            ``window`` that will have the final figures, and ``final``: false, as these are
            provisional.

        Raises:
            KeyError: ``usage`` has no token counts.
        """
        energy, found, flags = self._answered(usage, answer)
        return {
            "window": self.flight.window_id,
            "final": False,
            "sci_score": found.sci_score,
            "sci_method": found.method,
            "sci_low": found.low,
            "sci_high": found.high,
            "unit": found.unit,
            "units": found.units,
            "energy": energy_json(energy),
            "carbon": {"o_g": found.o_g, "m_g": found.m_g, "grid": self._grid},
            "methods": dict(found.methods),
            "flags": flags,
        }

    def brief(self, *, usage: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
        """Do the same as `account`, but return fewer fields, for a header or the end of a stream. Raises KeyError."""
        energy, found, flags = self._answered(usage, answer)
        return {
            "window": self.flight.window_id,
            "final": False,
            "sci_score": found.sci_score,
            "sci_method": found.method,
            "sci_low": found.low,
            "sci_high": found.high,
            "unit": found.unit,
            "joules": energy.total_j,
            "joules_low": energy.low_j,
            "joules_high": energy.high_j,
            "label": energy.label,
            "o_g": found.o_g,
            "m_g": found.m_g,
            "flags": flags,
        }

    def _answered(self, usage: Mapping[str, Any], answer: str | None) -> tuple[Energy, Score, Sequence[str]]:
        self.flight.status = "answered"
        self.counted(tokens_of(usage))
        self.flight.words = None if answer is None else len(answer.split())
        return self._cost(self.flight)


def tokens_of(usage: Mapping[str, Any]) -> Tokens:
    """Return the tokens that one of vLLM's APIs reports: OpenAI's chats, completions or responses, or Anthropic's.

    Raises:
        KeyError: No tokens are reported.
    """
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens")
    if "prompt_tokens" in usage:
        prompt, output = usage["prompt_tokens"], usage.get("completion_tokens")
    else:
        prompt, output = usage["input_tokens"], usage.get("output_tokens")
        if "cache_read_input_tokens" in usage:  # Anthropic's input tokens exclude those read from or put in a cache
            cached = usage["cache_read_input_tokens"]
            prompt += (cached or 0) + (usage.get("cache_creation_input_tokens") or 0)
    return Tokens(prompt, cached, output or 0)
