"""What a wrapper's time cost: notes what it is used for, and turns the meter's windows into accounts and records.

Every moment of a wrapper is charged once: to a prompt, to the idle time of a lease or of the machine, or to the start
of an LLM. While a prompt is answered nothing is written down: that is done when a window will not get any sharper.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from deployments.energy.counters.probe import ReadFailed, Unreadable, gpu_uuids, probe_sources
from deployments.energy.counters.zeus import zeus_gpus
from deployments.energy.figures import CPUModel, Embodied, Energy, GridIntensity, SCISettings
from deployments.energy.flights import Flight, Flights, Tokens
from deployments.energy.lease_account import LeaseAccount
from deployments.energy.lease_usage import LeaseUsage
from deployments.energy.meter import Meter
from deployments.energy.record_dates import RecordDates
from deployments.energy.sci import Score, grid_intensity
from deployments.energy.scorer import Scorer
from deployments.energy.timeline import Timeline
from deployments.energy.window_log import EnergyLog, as_json
from deployments.energy.window_writer import Start, WindowWriter
from deployments.machine.machine_cpu import MachineCPU
from deployments.machine.neighbours import Neighbours
from registry.contract.messages import Belief, LeaseGrant, StartedFor
from registry.core.records import EnergyWindow
from registry.errors import BadSettings
from registry.settings import EnergySettings


class PromptMeter:
    """The meter of a wrapper, as its prompts, its leases and its LLMs see it. Not thread-safe."""

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
        neighbours: Neighbours | None = None,
        writes_text: Callable[[str], bool] = lambda _llmconfig: True,
    ) -> None:
        """Probe this machine's counters by real calls.

        ``gpus``: how many GPUs the wrapper holds; ``cpus``: how many CPUs are its own, None for all of the machine;
        ``on_machine``: how many wrappers share it.
        ``process`` is the wrapper's, ``utc_s`` the clock that records are dated by. ``neighbours`` are told when
        prompts and starts begin and end, and flag the windows in which others work. ``writes_text`` says of an
        llmconfig (JSON) whether its LLM answers with text.

        Raises:
            BadSettings: the grid zone is unknown, or a figure of the CPU model is out of range.
        """
        self._writes_text = writes_text
        self._sci = sci_settings(settings)
        self._grid = grid_of(settings)
        self._grid_json = None if self._grid is None else asdict(self._grid)
        self._neighbours = neighbours
        others_worked = (lambda: False) if neighbours is None else neighbours.others_worked
        machine = MachineCPU(os.getpid(), others=dict if neighbours is None else neighbours.processes)
        self._meter = Meter(
            _sources(self._sci, gpus, cpus, machine, on_machine),
            poll_s=settings.poll_s,
            others_worked=others_worked,
            strangers=machine.strangers,
        )
        self._process = process
        self._flights = Flights()
        self._timeline: Timeline[LeaseAccount] = Timeline(self._meter.mark())
        self._scorer = Scorer(self._meter, self._flights, self._sci, self._grid)
        self._usage = LeaseUsage(self._scorer, self._timeline)
        self._log = EnergyLog(wrapper_id, process, grid=self._grid, embodied=self._sci.embodied, pue=self._sci.pue)
        dates = RecordDates(self._meter.mark, utc_s)
        self._writer = WindowWriter(self._scorer, self._flights, self._timeline, self._log, dates)
        self._begun = 0
        self._load: Energy | None = None

    @property
    def counts_words(self) -> bool:
        """Whether the functional unit is words, so that answers have to be read."""
        return self._sci.functional_unit == "word"

    def start(self) -> None:
        """Begin to poll the counters. The wrapper's time begins when they can tell of it: within a second."""
        self._meter.start()
        self._timeline.resume(self._meter.mark())

    def stop(self) -> None:
        """End polling."""
        self._meter.stop()

    def describe(self) -> dict[str, object]:
        """What is counted and how, what is not and why; the energy of the last start of an LLM. Plain JSON."""
        load = None if self._load is None else as_json(self._load)
        windows = {"kept": len(self._log), "dropped": self._log.dropped}
        return {**self._meter.describe(), "last_load": load, "windows": windows}

    # --- what the wrapper is used for -------------------------------------------------------------------

    def hand_over(self, grant: LeaseGrant | None, at_s: float) -> None:
        """The wrapper is this lease's from now on, None: nobody's. The same lease again only brings its new limits.

        ``at_s`` is the time by `time.monotonic`; the lease before ends when its last prompt is over.
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
        """The start of an LLM: charged to the request that it is for, None: to none, and to no prompt and no lease."""
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
        """The meter itself."""
        return self._meter

    def at_work(self) -> AbstractContextManager[None]:
        """What is done meanwhile disturbs the measurements of other wrappers."""
        return nullcontext() if self._neighbours is None else self._neighbours.busy()

    def begin(self, endpoint: str = "process_prompt", *, warmup: bool = False, prompt_id: str | None = None) -> Flight:
        """A prompt begins now. A ``warmup`` is not part of the counted stretch of its lease."""
        if self._neighbours is not None:
            self._neighbours.begin()
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
        return flight

    def end(self, flight: Flight) -> None:
        """A prompt is over, answered or not. Idempotent."""
        now_s = self._meter.mark()
        if self._flights.end(flight, now_s):
            self._meter.work_ends(now_s)
            self._timeline.end(now_s)
            if flight.account is not None:
                flight.account.counted.end(now_s, warmup=flight.warmup)
            if self._neighbours is not None:
                self._neighbours.end()

    def counted(self, flight: Flight, tokens: Tokens) -> None:
        """A prompt's tokens are known."""
        self._flights.counted(flight, tokens)

    def refused(self, flight: Flight) -> None:
        """The engine has refused a prompt before it computed anything: it has brought nothing, and that is known."""
        flight.status, flight.words = "refused", 0
        self._flights.counted(flight, Tokens(0, 0, 0))

    # --- what it costs ----------------------------------------------------------------------------------

    def account(self, flight: Flight, *, usage: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
        """The part of an answer that tells what it cost.

        Args:
            flight: a prompt that has ended.
            usage: vLLM's own account: ``prompt_tokens``, ``completion_tokens``.
            answer: the text that was generated, None if it was not looked at.

        Returns:
            ``sci_score`` (gCO2eq per unit, or None), ``sci_method``, ``sci_low``, ``sci_high``, ``unit``, ``energy``,
            ``carbon``, ``methods``, ``flags``; the id of the ``window`` that will have the final figures, and
            ``final``: false, as these are of the moment.
        """
        energy, found, flags = self._told(flight, usage, answer)
        return {
            "window": flight.window_id,
            "final": False,
            "sci_score": found.sci_score,
            "sci_method": found.method.value,
            "sci_low": found.low,
            "sci_high": found.high,
            "unit": found.unit,
            "units": found.units,
            "energy": as_json(energy),
            "carbon": {"o_g": found.o_g, "m_g": found.m_g, "grid": self._grid_json},
            "methods": dict(found.methods),
            "flags": flags,
        }

    def brief(self, flight: Flight, *, usage: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
        """The same for a header, and for the end of a stream."""
        energy, found, flags = self._told(flight, usage, answer)
        return {
            "window": flight.window_id,
            "final": False,
            "sci_score": found.sci_score,
            "sci_method": found.method.value,
            "sci_low": found.low,
            "sci_high": found.high,
            "unit": found.unit,
            "joules": energy.total_j,
            "joules_low": energy.low_j,
            "joules_high": energy.high_j,
            "label": energy.label.value,
            "o_g": found.o_g,
            "m_g": found.m_g,
            "flags": flags,
        }

    def _told(
        self, flight: Flight, usage: Mapping[str, Any], answer: str | None
    ) -> tuple[Energy, Score, Sequence[str]]:
        flight.status = "answered"
        self.counted(flight, tokens_of(usage))
        flight.words = None if answer is None else len(answer.split())
        energy, found = self._scorer.prompt(flight)
        return energy, found, [*found.flags, *self._usage.budget_flags(flight.account)]

    def use(self) -> dict[str, Any] | None:
        """What the lease has cost so far, idle time included, and its budget; None without a lease."""
        return self._usage.so_far()

    def require_budget(self) -> None:
        """Raise BudgetUsed if the lease has used up what it may."""
        self._usage.require_budget()

    # --- what is written down ---------------------------------------------------------------------------

    async def windows(self, belief: Belief) -> tuple[EnergyWindow, ...]:
        """The oldest finished windows that the registry has not written down yet.

        What it believes of a process before this one says nothing of these.
        """
        if belief.as_of is not None and belief.as_of.process == self._process:
            self._log.confirm(belief.windows_kept)
        self._timeline.cut(self._meter.mark())
        await self.write()
        return self._log.oldest()

    async def write(self) -> None:
        """Write down every window that will not get any sharper, or has waited for long enough.

        What is written is final: prompts and idle time add up to their lease. What is not known in time is unavailable.
        """
        await self._writer.write()


def sci_settings(settings: EnergySettings) -> SCISettings:
    """The operator's choices as the formula takes them. Raises BadSettings."""
    embodied = None if settings.embodied is None else Embodied(**settings.embodied.model_dump())
    cpu_model = None if settings.cpu_model is None else CPUModel(**settings.cpu_model.model_dump())
    return SCISettings(
        pue=settings.pue,
        functional_unit=settings.functional_unit,
        allow_estimates=settings.allow_estimates,
        embodied=embodied,
        cpu_model=cpu_model,
    )


def grid_of(settings: EnergySettings) -> GridIntensity | None:
    """The configured carbon intensity, None if none is. Raises BadSettings for an unknown zone."""
    grid = settings.grid
    if grid is None:
        return None
    low, high = grid.low_gco2eq_per_kwh, grid.high_gco2eq_per_kwh
    if grid.zone is not None:
        return replace(grid_intensity(grid.zone), year=grid.year, low=low, high=high)
    if grid.gco2eq_per_kwh is None or grid.source is None:
        raise BadSettings("energy.grid", "needs zone, or gco2eq_per_kwh with source, and year or date")
    version = grid.date or str(grid.year)
    return GridIntensity(grid.gco2eq_per_kwh, None, grid.source, version, grid.year, grid.source, low, high)


def _sources(
    settings: SCISettings, gpus: int, cpus: float | None, machine: MachineCPU | None = None, on_machine: int = 1
) -> list[Any]:
    others: list[Any] = []
    uuids: tuple[str, ...] = ()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        try:
            uuids = gpu_uuids(visible)
            if len(uuids) != gpus:
                raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible} names {len(uuids)} GPUs, not the {gpus} reserved")
        except ReadFailed as error:
            # Inside the boundary all the same: without all of them no total is known. Zeus may know them.
            others = zeus_gpus(gpus) or [Unreadable(f"gpu:{visible}", str(error), in_boundary=True)]
    probed = probe_sources(uuids, pid=os.getpid(), settings=settings, cpus=cpus, machine=machine, on_machine=on_machine)
    return [*probed, *others]


def tokens_of(usage: Mapping[str, Any]) -> Tokens:
    """Tokens as one of vLLM's APIs tells them: OpenAI's chats and completions, or its responses, or Anthropic's.

    Raises:
        KeyError: it tells none.
    """
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens")
    if "prompt_tokens" in usage:
        prompt, output = usage["prompt_tokens"], usage.get("completion_tokens")
    else:
        prompt, output = usage["input_tokens"], usage.get("output_tokens")
        if "cache_read_input_tokens" in usage:  # Anthropic's input tokens are those that no cache has to do with
            cached = usage["cache_read_input_tokens"]
            prompt += (cached or 0) + (usage.get("cache_creation_input_tokens") or 0)
    return Tokens(prompt, cached, output or 0)
