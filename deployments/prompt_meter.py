"""What a wrapper's time cost: notes what it is used for, and turns the meter's windows into accounts and records.

Every moment of a wrapper is charged once: to a prompt, to the idle time of a lease or of the machine, or to the start
of an LLM. While a prompt is answered nothing is written down: that is done when a window will not get any sharper.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from deployments.attribution import Flow
from deployments.energy import CPUModel, Embodied, Energy, GridIntensity, SCISettings
from deployments.energy_log import EnergyLog, Record, as_json
from deployments.energy_sources import ReadFailed, Unreadable, gpu_uuids, probe_sources
from deployments.flights import Flight, Flights, Tokens
from deployments.lease_account import Budget, LeaseAccount
from deployments.machine_cpu import MachineCPU
from deployments.meter import Meter
from deployments.neighbours import Neighbours
from deployments.sci import Score, grid_intensity, score
from deployments.timeline import Interval, Stretch, Timeline
from deployments.zeus_source import zeus_gpus
from registry.errors import BadSettings
from registry.reconcile import Belief, LeaseGrant
from registry.settings import EnergySettings
from registry.state import EnergyWindow, WindowKind

SETTLE_S = 30.0
"""How long a window waits for its counters to go on, seconds; then what they don't tell is not known."""
SHARES_S = 30.0
"""How long a prompt's record waits for the end of those it shares with, seconds."""


@dataclass(slots=True)
class Start:
    """The start of an LLM that is going on; ``woken`` is for whoever starts it to say."""

    model: str
    start_s: float
    end_s: float = 0.0
    woken: bool = False


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
    ) -> None:
        """Probe this machine's counters by real calls.

        ``gpus``: how many GPUs the wrapper holds; ``cpus``: how many CPUs are its own, None for all of the machine;
        ``on_machine``: how many wrappers share it.
        ``process`` is the wrapper's, ``utc_s`` the clock that records are dated by. ``neighbours`` are told when
        prompts and starts begin and end, and flag the windows in which others work.

        Raises:
            BadSettings: the grid zone is unknown, or a figure of the CPU model is out of range.
        """
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
        self._utc_s = utc_s
        self._flights = Flights()
        self._timeline: Timeline[LeaseAccount] = Timeline(self._meter.mark())
        self._starts: deque[Start] = deque()
        self._log = EnergyLog(wrapper_id, process, grid=self._grid, embodied=self._sci.embodied, pue=self._sci.pue)
        self._model: str | None = None
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
        self._timeline.hand_over(None if grant is None else LeaseAccount(grant, at_s, self._model), at_s)

    @contextmanager
    def load(self, model: str = "") -> Iterator[Start]:
        """The start of an LLM: charged to its deployment, to no prompt and no lease."""
        start = Start(model, self._meter.mark())
        self._timeline.pause(start.start_s)
        self._meter.work_begins(start.start_s)
        try:
            with self.at_work():
                yield start
        finally:
            start.end_s = self._meter.mark()
            self._meter.work_ends(start.end_s)
            self._model = model
            if self._timeline.holder is not None:
                self._timeline.holder.model = model
            self._timeline.resume(start.end_s)
            if start.end_s > start.start_s:
                self._load = self._meter.window(start.start_s, start.end_s, estimate_short=True)
                self._starts.append(start)

    @property
    def meter(self) -> Meter:
        """The meter itself."""
        return self._meter

    def at_work(self) -> AbstractContextManager[None]:
        """What is done meanwhile disturbs the measurements of other wrappers."""
        return nullcontext() if self._neighbours is None else self._neighbours.busy()

    def begin(self, endpoint: str = "process_prompt") -> Flight:
        """A prompt begins now."""
        if self._neighbours is not None:
            self._neighbours.begin()
        flight = Flight(self._meter.mark(), endpoint=endpoint, account=self._timeline.holder)
        self._flights.begin(flight)
        self._meter.work_begins(flight.start_s)
        self._timeline.begin(flight.start_s)
        if flight.account is not None:
            flight.account.unwritten += 1
        return flight

    def end(self, flight: Flight) -> None:
        """A prompt is over, answered or not. Again: no difference."""
        now_s = self._meter.mark()
        if self._flights.end(flight, now_s):
            self._meter.work_ends(now_s)
            self._timeline.end(now_s)
            if self._neighbours is not None:
                self._neighbours.end()

    def counted(self, flight: Flight, tokens: Tokens) -> None:
        """A prompt's tokens are known."""
        self._flights.counted(flight, tokens)

    # --- what it costs ----------------------------------------------------------------------------------

    def account(self, flight: Flight, *, usage: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
        """The part of an answer that tells what it cost.

        Args:
            flight: a prompt that has ended.
            usage: vLLM's own account: ``prompt_tokens``, ``completion_tokens``.
            answer: the text that was generated, None if it was not looked at.

        Returns:
            ``sci_score`` (gCO2eq per unit, or None), ``sci_method``, ``sci_low``, ``sci_high``, ``unit``, ``energy``,
            ``carbon``, ``methods``, ``flags``.
        """
        energy, found, flags = self._told(flight, usage, answer)
        return {
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
            "sci_score": found.sci_score,
            "sci_method": found.method.value,
            "unit": found.unit,
            "joules": energy.total_j,
            "label": energy.label.value,
            "o_g": found.o_g,
            "m_g": found.m_g,
            "flags": flags,
        }

    def _told(
        self, flight: Flight, usage: Mapping[str, Any], answer: str | None
    ) -> tuple[Energy, Score, Sequence[str]]:
        self.counted(flight, tokens_of(usage))
        flight.words = None if answer is None else len(answer.split())
        energy, found = self._figures(flight)
        return energy, found, [*found.flags, *self._budget_flags(flight.account)]

    def _figures(self, flight: Flight, *, for_good: bool = False) -> tuple[Energy, Score]:
        """A prompt's share of what flowed while it was in flight, and of the time that the machine was reserved."""
        assert flight.end_s is not None  # callers end a prompt before they account for it
        parts, assumed = self._flights.parts(flight, for_good=for_good)
        if parts.alone:
            energy = self._meter.window(flight.start_s, flight.end_s, estimate_short=True, final=for_good)
        else:
            energy = self._meter.share(parts, final=for_good)
        flags = [
            *(("tokens_unknown",) if flight.tokens is None else ()),
            *(("share_estimated",) if assumed else ()),
        ]
        return energy, self._score(energy, parts.reserved_s, self._units(flight.tokens, flight.words), flags)

    def _units(self, tokens: Tokens | None, words: int | None) -> int | None:
        match self._sci.functional_unit:
            case "output_token":
                return None if tokens is None else tokens.output
            case "token":
                return None if tokens is None else tokens.prompt + tokens.output
            case "request":
                return 1
            case "word":
                return words

    def _score(self, energy: Energy, duration_s: float, units: int | None, flags: Sequence[str] = ()) -> Score:
        return score(energy, duration_s=duration_s, units=units, settings=self._sci, grid=self._grid, flags=flags)

    def use(self) -> dict[str, Any] | None:
        """What the lease has cost so far, idle time included, and its budget; None without a lease.

        ``before_j`` and ``before_g`` are not inside: what is known from before the wrapper was started anew.
        """
        account = self._timeline.holder
        if account is None:
            return None
        energy, found = self._so_far(account)
        idle = self._idle_so_far(account)
        return {
            "total_j": energy.total_j,
            "low_j": energy.low_j,
            "high_j": energy.high_j,
            "idle_j": None if idle is None else self._meter.energy(idle, estimate_short=True).total_j,
            "label": energy.label.value,
            "o_g": None if found is None else found.o_g,
            "m_g": None if found is None else found.m_g,
            "before_j": account.before_j or None,
            "before_g": account.before_g or None,
            "max_j": account.grant.max_j,
            "max_g": account.grant.max_g,
            "flags": sorted({*energy.flags, *self._budget_flags(account)}),
        }

    def require_budget(self) -> None:
        """Raise BudgetUsed if the lease has used up what it may."""
        for budget in self._budgets(self._timeline.holder):
            budget.require()

    def _budgets(self, account: LeaseAccount | None) -> list[Budget]:
        if account is None or not account.has_budget:
            return []
        energy, found = self._so_far(account)
        if found is None:
            return []  # it has had no time to use anything
        used_j = None if energy.total_j is None else account.before_j + energy.total_j
        used_g = None if found.o_g is None or found.m_g is None else account.before_g + found.o_g + found.m_g
        limits = (("J", account.grant.max_j, used_j), ("gCO2eq", account.grant.max_g, used_g))
        return [Budget(unit, limit, used) for unit, limit, used in limits if limit is not None]

    def _budget_flags(self, account: LeaseAccount | None) -> list[str]:
        flags = [flag for budget in self._budgets(account) if (flag := budget.flag) is not None]
        if account is not None:
            account.flags.update(flags)
        return flags

    def _so_far(self, account: LeaseAccount) -> tuple[Energy, Score | None]:
        """What a lease that has not ended has used; no score before it has any time."""
        now_s = self._meter.mark()
        stretches = [[(stretch.start_s, stretch.end_s)] for stretch in self._unwritten_of(account)]
        flow = self._sum(account.flow, [*stretches, self._timeline.open(now_s)[0]])
        if flow is None:
            return self._meter.nothing(), None
        energy = self._meter.energy(flow, estimate_short=True)
        return energy, self._score(energy, flow.duration_s, account.units)

    def _idle_so_far(self, account: LeaseAccount) -> Flow | None:
        gaps = [stretch.gaps for stretch in self._unwritten_of(account)]
        return self._sum(account.idle, [*gaps, self._timeline.open(self._meter.mark())[1]])

    def _unwritten_of(self, account: LeaseAccount) -> list[Stretch[LeaseAccount]]:
        return [stretch for stretch in self._timeline.closed if stretch.holder is account]

    def _sum(self, flow: Flow | None, times: Sequence[Sequence[Interval]], *, final: bool = False) -> Flow | None:
        for intervals in times:
            if intervals:
                more = self._meter.flow(intervals, final=final)
                flow = more if flow is None else flow + more
        return flow

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
        for write in (self._write_start, self._write_prompt, self._write_stretch):
            for _ in iter(write, False):
                await asyncio.sleep(0)  # prompts go on in between
        self._flights.forget()

    def _settled(self, end_s: float) -> bool:
        return self._meter.settled(end_s) or self._meter.mark() >= end_s + SETTLE_S

    def _write_start(self) -> bool:
        if not self._starts or not self._settled(self._starts[0].end_s):
            return False
        start = self._starts.popleft()
        kind = WindowKind.WAKE if start.woken else WindowKind.LOAD
        flow = self._meter.flow([(start.start_s, start.end_s)], final=True)
        self._record(kind, None, (start.start_s, start.end_s), flow, {"model": start.model})
        return True

    def _write_prompt(self) -> bool:
        unwritten = self._flights.unwritten
        if not unwritten:
            return False
        flight = unwritten[0]
        assert flight.end_s is not None  # it has ended
        waited_s = self._meter.mark() - flight.end_s
        if not self._settled(flight.end_s) or (waited_s < SHARES_S and not self._flights.company_has_ended(flight)):
            return False
        energy, found = self._figures(flight, for_good=True)
        self._flights.written()
        account = flight.account
        if account is not None:
            _add(account, flight, found)
        more = {
            "model": self._model if account is None else account.model,
            "endpoint": flight.endpoint,
            "answer_id": flight.answer_id,
            "tokens": None if flight.tokens is None else flight.tokens._asdict(),
            "words": flight.words,
        }
        self._write_record(WindowKind.PROMPT, account, (flight.start_s, flight.end_s), energy, found, more)
        return True

    def _write_stretch(self) -> bool:
        """The idle time in a stretch; after the last stretch of a lease, and all of its prompts, the lease."""
        closed = self._timeline.closed
        if not closed or not self._settled(closed[0].end_s):
            return False
        stretch, account = closed[0], closed[0].holder
        if account is not None and stretch.last and account.unwritten:
            return False
        closed.popleft()
        if stretch.gaps:
            idle = self._meter.flow(stretch.gaps, final=True)
            times, more = (stretch.gaps[0][0], stretch.gaps[-1][1]), {"model": account and account.model}
            self._record(WindowKind.IDLE, account, times, idle, more)
            if account is not None:
                account.idle = idle if account.idle is None else account.idle + idle
        if account is not None:
            if stretch.end_s > stretch.start_s:
                account.flow = self._sum(account.flow, [[(stretch.start_s, stretch.end_s)]], final=True)
            if stretch.last and account.flow is not None:
                self._record_lease(account, stretch.end_s, account.flow)
        return True

    def _record_lease(self, account: LeaseAccount, end_s: float, flow: Flow) -> None:
        tokens = None if account.tokens is None else Tokens(*account.tokens)._asdict()
        more = {"model": account.model, "prompts": account.prompts, "tokens": tokens, "words": account.words}
        self._record(
            WindowKind.LEASE, account, (account.begun_s, end_s), flow, more, account.units, flags=sorted(account.flags)
        )

    def _record(
        self,
        kind: WindowKind,
        account: LeaseAccount | None,
        times: Interval,
        flow: Flow,
        more: Mapping[str, Any],
        units: int | None = 0,
        *,
        flags: Sequence[str] = (),
    ) -> None:
        energy = self._meter.energy(flow, estimate_short=True)
        found = self._score(energy, flow.duration_s, units, flags)
        self._write_record(kind, account, times, energy, found, more)

    def _write_record(
        self,
        kind: WindowKind,
        account: LeaseAccount | None,
        times: Interval,
        energy: Energy,
        found: Score,
        more: Mapping[str, Any],
    ) -> None:
        to_utc_s = self._utc_s() - self._meter.mark()
        begun_s, ended_s = times[0] + to_utc_s, times[1] + to_utc_s
        grant = None if account is None else account.grant
        self._log.write(
            Record(kind=kind, grant=grant, begun_s=begun_s, ended_s=ended_s, energy=energy, score=found, more=more)
        )


def _add(account: LeaseAccount, flight: Flight, found: Score) -> None:
    """Sum up a prompt of a lease; of what is not known of one there is no sum."""
    tokens = flight.tokens
    account.unwritten -= 1
    account.prompts += 1
    account.units = None if account.units is None or found.units is None else account.units + found.units
    account.words = None if account.words is None or flight.words is None else account.words + flight.words
    account.tokens = (
        None
        if account.tokens is None or tokens is None
        else (
            account.tokens[0] + tokens.prompt,
            account.tokens[1] + tokens.cached,
            account.tokens[2] + tokens.output,
        )
    )
    account.flags.update({"share_estimated", "tokens_unknown"}.intersection(found.flags))


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
    if grid.zone is not None:
        return grid_intensity(grid.zone)
    if grid.gco2eq_per_kwh is None or grid.source is None or grid.date is None:
        raise BadSettings("energy.grid", "needs zone, or gco2eq_per_kwh with source and date")
    return GridIntensity(grid.gco2eq_per_kwh, None, grid.source, grid.date)


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
    if "prompt_tokens" in usage:
        prompt, output = usage["prompt_tokens"], usage.get("completion_tokens")
    else:
        prompt, output = usage["input_tokens"], usage.get("output_tokens")
    return Tokens(prompt, details.get("cached_tokens") or 0, output or 0)
