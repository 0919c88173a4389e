"""Writes the windows of a wrapper (LLM starts, prompts, idle time, leases) when they are final."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from deployments.energy.attribution import Flow
from deployments.energy.figures import Energy
from deployments.energy.flights import Flight, Flights
from deployments.energy.lease_account import LeaseAccount
from deployments.energy.record_dates import RecordDates
from deployments.energy.sci import Score
from deployments.energy.scorer import Scorer
from deployments.energy.timeline import STRETCH_S, Interval, Timeline
from deployments.energy.token_weights import UNKNOWN, TokenWeight
from deployments.energy.window_log import SCHEMA, EnergyLog, as_iso
from registry.contract.messages import LeaseGrant, StartedFor
from registry.contract.windows import (
    CountedRecord,
    InFlight,
    LeaseUse,
    PromptUse,
    ScoreRecord,
    TokensRecord,
    WindowDetail,
    WindowIds,
)
from registry.wire.flags import Flag
from registry.wire.words import WindowKind

# D61: a window is written once it is final
READINGS_S = 30.0
"""How long a window waits for counter readings after its end, seconds; without them a figure is unavailable."""
_NOT_CLEAN = frozenset({Flag.WARMUP_INSIDE, Flag.LLM_STARTED_INSIDE})
"""Flags that a lease window copies from its counted stretch. Its other flags come from the whole lease."""
SHARES_S = 30.0
"""How long a prompt's record waits for the end of the prompts that ran with it, seconds."""


@dataclass(slots=True)
class Start:
    """An LLM start. ``woken``: from sleep, set by the caller. ``started_for``: the request that pays, None for none."""

    model: str
    start_s: float
    end_s: float = 0.0
    woken: bool = False
    started_for: StartedFor | None = None


class WindowWriter:
    """Turns finished windows into records of a log. ``model`` is the LLM that was started last."""

    def __init__(
        self,
        scorer: Scorer,
        flights: Flights,
        timeline: Timeline[LeaseAccount],
        log: EnergyLog,
        dates: RecordDates,
    ) -> None:
        self._scorer = scorer
        self._meter = scorer.meter
        self._flights = flights
        self._timeline = timeline
        self._log = log
        self._dates = dates
        self._starts: deque[Start] = deque()
        self._weight = TokenWeight()
        self.model: str | None = None

    def started(self, start: Start) -> None:
        """Note that an LLM start is over. Token weights are learned again, unless the same LLM woke from sleep."""
        if not start.woken or start.model != self.model:
            self._weight, self._flights.weight = TokenWeight(), UNKNOWN
        self.model = start.model
        if start.end_s > start.start_s:
            self._starts.append(start)

    async def write(self) -> None:
        """Write every window that is final or has waited long enough."""
        self._dates.look()
        for write in (self._write_start, self._write_prompt, self._write_stretch):
            for _ in iter(write, False):
                await asyncio.sleep(0)  # lets prompts run in between
        self._flights.forget()
        # Windows that end before this time are written, so only prompts that are still in flight need older changes.
        old_s = self._meter.mark() - READINGS_S - SHARES_S
        self._flights.sum_up(old_s, self._meter.is_final, lambda parts: self._meter.shares(parts, final=True))

    def _is_final(self, end_s: float) -> bool:
        return self._meter.is_final(end_s) or self._meter.mark() >= end_s + READINGS_S

    def _write_start(self) -> bool:
        if not self._starts or not self._is_final(self._starts[0].end_s):
            return False
        start = self._starts.popleft()
        kind = WindowKind.WAKE if start.woken else WindowKind.LOAD
        flow = self._meter.flow([(start.start_s, start.end_s)], final=True)
        self._record(kind, start.started_for, (start.start_s, start.end_s), flow, start.model)
        return True

    def _write_prompt(self) -> bool:
        unwritten = self._flights.unwritten
        if not unwritten:
            return False
        flight = unwritten[0]
        assert flight.end_s is not None  # it has ended
        waited_s = self._meter.mark() - flight.end_s
        if not self._is_final(flight.end_s) or (waited_s < SHARES_S and not self._flights.company_has_ended(flight)):
            return False
        energy, found = self._scorer.prompt(flight, for_good=True)
        most, mean = self._flights.in_flight(flight)
        self._flights.written()
        tokens = flight.tokens
        if flight.status == "answered" and tokens is not None and tokens.computed is not None:
            self._weight.learn(tokens.computed, tokens.output, energy)
            self._flights.weight = self._weight.weight
        account = flight.account
        if account is not None:
            _add(account, flight, found)
        use = PromptUse(
            endpoint=flight.endpoint,
            answer_id=flight.answer_id,
            prompt_id=flight.prompt_id,
            tokens=None if tokens is None else TokensRecord(*tokens),
            words=flight.words,
            warmup=flight.warmup,
            status=flight.status,
            in_flight=InFlight(most, mean),
        )
        model, payer = (self.model, None) if account is None else (account.model, account.grant)
        ids = self._log.next_ids(payer, flight.window_id)
        self._write_record(
            WindowKind.PROMPT, ids, (flight.start_s, flight.end_s), energy, found, model, use, units=found.units
        )
        return True

    def _write_stretch(self) -> bool:
        """Write the idle time of the next stretch; return False if no stretch is due.

        After the last stretch and the last prompt of a lease, the window of the lease is written, too.
        """
        closed = self._timeline.closed
        if not closed or not self._is_final(closed[0].end_s):
            return False
        stretch, account = closed[0], closed[0].holder
        if account is not None and stretch.last and account.unwritten:
            return False
        closed.popleft()
        if stretch.gaps:
            idle = self._meter.flow(stretch.gaps, final=True)
            times = (stretch.gaps[0][0], stretch.gaps[-1][1])
            model, payer = (None, None) if account is None else (account.model, account.grant)
            self._record(WindowKind.IDLE, payer, times, idle, model, account=account)
            if account is not None:
                account.idle = idle if account.idle is None else account.idle.plus(idle)
        if account is not None:
            if stretch.end_s > stretch.start_s:
                account.flow = self._scorer.summed(account.flow, [[(stretch.start_s, stretch.end_s)]], final=True)
                account.counted.add(stretch.start_s, stretch.end_s)
            # Summed up while the meter still has every edge.
            taken = account.counted.take(0.0 if stretch.last else STRETCH_S)
            account.counted.flow = self._scorer.summed(account.counted.flow, [taken], final=True)
            if stretch.last and account.flow is not None:
                self._record_lease(account, stretch.end_s, account.flow)
        return True

    def _record_lease(self, account: LeaseAccount, end_s: float, flow: Flow) -> None:
        begun_s = account.handed_over_s
        counted = self._counted(account)
        flags = account.flags.union(() if counted is None else _NOT_CLEAN.intersection(counted.flags))
        use = LeaseUse(
            process=self._log.process,
            lease_begun=as_iso(self._dates.utc_s(account.begun_s) if begun_s is None else begun_s),
            prompts=account.prompts,
            warmups=account.warmups,
            tokens=TokensRecord(*account.tokens),
            tokens_unknown_prompts=account.tokens_unknown,
            words=account.words,
            units_unknown_prompts=account.units_unknown,
            counted=counted,
        )
        energy = self._meter.energy(flow, estimate_short=True)
        units = None if account.units_unknown else account.units  # if some units are unknown, there is no score
        found = self._scorer.score(energy, flow.duration_s, units, sorted(flags), account=account)
        ids, times = self._log.next_ids(account.grant), (account.begun_s, end_s)
        self._write_record(WindowKind.LEASE, ids, times, energy, found, account.model, use, units=account.units)

    def _counted(self, account: LeaseAccount) -> CountedRecord | None:
        """Return the counted stretch of a lease as one window of the counters; None if it has no prompt."""
        counted = account.counted
        flow, begun_s, ended_s = counted.flow, counted.begun_s, counted.ended_s
        if flow is None or begun_s is None or ended_s is None:
            return None
        energy = self._meter.energy(flow, estimate_short=True)
        units = None if counted.units_unknown else counted.units
        flags = {
            Flag.WARMUP_INSIDE: counted.warmed_up,
            Flag.LLM_STARTED_INSIDE: flow.duration_s < (ended_s - begun_s) * (1 - 1e-9),
            Flag.TOKENS_UNKNOWN: counted.tokens_unknown > 0,
            Flag.CLOCK_STEPPED: self._dates.stepped(begun_s, ended_s),
        }
        told = [flag for flag, holds in flags.items() if holds]
        found = self._scorer.score(energy, flow.duration_s, units, told, account=account)
        return CountedRecord(
            begun=as_iso(self._dates.utc_s(begun_s)),
            ended=as_iso(self._dates.utc_s(ended_s)),
            seconds=flow.duration_s,
            total_j=energy.total_j,
            low_j=energy.low_j,
            high_j=energy.high_j,
            systematic_j=energy.systematic_j,
            label=energy.label,
            o_g=found.o_g,
            o_low_g=found.o_low_g,
            o_high_g=found.o_high_g,
            m_g=found.m_g,
            m_low_g=found.m_low_g,
            m_high_g=found.m_high_g,
            prompts=counted.prompts,
            output_tokens=None if counted.tokens_unknown else counted.output_tokens,
            units=units,
            in_flight=InFlight(counted.most, min(counted.prompt_s / flow.duration_s, counted.most)),
            flags=tuple(sorted(set(found.flags))),
        )

    def _record(
        self,
        kind: WindowKind,
        payer: LeaseGrant | StartedFor | None,
        times: Interval,
        flow: Flow,
        model: str | None,
        *,
        account: LeaseAccount | None = None,
    ) -> None:
        """Write the window of an LLM start or of idle time; ``account`` is the lease's, if any."""
        energy = self._meter.energy(flow, estimate_short=True)
        found = self._scorer.score(energy, flow.duration_s, 0, account=account)
        self._write_record(kind, self._log.next_ids(payer), times, energy, found, model, units=0)

    def _write_record(
        self,
        kind: WindowKind,
        ids: WindowIds,
        times: Interval,
        energy: Energy,
        found: Score,
        model: str | None,
        use: PromptUse | LeaseUse | None = None,
        *,
        units: int | None,
    ) -> None:
        begun_s, ended_s = (self._dates.utc_s(at_s) for at_s in times)
        stepped = (Flag.CLOCK_STEPPED,) if self._dates.stepped(*times) else ()
        detail = WindowDetail(
            grid=self._scorer.grid,
            embodied=self._scorer.embodied,
            pue=self._scorer.pue,
            schema=SCHEMA,
            ids=ids,
            kind=kind,
            begun=as_iso(begun_s),
            ended=as_iso(ended_s),
            duration_s=times[1] - times[0],
            reserved_s=found.duration_s,
            energy=energy,
            o_g=found.o_g,
            o_low_g=found.o_low_g,
            o_high_g=found.o_high_g,
            m_g=found.m_g,
            m_low_g=found.m_low_g,
            m_high_g=found.m_high_g,
            unit=found.unit,
            units=units,
            score=ScoreRecord(found.sci_score, found.low, found.high, found.method),
            methods=found.methods,
            flags=tuple(sorted({*found.flags, *stepped})),
            boundary=energy.boundary,
            gpus=tuple(name.removeprefix("gpu:") for name in energy.boundary if name.startswith("gpu:")),
            model=model,
            use=use,
        )
        self._log.write(kind, ids, detail, begun_s, ended_s)


def _add(account: LeaseAccount, flight: Flight, found: Score) -> None:
    """Add a prompt to the sums of its lease; unknown figures are counted separately."""
    tokens, units, counted = flight.tokens, found.units, account.counted
    account.unwritten -= 1
    account.prompts += 1
    account.warmups += flight.warmup
    account.units += units or 0
    account.units_unknown += units is None
    account.words = None if account.words is None or flight.words is None else account.words + flight.words
    account.tokens_unknown += tokens is None
    if tokens is not None:
        prompt, cached, output = account.tokens
        cached = None if cached is None or tokens.cached is None else cached + tokens.cached
        account.tokens = (prompt + tokens.prompt, cached, output + tokens.output)
    account.flags.update({Flag.SHARE_ESTIMATED, Flag.TOKENS_UNKNOWN}.intersection(found.flags))
    if not flight.warmup:
        counted.prompts += 1
        counted.units += units or 0
        counted.units_unknown += units is None
        counted.output_tokens += 0 if tokens is None else tokens.output
        counted.tokens_unknown += tokens is None
