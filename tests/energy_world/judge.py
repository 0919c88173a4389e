"""Compares every figure that was published of a history with its truth."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from statistics import fmean, stdev
from typing import Any

from registry.accounting.figures import Figure, figures_of
from registry.accounting.report import COUNTED
from registry.accounting.window_report import WindowReport, window_report
from registry.accounting.windows import KeptWindow
from registry.core.records import Measurement
from registry.wire.words import RequestStatus, WindowKind
from tests.energy_world.covered import Covered, Span, kinds_of, without
from tests.energy_world.driver import MEASUREMENT, Process, Run
from tests.support.energy_windows import iso, report_of, request

ROUNDING = 1e-6
ROUNDING_J = 2e-3
"""What a counter's units and dates in microseconds may do."""
MACHINE = 0.015
"""Wrappers' shares add up to the machine so well: each takes them by CPU time, in ticks of 10 ms, from one of its own
polls to the next, and those of another wrapper are at other times."""
OF_CHANCE = ("mean of equal prompts", "LLM J/token, interval")
"""Figures whose intervals are no hard bounds."""
STRANGERS_S, STRANGERS_CPUS, STRANGERS_W = 3.0, 0.75, 20.0
"""Strangers have to be seen in windows of so many seconds in which they take so much on average."""
EQUAL_PROMPTS = 10
"""Fewest equal prompts whose mean is looked at."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One published figure: its kind and label, and its value, bounds and truth. ``value`` None: it is not known."""

    figure: str
    label: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    truth: float
    flags: tuple[str, ...] = ()

    @property
    def holds(self) -> bool | None:
        """Whether the interval contains the truth; None if nothing is claimed."""
        if self.value is None or self.low is None or self.high is None:
            return None
        slack = ROUNDING * abs(self.truth) + ROUNDING_J
        return self.low - slack <= self.truth <= self.high + slack


@dataclass(frozen=True, slots=True)
class EqualPrompt:
    """One of several equal prompts, each alone: what was published of it, and the truth [J]."""

    joules: float
    systematic_j: float
    truth_j: float
    label: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """Something that must never be."""

    what: str
    name: str


class Judge:
    """Holds the windows of a run against the truth."""

    def __init__(self, run: Run) -> None:
        self.run, self.world = run, run.world
        self.truth = run.world.truth
        self._covered = {w.name: Covered(self.truth, w.name) for w in run.world.machine.wrappers}
        self.details = [json.loads(kept.window.detail) for kept in run.windows]

    @cached_property
    def findings(self) -> list[Finding]:
        """All published figures."""
        found = [self._window(kept, detail) for kept, detail in zip(self.run.windows, self.details, strict=True)]
        found += self._counted()
        found += self._llms()
        found += self._report()
        found += self._equal_prompts()
        return found

    # --- windows ----------------------------------------------------------------------------------------

    def truth_j(self, kept: KeptWindow, detail: dict[str, Any]) -> float:
        """Return the true energy of what a window covers."""
        kinds = kinds_of(detail["boundary"])
        covered = self._covered[kept.window.wrapper_id]
        if kept.window.kind is WindowKind.PROMPT:
            return covered.prompt_j(kinds, self.run.prompts[kept.window.window_id])
        return covered.window_j(kinds, self.spans(kept))

    def _span(self, kept: KeptWindow) -> Span:
        """Return the begin and the end of a window in the world's clock."""
        process = self.run.process_of(kept)
        return self._time(process, kept.window.begun_s), self._time(process, kept.window.ended_s)

    def spans(self, kept: KeptWindow) -> list[Span]:
        """Return the time of a window that is no prompt's, in the world's clock."""
        window, process, span = kept.window, self.run.process_of(kept), self._span(kept)
        if window.kind in {WindowKind.LOAD, WindowKind.WAKE}:
            return [span]
        if window.kind is WindowKind.LEASE:
            return without([span], process.loads)
        prompts = [(p.begin_s, p.end_s) for p in self.world.history.prompts if p.wrapper == window.wrapper_id]
        return without([span], [*prompts, *process.loads])

    def _time(self, process: Process, utc_s: float) -> float:
        """Return the time of a date in a record, by bisection."""
        low_s, high_s = process.born_s - 10.0, self.world.clock.now_s + 10.0
        for _ in range(60):
            mid_s = (low_s + high_s) / 2
            low_s, high_s = (mid_s, high_s) if process.utc_s(mid_s) < utc_s else (low_s, mid_s)
        return low_s

    def _window(self, kept: KeptWindow, detail: dict[str, Any]) -> Finding:
        window, energy = kept.window, detail["energy"]
        return Finding(
            figure=window.kind.value,
            label=window.label,
            name=window.window_id,
            value=window.total_j,
            low=energy["low_j"],
            high=energy["high_j"],
            truth=self.truth_j(kept, detail),
            flags=tuple(detail["flags"]),
        )

    def _counted(self) -> Iterator[Finding]:
        """The batch figure of each lease: joules per output token of its counted stretch."""
        for kept, detail in zip(self.run.windows, self.details, strict=True):
            counted = detail.get("counted")
            if kept.window.kind is not WindowKind.LEASE or not counted:
                continue
            process = self.run.process_of(kept)
            prompts = [
                p
                for window_id, p in self.run.prompts.items()
                if p.lease_id == kept.window.request_id and window_id.startswith(process.name + "-") and not p.warm_up
            ]
            span = (min(p.begin_s for p in prompts), max(p.end_s for p in prompts))
            kinds = kinds_of(detail["boundary"])
            truth_j = self._covered[kept.window.wrapper_id].window_j(kinds, without([span], process.loads))
            tokens = sum(p.output_tokens for p in prompts)
            if not tokens:
                continue
            assert counted["output_tokens"] == tokens, (kept.window.window_id, counted, tokens)
            yield Finding(
                figure="batch J/token",
                label=counted["label"],
                name=kept.window.window_id,
                value=_per(counted["total_j"], tokens),
                low=_per(counted["low_j"], tokens),
                high=_per(counted["high_j"], tokens),
                truth=truth_j / tokens,
                flags=tuple(counted["flags"]),
            )

    # --- what is made of windows ------------------------------------------------------------------------

    @cached_property
    def reports(self) -> list[WindowReport]:
        """The windows as clients see them."""
        return [window_report(kept, None, iso) for kept in self.run.windows]

    def _llms(self) -> Iterator[Finding]:
        """Joules per output token of each LLM: the bounds of these prompts, and the interval of its expectation."""
        windows = dict(zip((kept.window.window_id for kept in self.run.windows), self.reports, strict=True))
        truths = {
            kept.window.window_id: self.truth_j(kept, detail)
            for kept, detail in zip(self.run.windows, self.details, strict=True)
            if kept.window.kind is WindowKind.PROMPT
        }
        for llm in self.world.machine.llms:
            own = {name for name, p in self.run.prompts.items() if p.llm == llm.name and name in windows}
            [figures] = figures_of([windows[name] for name in own]) if own else [None]
            if figures is None or figures.joules_per_token.value is None:
                continue
            figure: Figure = figures.joules_per_token
            known = [name for name in own if windows[name].joules is not None and not windows[name].warmup]
            tokens = sum(self.run.prompts[name].output_tokens for name in known)
            truth = sum(truths[name] for name in known) / tokens
            yield Finding(
                "LLM J/token, bounds", figure.label, llm.name, figure.value, figure.bound_low, figure.bound_high, truth
            )
            yield Finding("LLM J/token, interval", figure.label, llm.name, figure.value, figure.low, figure.high, truth)

    def _report(self) -> Iterator[Finding]:
        """The costs in the report of the measurement: all prompts, all idle time, all leases, all starts."""
        leases = self.world.history.leases
        requests = [
            request(lease.id, lease.llm, seq, status=RequestStatus.RELEASED) for seq, lease in enumerate(leases, 1)
        ]
        report = report_of(Measurement(MEASUREMENT, 1), requests, self.run.windows, iso)
        for name, kind in COUNTED.items():
            cost = report.costs[name]
            kinds = {WindowKind.PROMPT, WindowKind.IDLE} if kind is WindowKind.LEASE else {kind}
            truths = [
                self.truth_j(each, detail)
                for each, detail in zip(self.run.windows, self.details, strict=True)
                if each.window.kind in kinds and each.window.total_j is not None
            ]
            if truths:
                yield Finding(
                    f"report: {name}", cost.label, "report", cost.joules, cost.low_j, cost.high_j, sum(truths)
                )

    def equal_prompts(self) -> dict[str, list[EqualPrompt]]:
        """The known equal prompts of each lease in which they were alone."""
        patterns = {lease.id: lease.pattern for lease in self.world.history.leases}
        leases: dict[str, list[EqualPrompt]] = defaultdict(list)
        for kept, detail in zip(self.run.windows, self.details, strict=True):
            prompt, joules = self.run.prompts.get(kept.window.window_id), kept.window.total_j
            if prompt is None or patterns[prompt.lease_id] != "equal" or joules is None or prompt.outcome != "ok":
                continue
            systematic_j = detail["energy"]["systematic_j"]
            each = EqualPrompt(joules, systematic_j, self.truth_j(kept, detail), kept.window.label)
            leases[prompt.lease_id].append(each)
        return leases

    def _equal_prompts(self) -> Iterator[Finding]:
        """The mean of equal prompts that were alone, ± its systematic term and what is left of chance."""
        for lease_id, prompts in self.equal_prompts().items():
            if len(prompts) < EQUAL_PROMPTS:
                continue
            value, truth = fmean(p.joules for p in prompts), fmean(p.truth_j for p in prompts)
            # What chance may do to a mean of errors that are independent: 2.5 standard errors.
            chance_j = 2.5 * stdev(p.joules - p.truth_j for p in prompts) / len(prompts) ** 0.5
            width = fmean(p.systematic_j for p in prompts) + chance_j
            label = max((p.label for p in prompts), key=("measured", "measured_sampled", "modeled").index)
            yield Finding("mean of equal prompts", label, lease_id, value, value - width, value + width, truth)

    # --- sums -------------------------------------------------------------------------------------------

    def wrong(self) -> Iterator[Wrong]:
        """What breaks a rule that has no exceptions."""
        for finding in self.findings:
            if finding.label == "measured" and finding.holds is False and finding.figure not in OF_CHANCE:
                yield Wrong(f"measured {finding.figure} outside its bounds", finding.name)
        for kept, detail in zip(self.run.windows, self.details, strict=True):
            if kinds_of(detail["boundary"]) >= {"dram", "model"}:
                yield Wrong("memory counted twice: by its counter and in the CPU model", kept.window.window_id)
        yield from self._strangers()
        yield from self._dates()
        yield from self._leases_add_up()
        yield from self._machine_adds_up()
        yield from self._covered_once()

    def _strangers(self) -> Iterator[Wrong]:
        """What has strangers in it says so, or that it can't tell."""
        cpus = list(self.truth.stranger_cpus.values())
        for kept, detail in zip(self.run.windows, self.details, strict=True):
            span = self._span(kept)
            length_s = span[1] - span[0]
            if length_s < STRANGERS_S or {"contended", "contention_unknown"}.intersection(detail["flags"]):
                continue
            busy = sum(steps.between(*span) for steps in cpus) / length_s
            foreign_w = self.truth.foreign[kept.window.wrapper_id].between(*span) / length_s
            if busy > STRANGERS_CPUS or foreign_w > STRANGERS_W:
                yield Wrong(f"strangers with {busy:.2f} CPUs and {foreign_w:.0f} W not seen", kept.window.window_id)

    def _dates(self) -> Iterator[Wrong]:
        """Records of a process that began with a right clock have right dates, so that days add up."""
        history = self.world.history
        for kept in self.run.windows:
            process = self.run.process_of(kept)
            if any(step.at_s <= process.born_s for step in history.clock_steps):
                continue
            if kept.window.kind is WindowKind.PROMPT:
                prompt = self.run.prompts[kept.window.window_id]
                if abs(kept.window.ended_s - history.epoch_s - prompt.end_s) > 1.0:
                    yield Wrong(f"dated {kept.window.ended_s - history.epoch_s} s, was {prompt.end_s} s", prompt.id)

    def _leases_add_up(self) -> Iterator[Wrong]:
        """Prompts and idle time are the lease, within one process and over all."""
        parts: dict[tuple[str, str | None], list[float | None]] = defaultdict(list)
        for kept in self.run.windows:
            if kept.window.kind in {WindowKind.PROMPT, WindowKind.IDLE}:
                parts[self.run.process_of(kept).name, kept.window.request_id].append(kept.window.total_j)
        for kept in self.run.windows:
            if kept.window.kind is not WindowKind.LEASE or kept.window.total_j is None:
                continue
            joules = parts[self.run.process_of(kept).name, kept.window.request_id]
            known = [each for each in joules if each is not None]
            if len(known) == len(joules) and not isclose(sum(known), kept.window.total_j, rel_tol=1e-6, abs_tol=1e-3):
                yield Wrong(
                    f"prompts and idle time {sum(known)} J, lease {kept.window.total_j} J", kept.window.window_id
                )

    def _machine_adds_up(self) -> Iterator[Wrong]:
        """Wrappers' parts of a counter of the machine are all of it, while all of them are there."""
        processes = list(self.run.processes.values())
        if len(processes) != len(self.world.machine.wrappers) or any(p.ready_s is None for p in processes):
            return
        begin_s = max(0.0, *(p.ready_s or 0.0 for p in processes)) + 0.1
        end_s = self.world.horizon_s - 0.1
        energies = [p.meter.meter.window(begin_s, end_s) for p in processes]
        kinds = [kinds_of(part.name for part in energy.components) for energy in energies]
        for kind, powers in (("cpu", self.truth.packages), ("dram", self.truth.drams)):
            if not all(kind in each for each in kinds):
                continue
            parts = [part for energy in energies for part in energy.components if kinds_of([part.name]) == {kind}]
            if any(part.joules is None for part in parts):
                continue
            truth_j = sum(power.between(begin_s, end_s) for power in powers)
            joules = sum(part.joules or 0.0 for part in parts)
            if not isclose(joules, truth_j, rel_tol=MACHINE):
                yield Wrong(f"{kind}: wrappers {joules} J, machine {truth_j} J", self.world.kind)

    def _covered_once(self) -> Iterator[Wrong]:
        """Windows that add up lie side by side: each moment of a process that lived to the end is in one of them."""
        for process in self.run.processes.values():
            if process.ready_s is None or process.life.end_s < self.world.horizon_s:
                continue
            own = [kept for kept in self.run.windows if self.run.process_of(kept) is process]
            parts = [k for k in own if k.window.kind is not WindowKind.LEASE and k.window.kind is not WindowKind.PROMPT]
            spans = [span for kept in parts for span in self.spans(kept)]
            prompts = [self.run.prompts[k.window.window_id] for k in own if k.window.kind is WindowKind.PROMPT]
            busy = _united([(p.begin_s, p.end_s) for p in prompts])
            told_s = sum(end - begin for begin, end in [*spans, *busy])
            held_s = sum(h.end_s - h.begin_s for h in process.held if h.lease_id is not None)
            last_s = max([process.ready_s, *(end for _, end in [*spans, *busy])])
            if told_s < held_s - 1e-3 or told_s > last_s - process.ready_s + 1e-3:
                yield Wrong(f"{told_s} s in windows, of {last_s - process.ready_s} s", process.name)


def _united(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for begin_s, end_s in sorted(spans):
        if found and begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(end_s, found[-1][1]))
        else:
            found.append((begin_s, end_s))
    return found


def _per(joules: float | None, tokens: int) -> float | None:
    return None if joules is None else joules / tokens
