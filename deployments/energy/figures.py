"""The terms of energy accounting: labels, figures and the operator's coefficients. Reads no hardware.

A figure is a number of joules with a label that says where it comes from. An unknown figure is ``None``. A figure of
0 J can't be made, so "unknown" never looks like "costs nothing".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from registry.contract.windows import ComponentRecord, EnergyRecord
from registry.errors import BadSettings
from registry.wire.flags import Flag
from registry.wire.labels import Label, worst

FunctionalUnit = Literal["output_token", "token", "request", "word"]


_ROUNDING = 1e-9
"""Relative amount by which rounded sums may miss their bounds."""
_SOURCED, _UNAVAILABLE = Label.SOURCED, Label.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Component(ComponentRecord):
    """The energy of one part of the machine in a window, or why it is unknown. Stored unchanged in the record.

    ``joules`` is > 0, or None exactly if the label is unavailable. Whenever ``joules`` is known, so
    are ``low_j``, ``high_j`` and ``systematic_j``.

    Attributes:
        name: ``gpu:<uuid>``, ``package-<n>``, ``dram-<n>`` or ``cpu-model``.
        source: How the figure was obtained, in words.
        label: Where the figure comes from; never sourced.
        joules: The estimate, J.
        low_j, high_j: Bounds, J, if the counter is right. They are certain if the counter's energy is not shared. For a
            prompt's share they contain the result of each division that `flights` makes, but not of every conceivable
            one. For a wrapper's part of a machine they hold if power grows linearly with CPU time (`machine_share`).
        resolution_j: Bound of the error due to the counter's steps, J; None if it is not known
            separately from low and high.
        systematic_j: The part of the error that has the same sign in similar windows, J, >= 0. The mean of many
            windows does not reduce it.
        counter_label: The label of the counter that was read, before its reading was divided.
        flags: What is wrong or unusual (``too_short``, ``provisional``, ``counter_reset`` …).

    Raises:
        ValueError: Label, figure and bounds do not fit together.
    """

    source: str
    label: Label = Label.UNAVAILABLE
    counter_label: Label = Label.UNAVAILABLE

    # D58: every figure has hard bounds
    def __post_init__(self) -> None:
        joules, low_j, high_j, label = self.joules, self.low_j, self.high_j, self.label
        unknown = joules is None
        if label is _SOURCED or (label is _UNAVAILABLE) != unknown:
            raise ValueError(f"{self.name}: {joules} J can't be labelled {label}")
        if (self.counter_label is _UNAVAILABLE) != unknown:
            raise ValueError(f"{self.name}: {joules} J can't come from a counter labelled {self.counter_label}")
        if joules is None:
            return
        if joules <= 0:
            raise ValueError(f"{self.name}: {joules} J are not > 0; an unknown figure must be None")
        if low_j is None or high_j is None or self.systematic_j is None or self.systematic_j < 0:
            raise ValueError(f"{self.name}: {joules} J need low_j, high_j and systematic_j")
        slack_j = _ROUNDING * max(joules, high_j)
        if not 0 <= low_j <= joules + slack_j or high_j < joules - slack_j:
            raise ValueError(f"{self.name}: {joules} J are not within {low_j} to {high_j} J")


@dataclass(frozen=True, slots=True)
class Energy(EnergyRecord):
    """The energy of a window: the sum of its components, with the worst of their labels. Made by `total`.

    ``total_j`` is None if any component is unavailable. The other amounts are sums over the
    components, known whenever ``total_j`` is (``resolution_j`` may be None). ``flags`` are those of
    all components and of the window, among them ``cpu_not_covered`` and ``dram_not_covered`` for
    hardware that nothing counts. A stored record has these flags at its top level, not in its
    ``energy``.
    """

    label: Label = Label.UNAVAILABLE
    counter_label: Label = Label.UNAVAILABLE
    components: tuple[Component, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def boundary(self) -> tuple[str, ...]:
        """Names of the parts inside the boundary, whether their figure is known or not."""
        return tuple(part.name for part in self.components)


def total(components: Iterable[Component], flags: Iterable[str] = ()) -> Energy:
    """Sum up components; without any, the energy is unavailable and flagged ``no_source``."""
    parts = tuple(components)
    found = set(flags) if parts else {*flags, Flag.NO_SOURCE}
    for part in parts:
        found.update(part.flags)
    all_flags = tuple(sorted(found))
    label = worst([part.label for part in parts])
    if label is Label.UNAVAILABLE:
        return Energy(components=parts, flags=all_flags)
    amounts = [(part.joules, part.low_j, part.high_j, part.resolution_j, part.systematic_j) for part in parts]
    total_j, low_j, high_j, resolution_j, systematic_j = map(_sum_if_known, zip(*amounts, strict=True))
    counter_label = worst([part.counter_label for part in parts])
    return Energy(
        total_j, low_j, high_j, resolution_j, systematic_j, label, counter_label, components=parts, flags=all_flags
    )


def _sum_if_known(values: tuple[float | None, ...]) -> float | None:
    return None if None in values else sum(values)  # type: ignore[arg-type]  # none of them is None


def joined(parts: Iterable[Component]) -> list[Component]:
    """Merge two successive components of one name: the first has the figure, the second its upper bound.

    Such pairs come from the sources "mean" and "larger" of `MachineShare`, and from `GPUPower` and
    `GPUPowerAtMost`. The mean lies midway between both shares, so the smaller share is as far below
    it as the larger one is above it.
    """
    found: list[Component] = []
    for part in parts:
        if found and found[-1].name == part.name:
            found[-1] = _pair(found[-1], part)
        else:
            found.append(part)
    return found


def _pair(mean: Component, larger: Component) -> Component:
    flags = tuple(sorted({*mean.flags, *larger.flags}))
    if mean.joules is None or mean.low_j is None or mean.high_j is None or larger.high_j is None:
        return replace(mean, flags=flags)
    if larger.joules is None:
        return replace(larger, flags=flags)
    if mean.counter_label is Label.MEASURED_SAMPLED:  # GPUPower and GPUPowerAtMost
        off_j = max(larger.joules - mean.joules, 0.0)
        return replace(mean, low_j=max(mean.low_j - off_j, 0.0), high_j=mean.high_j + off_j, flags=flags)
    high_j = max(larger.high_j, mean.joules)
    low_j = min(max(2 * mean.low_j - high_j, 0.0), mean.joules)
    return replace(
        mean,
        label=worst((Label.MODELED, mean.label)),
        low_j=low_j,
        high_j=high_j,
        systematic_j=max(high_j - mean.joules, mean.joules - low_j),
        flags=flags,
    )


@dataclass(frozen=True, slots=True)
class CPUModel:
    """A model of the CPU's power for machines without counters: W per logical CPU when idle and when fully used.

    Idle and busy have separate ranges: processors differ more when idle. ``source`` says where the figures come from;
    there are no defaults.

    Raises:
        BadSettings: A figure is out of its range, or busy power is below idle power.
    """

    idle_w_per_cpu: float
    busy_w_per_cpu: float
    idle_low_w_per_cpu: float
    idle_high_w_per_cpu: float
    busy_low_w_per_cpu: float
    busy_high_w_per_cpu: float
    source: str

    def __post_init__(self) -> None:
        idle = (self.idle_low_w_per_cpu, self.idle_w_per_cpu, self.idle_high_w_per_cpu)
        busy = (self.busy_low_w_per_cpu, self.busy_w_per_cpu, self.busy_high_w_per_cpu)
        if not (0 <= idle[0] <= idle[1] <= idle[2] and 0 < busy[0] <= busy[1] <= busy[2]):
            raise BadSettings("energy.cpu_model", "needs 0 <= low <= middle <= high, and busy > 0")
        if any(a > b for a, b in zip(idle, busy, strict=True)):
            raise BadSettings("energy.cpu_model", "needs low, middle and high of idle to be no more than those of busy")


@dataclass(frozen=True, slots=True)
class Embodied:
    """Embodied carbon of what one wrapper reserves, gCO2eq per hour of reservation, with its range and its source."""

    g_per_hour: float
    low_g_per_hour: float
    high_g_per_hour: float
    source: str


@dataclass(frozen=True, slots=True)
class GridIntensity:
    """Carbon intensity of the electricity, gCO2eq/kWh: of a zone in a data set, or the operator's own (zone None).

    ``dataset`` and ``version`` name the data set, or the operator's source and date. ``year`` is
    the year that the value holds for, ``source`` the origin of the value in the data set, ``low``
    and ``high`` its range; None if unknown.

    Raises:
        BadSettings: The value is not within its range.
    """

    gco2eq_per_kwh: float
    zone: str | None
    dataset: str
    version: str
    year: int | None = None
    source: str | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 <= low <= self.gco2eq_per_kwh <= high:
            raise BadSettings("energy.grid", "needs 0 <= low_gco2eq_per_kwh <= gco2eq_per_kwh <= high_gco2eq_per_kwh")

    @property
    def range(self) -> tuple[float, float]:
        """Low and high, gCO2eq/kWh; both the value itself if there is no range."""
        value = self.gco2eq_per_kwh
        return value if self.low is None else self.low, value if self.high is None else self.high


@dataclass(frozen=True, slots=True)
class SCISettings:
    """The operator's settings for scores.

    ``pue`` ≥ 1: power usage effectiveness of the site. ``allow_estimates``: whether energy that is not measured may
    give a score. ``embodied`` None: unknown, so there is no score. ``cpu_model`` None: the CPU is counted by hardware
    counters or not at all.
    """

    pue: float
    functional_unit: FunctionalUnit
    allow_estimates: bool
    embodied: Embodied | None = None
    cpu_model: CPUModel | None = None
