"""One wrapper's share of machine-wide counters, for machines with several wrappers.

Part of a machine's power is there without any work (idle power); the rest depends on the work. For any machine whose
power grows linearly with CPU time, a wrapper's share lies between its share by reservation (1/n for n wrappers) and its
share of the wrappers' CPU time. Over all wrappers, either kind of share adds up to the whole, and so does their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from deployments.energy.counters.base import CounterLost, Source, Unreadable
from deployments.machine.machine_cpu import MachineCPU
from registry.wire.flags import Flag
from registry.wire.labels import Label


class CPUPart:
    """This wrapper's part of the CPU time of all wrappers since the last poll. Not thread-safe.

    All counters get the same part in one poll, even if their reads take long. A new poll begins
    when a reader asks for the second time.
    """

    def __init__(self, cpu: MachineCPU, on_machine: int) -> None:
        self.on_machine = on_machine
        self._cpu = cpu
        self._told: set[object] = set()
        self._last: tuple[float, float] | None = None
        self._part: float | None = None

    def since_last(self, now_s: float, reader: object) -> float | None:
        """Return a part from 0 to 1; 1/n while no wrapper works; None if unknown. Each reader asks once per poll."""
        if not self._told or reader in self._told:
            last, self._last = self._last, self._cpu.wrappers_s(now_s)
            self._told.clear()
            self._part = None
            if last is not None and self._last is not None:
                own_s, others_s = self._last[0] - last[0], self._last[1] - last[1]
                self._part = own_s / (own_s + others_s) if own_s + others_s > 0 else 1 / self.on_machine
        self._told.add(reader)
        return self._part


class MachineShare(Source):
    """A wrapper's share of one machine-wide counter, in joules.

    There are two shares: by reservation, and by CPU time. One source ("mean") uses their mean,
    another one ("larger") the larger of them. If CPU time is unknown, "mean" is the share by
    reservation, and "larger" is the whole counter. The meter has both sources for each counter,
    with the same name and separate readers. `figures.joined` merges their components.
    """

    label = Label.MODELED

    def __init__(self, counter: Source, cpu: CPUPart, which: Literal["mean", "larger"]) -> None:
        self._counter, self._cpu, self._which = counter, cpu, which
        self.name, self.method = counter.name, counter.method
        self.max_age_s, self.step = counter.max_age_s, counter.step
        self._last: float | None = None
        self._share = 0.0
        self._told_limit()
        self._tell_origin()

    @property
    def counter_label(self) -> Label:
        """The label of the counter that is divided."""
        return self._counter.label

    def _tell_origin(self) -> None:
        wrappers = self._cpu.on_machine
        self.origin = f"share of one of {wrappers} wrappers, by reservation and by CPU time, of: {self._counter.origin}"

    def _told_limit(self) -> None:
        self.limit_w, self.default_limit_w = self._counter.limit_w, self._counter.default_limit_w

    def read_limit(self) -> None:
        """Read the counter's power limit again."""
        self._counter.read_limit()
        self._told_limit()

    def read(self, now_s: float) -> float:
        """Return the joules of the share since the first reading."""
        part = self._cpu.since_last(now_s, self)
        try:
            joules = self._counter.read(now_s)
        except CounterLost:
            self._last = None
            raise
        if self._last is None:
            self._tell_origin()  # a DiePackage knows its origin only after its first readings
        else:
            if joules < self._last:
                self._last = None
                raise CounterLost(Flag.COUNTER_RESET)
            self._share += self._part(part) * (joules - self._last)
        self._last = joules
        return self._share

    # D55: the mean of both shares, with the larger as bound
    def _part(self, by_cpu_time: float | None) -> float:
        by_reservation = 1 / self._cpu.on_machine
        if self._which == "mean":
            return by_reservation if by_cpu_time is None else (by_reservation + by_cpu_time) / 2
        return 1.0 if by_cpu_time is None else max(by_reservation, by_cpu_time)

    def close(self) -> None:
        """Close the counter."""
        self._counter.close()


def shares(
    counters: Sequence[Source | Unreadable], again: Sequence[Source | Unreadable], cpu: CPUPart
) -> list[Source | Unreadable]:
    """Return two sources per machine-wide counter, from the results of two probes, so that each has its own reader."""
    found: list[Source | Unreadable] = []
    for one, other in zip(counters, again, strict=True):
        if isinstance(one, Unreadable) or isinstance(other, Unreadable):
            found.append(other if isinstance(other, Unreadable) else one)
        else:
            found += [MachineShare(one, cpu, "mean"), MachineShare(other, cpu, "larger")]
    return found
