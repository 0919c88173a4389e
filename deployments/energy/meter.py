"""The meter of a wrapper: polls the energy counters, and computes the energy between any two times.

One thread polls the counters and keeps their edges. A window is computed from them on request, so the prompt path only
notes two timestamps. No window is ever 0 J: what can't be resolved is unavailable, with a flag.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

import structlog

from deployments.energy.attribution import Flow, Parts, Shares, counted, doubted, shared, together, unknown, widened
from deployments.energy.contention import PERIOD_S, Contention, Look, at_once, since_asked
from deployments.energy.counters.activity import Activity
from deployments.energy.counters.counter_check import Check, CounterCheck
from deployments.energy.counters.edge_check import EdgeCheck
from deployments.energy.counters.history import Level, NoWindow, Track, between
from deployments.energy.counters.probe import CounterLost, GPUPower, Source, Unreadable
from deployments.energy.figures import Component, Energy, joined, total
from deployments.energy.timeline import Interval
from deployments.machine.gpus import ReadFailed
from registry.background import spawn_thread
from registry.errors import BadSettings
from registry.wire.flags import Flag
from registry.wire.labels import Label, worst

log = structlog.get_logger("deployments.energy.meter")

_STALE_S = 0.5
"""How long after a counter's last edge a window may end, seconds (or three polls, if that is longer)."""
_LIMITS_PERIOD_S = 10.0
"""How often power limits are read, seconds: operators change them while GPUs run."""
_FIRST_EDGES_S = 1.0
"""How long `Meter.start` waits for the first step of every counter, seconds."""
_JOIN_TIMEOUT_S = 2.0


@dataclass(slots=True)
class _Channel:
    """A source, its history and its checks."""

    source: Source
    track: Track
    edges: EdgeCheck
    check: CounterCheck | None = None
    readings: int = 0
    failures: int = 0
    error: str | None = None
    told: set[type[Exception]] = field(default_factory=set)

    def doubted(self, part: Component) -> Component:
        """Return the component; if the counter disagreed with the power, it is modelled, with wider bounds."""
        return part if self.check is None or not self.check.disagrees else doubted(part, self.check.doubt)


class Meter:
    """Measures the energy of a wrapper's part of a machine.

    `window`, `flow`, `energy`, `share`, `is_final` and `describe` may be called from any thread.
    They never wait for a read of the hardware: the poller holds the lock only while it stores a
    reading.

    Args:
        sources: The result of `probe_sources`; the meter owns it from now on.
        clock: Monotonic seconds; all times of windows are in this clock.
        poll_s: Time between two polls of the counters, > 0 and <= 1 s; <= 0.1 s for GPUs whose
            power is sampled.
        history_s: How far back windows can reach, seconds; beyond 10 minutes one edge per second is kept.
        allow_simulated: For tests only.
        others_worked: Whether another wrapper on the machine is at work, or was since the last call; None if unknown.
        strangers: Whether processes other than wrappers used the CPUs; None: not looked for.

    Raises:
        BadSettings: ``poll_s`` does not suit these sources, or a source is simulated outside tests.
    """

    def __init__(
        self,
        sources: Iterable[Source | Unreadable],
        *,
        clock: Callable[[], float] = time.monotonic,
        poll_s: float = 0.05,
        history_s: float = 86_400.0,
        allow_simulated: bool = False,
        others_worked: Callable[[], bool | None] = lambda: False,
        strangers: Look | None = None,
    ) -> None:
        found = list(sources)
        self._activity = Activity()
        self._unreadable = [source for source in found if isinstance(source, Unreadable)]
        self._holes = [
            Component(hole.name, hole.why, Label.UNAVAILABLE, flags=(Flag.UNREADABLE,))
            for hole in self._unreadable
            if hole.in_boundary
        ]
        self._channels = [
            _Channel(
                source,
                Track(
                    max_age_s=source.max_age_s,
                    step=source.step,
                    max_rate=source.max_rate,
                    history_s=history_s,
                    stale_s=max(_STALE_S, 3 * poll_s),
                    activity=self._activity,
                ),
                EdgeCheck(source.max_age_s, source.step + source.late),
                # A counter of unknown period is checked at the start.
                None if source.max_age_s is not None else CounterCheck(source.name),
            )
            for source in found
            if isinstance(source, Source)
        ]
        for channel in self._channels:
            if channel.source.label is Label.SIMULATED and not allow_simulated:
                raise BadSettings("energy", f"source {channel.source.name} is simulated, which is for tests only")
        sampled = any(isinstance(channel.source, GPUPower) for channel in self._channels)
        if not 0 < poll_s <= (0.1 if sampled else 1.0):
            raise BadSettings("energy.poll_s", "needs 0 < poll_s <= 1, and <= 0.1 for GPUs whose power is sampled")
        self._clock = clock
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._closed = False
        self._contention = Contention(
            [
                *(at_once(channel.source.contended) for channel in self._channels),
                since_asked(others_worked),
                *(() if strangers is None else (strangers,)),
            ]
        )
        self._contention_due_s = clock()
        self._limits_due_s = clock() + _LIMITS_PERIOD_S
        self._not_covered = frozenset(_not_covered([channel.source for channel in self._channels]))

    # --- polling ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Poll until every counter has an edge, then go on in a daemon thread.

        Windows can begin as soon as this returns. Blocks until the counters have made their first step (about 100 ms),
        1 s at most.

        Raises:
            RuntimeError: It was started before.
        """
        if self._thread is not None:
            raise RuntimeError("the meter was started before")
        for _ in range(math.ceil(_FIRST_EDGES_S / self._poll_s)):
            self.poll_once()
            if all(channel.track.is_final(-math.inf) for channel in self._channels) or self._stop.wait(self._poll_s):
                break
        self._thread = spawn_thread("energy-meter", self._run)

    def stop(self) -> bool:
        """Stop polling and close the sources; waits at most two seconds. False if a read hangs for longer."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                return False
        if not self._closed:
            self._closed = True
            for channel in self._channels:
                channel.source.close()
        return True

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            self.poll_once()

    def poll_once(self) -> None:
        """Read every counter once. For the poller, and for tests without a thread."""
        now_s = self._clock()
        if now_s >= self._limits_due_s:
            self._limits_due_s = now_s + _LIMITS_PERIOD_S
            self._read_limits()
        for channel in self._channels:
            try:
                self._poll(channel)
            except Exception as error:  # whatever a driver raises, the other counters must be read
                self._failed(channel, error)
        if self._clock() >= self._contention_due_s:
            self._contention_due_s = self._clock() + PERIOD_S
            self._contention.look(self._clock())

    def _poll(self, channel: _Channel) -> None:
        source = channel.source
        asked_s = self._clock()
        try:
            units = source.read(asked_s)
            answered_s = self._clock()
            if not channel.edges.plausible(answered_s, units, source.max_rate):
                source.read_limit()  # it may have been raised just now
            channel.edges.add(asked_s, answered_s, units, source.max_rate)
        except CounterLost as lost:
            channel.edges.restart()
            if channel.check is not None:
                channel.check.restart()
            with self._lock:
                channel.track.lost(lost.flag)
                channel.error = lost.flag
        else:
            if channel.check is not None:
                working = self._activity.working
                power_w = source.power_w() if channel.check.wants_power(asked_s, working=working) else None
                channel.check.add(asked_s, units, power_w, working=working)
            with self._lock:
                channel.track.max_rate = source.max_rate
                channel.track.add(asked_s, answered_s, units)
                channel.readings += 1

    def _failed(self, channel: _Channel, error: Exception) -> None:
        """Record a failed read for `describe`. The counter keeps counting, so this costs an edge but no joules."""
        with self._lock:
            channel.failures += 1
            channel.error = str(error) if isinstance(error, ReadFailed) else repr(error)
        if not isinstance(error, ReadFailed) and type(error) not in channel.told:
            channel.told.add(type(error))
            text = "".join(traceback.format_exception(error))
            log.error("meter.source_failed", source=channel.source.name, traceback=text)

    def _read_limits(self) -> None:
        for channel in self._channels:
            try:
                channel.source.read_limit()
            except Exception as error:  # whatever a driver raises, the other limits must be read
                self._failed(channel, error)

    def check(self) -> None:
        """Check the polling thread, for health checks: without it every figure would be unknown.

        Raises:
            RuntimeError: The thread was started and not stopped, but is dead.
        """
        if self._thread is not None and not self._stop.is_set() and not self._thread.is_alive():
            raise RuntimeError("the thread that polls the energy counters has died")

    # --- windows ----------------------------------------------------------------------------------------

    def mark(self) -> float:
        """Return the time now in the meter's clock. The prompt path needs only this, at a prompt's start and end."""
        return self._clock()

    def work_begins(self, at_s: float) -> None:
        """Note that a prompt or an LLM start begins. Times must not decrease."""
        with self._lock:
            self._activity.begin(at_s)

    def work_ends(self, at_s: float) -> None:
        """Note that a prompt or an LLM start ends. The hardware counts as busy in between."""
        with self._lock:
            self._activity.end(at_s)

    def is_final(self, time_s: float) -> bool:
        """Whether windows that end at this time are final: their levels are, and others were looked for later."""
        with self._lock:
            counted = all(channel.track.is_final(time_s) for channel in self._channels)
        return counted and self._contention.looked(time_s)

    def window(self, start_s: float, end_s: float, *, estimate_short: bool = False, final: bool = False) -> Energy:
        """Return the energy between two times. ``estimate_short``: model it if they are too close for a counter.

        Unavailable, with a flag, if a counter can't resolve it: ``too_short``, ``stale``, ``out_of_history``,
        ``counter_reset``, ``undersampled``, ``implausible_power`` … With ``final`` it is also ``stale`` if a later call
        would return a sharper figure.

        Raises:
            ValueError: The window does not end after its start.
        """
        return self.energy(self.flow([(start_s, end_s)], final=final), estimate_short=estimate_short)

    def flow(self, intervals: Sequence[Interval], *, final: bool = False) -> Flow:
        """Return how much the counters rose in these intervals (one or more, in order of time), for `energy`.

        Final flows add up: the flows of the parts of a time sum to the flow of all of it.
        """
        times_s = list(chain.from_iterable(intervals))
        units: list[Level | Flag] = []
        for source, levels in self._levels(times_s, final=final):
            if isinstance(levels, Flag):
                units.append(levels)
                continue
            rises = [between(levels[at], levels[at + 1]) for at in range(0, len(levels), 2)]
            rise = rises[0] if len(rises) == 1 else together(rises)
            units.append(widened(rise, self._unseen(source, intervals)) if source.unseen_s else rise)
        lengths_s = [b - a for a, b in intervals]
        return Flow(sum(lengths_s), max(lengths_s), tuple(units), self._flags(times_s[0], times_s[-1]))

    def energy(self, flow: Flow, *, estimate_short: bool = False) -> Energy:
        """Return a flow in joules. ``estimate_short``: model it if its time is too short for a counter."""
        parts = [
            unknown(channel.source, units)
            if isinstance(units, Flag)
            else channel.doubted(
                counted(
                    channel.source,
                    flow.duration_s,
                    units,
                    citable=flow.longest_s >= (channel.track.citable_s or 0.0),
                    estimate_short=estimate_short,
                )
            )
            for channel, units in zip(self._channels, flow.units, strict=True)
            if not channel.source.redundant
        ]
        return total([*joined(parts), *self._holes], flow.flags)

    def nothing(self) -> Energy:
        """Return the energy of an interval of 0 s: unavailable, flagged ``too_short``."""
        return self.energy(Flow(0.0, 0.0, (Flag.TOO_SHORT,) * len(self._channels), frozenset()))

    def share(self, parts: Parts, *, before: Shares | None = None, final: bool = False) -> Energy:
        """Return a prompt's share of the energy while it was in flight with others: modelled, with its range.

        ``before`` are its shares of the time before ``parts``.

        Raises:
            ValueError: ``parts`` do not end after their start.
        """
        found = self.shares(parts, final=final) if before is None else before + self.shares(parts, final=final)
        components = [
            unknown(channel.source, share)
            if isinstance(share, Flag)
            else channel.doubted(shared(channel.source, found, share))
            for channel, share in zip(self._channels, found.counters, strict=True)
            if not channel.source.redundant
        ]
        end_s = parts.times_s[-1]
        return total([*joined(components), *self._holes], self._flags(end_s - found.duration_s, end_s))

    def shares(self, parts: Parts, *, final: bool = False) -> Shares:
        """Return a prompt's share of what each counter counted in the time of its parts, to be added up.

        Raises:
            ValueError: ``parts`` do not end after their start.
        """
        found = self._levels(parts.times_s, final=final)
        time = [(parts.times_s[0], parts.times_s[-1])]
        return Shares.of(parts, [levels for _, levels in found], [self._unseen(source, time) for source, _ in found])

    def _unseen(self, source: Source, intervals: Sequence[Interval]) -> float:
        """Return by how much a source's readings may be wrong in these intervals because they miss changes of power."""
        near_s = source.unseen_s
        if not near_s:
            return 0.0
        with self._lock:
            lengths_s = [
                length_s for a, b in intervals for length_s in self._activity.lengths_s(a - near_s, b + near_s)
            ]
            return source.unseen(lengths_s)

    def _levels(self, times_s: Sequence[float], *, final: bool) -> list[tuple[Source, list[Level] | Flag]]:
        """Return every counter's levels at these times, read under one lock, or the flag that says why it has none.

        Raises:
            ValueError: The last time is not after the first.
        """
        if times_s[-1] <= times_s[0]:
            raise ValueError(f"a window can't end at {times_s[-1]} when it starts at {times_s[0]}")
        found: list[tuple[Source, list[Level] | Flag]] = []
        with self._lock:
            for channel in self._channels:
                try:
                    levels = channel.track.levels(times_s)
                    provisional = final and any(level.provisional for level in levels)
                    found.append((channel.source, Flag.STALE if provisional else levels))
                except NoWindow as no_window:
                    found.append((channel.source, no_window.flag))
        return found

    def contended(self, start_s: float, end_s: float) -> bool:
        """Whether others were seen at work in a period between two looks (1 s) that overlaps this time."""
        return self._contention.found(start_s, end_s)[0]

    @property
    def labels(self) -> tuple[Label, ...]:
        """The label of each source's counter."""
        return tuple(channel.source.counter_label for channel in self._channels)

    def _flags(self, start_s: float, end_s: float) -> frozenset[Flag]:
        contended, unknown = self._contention.found(start_s, end_s)
        flags = self._not_covered
        if contended:
            flags |= {Flag.CONTENDED}
        if unknown:
            flags |= {Flag.CONTENTION_UNKNOWN}
        for channel in self._channels:
            if channel.check is not None and channel.check.disagrees:
                flags |= {Flag.COUNTER_DISAGREES}
        return flags

    def _checks(self) -> list[Check]:
        return [check for channel in self._channels if channel.check is not None for check in channel.check.found]

    def describe(self) -> dict[str, object]:
        """Return what is counted and how, what is not and why, and results of counter checks, as JSON for /machines."""
        with self._lock:
            return {
                "polling": self._thread is not None and self._thread.is_alive(),
                "poll_s": self._poll_s,
                "label": worst(
                    [channel.source.label for channel in self._channels] + [hole.label for hole in self._holes]
                ).value,
                "sources": [
                    {
                        "name": channel.source.name,
                        "method": channel.source.method,
                        "label": channel.source.label.value,
                        "origin": channel.source.origin,
                        "power_limit_w": channel.source.limit_w,
                        "citable_s": channel.track.citable_s,
                        "readings": channel.readings,
                        "failures": channel.failures,
                        "last_error": channel.error,
                    }
                    for channel in self._channels
                ],
                "not_found": [{"name": hole.name, "why": hole.why} for hole in self._unreadable],
                "not_covered": sorted(self._not_covered),
                "checks": [asdict(check) for check in self._checks()],
            }


def _not_covered(sources: Sequence[Source]) -> Iterable[Flag]:
    """Yield a flag for each kind of hardware that nothing counts. The CPU model includes memory."""
    names = [source.name for source in sources]
    both = "cpu-model" in names or any(source.covers_cpu for source in sources)
    if not both and not any(name.startswith("package-") for name in names):
        yield Flag.CPU_NOT_COVERED
    if not both and not any(name.startswith("dram-") for name in names):
        yield Flag.DRAM_NOT_COVERED
