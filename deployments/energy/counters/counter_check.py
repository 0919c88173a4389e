"""Checks an energy counter against the power that the hardware reports. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from itertools import pairwise

CHECK_S = 10.0
"""How long a counter is watched at first, seconds; steps of 100 ms are 1 % of this."""
LOADED_CHECK_S = 30.0
"""How long it is watched under load, seconds. NVML's power is a mean of 1 s, so it may lag behind a load by half a
second; this time is long compared with that lag."""
TOLERANCE = 0.10
"""Accepted relative difference of counter and integrated power: NVML's power is accurate to 5 %, averaged over 1 s."""
SMEAR_S = 1.0
"""NVML's power is the mean of this many seconds. Source: NVML API, nvmlDeviceGetPowerUsage."""
LOAD_FACTOR = 1.5
"""The hardware counts as loaded from this multiple of its idle power on. A counter that is right when idle may be wrong
under load."""
PROBE_S = 10.0
"""How often the power is read between checks, seconds."""
POWER_ERROR = 0.05
"""Relative error of NVML's power. Source: NVML API, nvmlDeviceGetPowerUsage."""
_MOST_DOUBT = 20.0
AGAIN_S, AGAIN_AFTER_DISAGREEMENT_S = 86_400.0, 600.0
"""How long a finding holds, seconds; the second value is for a counter that disagreed."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of checking a counter.

    ``period_s`` is the median time between two of its steps as the poller sees them, None if there were not two.
    ``counter_j`` and ``power_j`` are the joules of the counter and of the power samples over the same ``seconds``.
    ``agrees`` is None if no power is reported. ``loaded``: the hardware was at work.
    """

    source: str
    seconds: float
    period_s: float | None
    counter_j: float | None
    power_j: float | None
    agrees: bool | None
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class _Finding:
    check: Check
    at_s: float

    def is_due(self, now_s: float) -> bool:
        return now_s - self.at_s >= (AGAIN_AFTER_DISAGREEMENT_S if self.check.agrees is False else AGAIN_S)


class _Loads:
    """Sums up short pieces of work, so that a check under load is possible without one long piece.

    The averaged power shows work for a second after its end, so this second belongs to the piece. A
    piece begins with the counter's last step before the work, and ends with the first step after
    that second.
    """

    def __init__(self) -> None:
        self._step: tuple[float, float] | None = None
        self._begun: tuple[float, float] | None = None
        """``_step``: time and joules of the last step; ``_begun``: of the last step before the piece in progress."""
        self._last: tuple[float, float, bool] | None = None
        self._piece_j = self._piece_loaded_s = self._until_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Forget what was summed up."""
        self.seconds = self.loaded_s = self.counter_j = self.power_j = 0.0
        self.drop()

    def drop(self) -> None:
        """Forget the piece in progress and the last step, after a gap in the counter's history."""
        self._step = self._begun = self._last = None

    @property
    def going_on(self) -> bool:
        """Whether a piece has begun and is not summed up yet."""
        return self._begun is not None

    def add(self, now_s: float, joules: float, power_w: float | None, *, working: bool) -> None:
        """Add a reading, and the power at the same time if it was requested."""
        stepped = self._step is None or joules != self._step[1]
        if power_w is None:
            self._begun = None
        elif self._begun is not None and self._last is not None:
            last_s, last_w, worked = self._last
            self._piece_j += (now_s - last_s) * (last_w + power_w) / 2
            self._piece_loaded_s += (now_s - last_s) * worked
            self._until_s = now_s + SMEAR_S if working else self._until_s
            if stepped and (now_s > self._until_s or self._piece_loaded_s >= LOADED_CHECK_S):
                self.seconds += now_s - self._begun[0]
                self.loaded_s += self._piece_loaded_s
                self.counter_j += joules - self._begun[1]
                self.power_j += self._piece_j
                self._begun = None
        elif working and self._step is not None:
            self._begun, self._until_s = self._step, now_s + SMEAR_S
            self._piece_j, self._piece_loaded_s = (now_s - self._step[0]) * power_w, 0.0
        self._last = None if power_w is None else (now_s, power_w, working)
        if stepped:
            self._step = (now_s, joules)


class CounterCheck:
    """Checks one counter: at first, after each gap in its history, under load, and then once a day.

    The check under load runs when a probe finds load that lasts long enough, or over several short
    pieces of work. After a disagreement, the counter is checked again every 10 minutes
    (`AGAIN_AFTER_DISAGREEMENT_S`).
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._findings: dict[bool, _Finding] = {}
        self._idle_w: float | None = None
        self._probe_due_s = 0.0
        self._loads = _Loads()
        self.restart()

    @property
    def found(self) -> list[Check]:
        """The newest findings, idle before loaded; empty before the first."""
        return [self._findings[loaded].check for loaded in sorted(self._findings)]

    @property
    def disagrees(self) -> bool:
        """Whether the counter disagreed with the power in its newest findings."""
        return any(check.agrees is False for check in self.found)

    @property
    def doubt(self) -> tuple[float, float]:
        """The least and the greatest factor by which the counter's joules must be multiplied to match the power.

        One factor compares all joules, another one only those beyond idle power, because the
        counter may be right when idle. Both results are 1 without a disagreement. Else each factor
        is at most 20, and the error of the power (5 %) widens the range.
        """
        factors = [1.0]
        for check in self.found:
            if check.agrees is False and check.counter_j is not None and check.power_j is not None:
                idle_j = (self._idle_w or 0.0) * check.seconds
                for shown_j, told_j in (
                    (check.counter_j, check.power_j),
                    (check.counter_j - idle_j, check.power_j - idle_j),
                ):
                    if told_j > POWER_ERROR * check.power_j:
                        factors.append(min(told_j / max(shown_j, told_j / _MOST_DOUBT), _MOST_DOUBT))
        least, most = min(factors), max(factors)
        return least if least == 1 else least * (1 - POWER_ERROR), most if most == 1 else most * (1 + POWER_ERROR)

    def restart(self) -> None:
        """Begin a new check, because the counter is new or its history has a gap."""
        self._watch_s: float | None = CHECK_S
        self._begun_s: float | None = None
        self._loads.drop()
        self._forget()

    def _forget(self) -> None:
        self._steps: list[tuple[float, float, float]] = []
        self._powers_w: list[float] = []
        self._last: tuple[float, float, float | None] | None = None
        self._power_j = 0.0
        self._power_told = True

    def wants_power(self, now_s: float, *, working: bool = False) -> bool:
        """Whether the next reading needs the power too: always during a check, else every `PROBE_S`."""
        loads = (working or self._loads.going_on) and self._load_is_due(now_s)
        return loads or self._watch_s is not None or now_s >= self._probe_due_s

    def _load_is_due(self, now_s: float) -> bool:
        finding = self._findings.get(True)
        return self._idle_w is not None and (finding is None or finding.is_due(now_s))

    def add(self, now_s: float, joules: float, power_w: float | None, *, working: bool = False) -> None:
        """Add a reading, and the power at the same time, None if it is not reported or was not requested.

        ``working``: the hardware is known to be at work.
        """
        self._sum_loads(now_s, joules, power_w, working=working)
        if self._watch_s is None:
            self._probe(now_s, power_w)
            return
        if self._begun_s is None:
            self._begun_s = now_s
        last, self._last = self._last, (now_s, joules, power_w)
        if power_w is not None:
            self._powers_w.append(power_w)
        if last is not None:
            if power_w is None or last[2] is None:
                self._power_told = False
            else:
                self._power_j += (now_s - last[0]) * (last[2] + power_w) / 2
            if joules != last[1]:
                self._steps.append((now_s, joules, self._power_j))
        if now_s - self._begun_s >= self._watch_s:
            self._conclude(now_s, self._watch_s)

    def _sum_loads(self, now_s: float, joules: float, power_w: float | None, *, working: bool) -> None:
        loads = self._loads
        loads.add(now_s, joules, power_w, working=working)
        if loads.loaded_s < LOADED_CHECK_S or loads.power_j <= 0:
            return
        agrees = abs(loads.counter_j / loads.power_j - 1) <= TOLERANCE
        check = Check(self._source, loads.seconds, None, loads.counter_j, loads.power_j, agrees, loaded=True)
        if self._load_is_due(now_s):
            self._findings[True] = _Finding(check, now_s)
        loads.restart()

    def _probe(self, now_s: float, power_w: float | None) -> None:
        """Begin a check if there is no valid finding at this power."""
        if now_s < self._probe_due_s:
            return
        self._probe_due_s = now_s + PROBE_S
        loaded = self._is_load(power_w)
        lower = power_w is not None and self._idle_w is not None and power_w * LOAD_FACTOR <= self._idle_w
        finding = self._findings.get(loaded)
        if lower or finding is None or finding.is_due(now_s):
            self._watch_s = LOADED_CHECK_S if loaded else CHECK_S
            self._begun_s = None

    def _is_load(self, power_w: float | None) -> bool:
        return power_w is not None and self._idle_w is not None and power_w >= LOAD_FACTOR * self._idle_w

    def _conclude(self, now_s: float, watched_s: float) -> None:
        """Keep the finding, unless the power changed too much to compare: then try again soon."""
        self._watch_s = None
        self._probe_due_s = now_s + PROBE_S
        powers_w = self._powers_w
        smeared_j = SMEAR_S * abs(powers_w[-1] - powers_w[0]) if powers_w else 0.0
        if not self._power_told or smeared_j <= TOLERANCE * self._power_j:
            mean_w = statistics.fmean(powers_w) if self._power_told and powers_w else None
            self._keep(now_s, mean_w, watched_s)
        self._forget()

    def _keep(self, now_s: float, mean_w: float | None, watched_s: float) -> None:
        if mean_w is not None and (self._idle_w is None or mean_w < self._idle_w):
            if self._idle_w is not None and self._idle_w >= LOAD_FACTOR * mean_w and False in self._findings:
                was = self._findings.pop(False)  # the earlier check was under load, not idle
                self._findings[True] = replace(was, check=replace(was.check, loaded=True))
            self._idle_w = mean_w
        loaded = self._is_load(mean_w)
        self._findings[loaded] = _Finding(self._look(watched_s, loaded=loaded), now_s)

    def _look(self, watched_s: float, *, loaded: bool) -> Check:
        if len(self._steps) < 2:
            return Check(self._source, watched_s, None, None, None, None, loaded)
        (first_s, first_j, first_power_j), (last_s, last_j, last_power_j) = self._steps[0], self._steps[-1]
        period_s = statistics.median(later[0] - earlier[0] for earlier, later in pairwise(self._steps))
        counter_j, power_j = last_j - first_j, last_power_j - first_power_j
        if not self._power_told or power_j <= 0:
            return Check(self._source, last_s - first_s, period_s, counter_j, None, None, loaded)
        agrees = abs(counter_j / power_j - 1) <= TOLERANCE
        return Check(self._source, last_s - first_s, period_s, counter_j, power_j, agrees, loaded)
