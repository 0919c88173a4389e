"""The interface of an energy source: a cumulative counter, its accuracy, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from registry.wire.flags import Flag
from registry.wire.labels import Label

POWER_HEADROOM = 1.2
"""Power above this multiple of the limit is implausible."""


class CounterLost(Exception):
    """The counter's change since the last reading is unknown; ``flag`` says why."""

    def __init__(self, flag: Flag) -> None:
        super().__init__(flag)
        self.flag = flag


class Joules(NamedTuple):
    """An amount of energy; low and high differ from mid only where it is modelled."""

    low: float
    mid: float
    high: float


class Source(ABC):
    """A cumulative counter of energy, or of a quantity that energy is computed from. Used by one thread at a time.

    Its units are joules unless the class says otherwise.

    Attributes:
        name: The component's name.
        method: How the counter is read.
        label: The label of figures from this source.
        origin: What is read and how, in words.
        max_age_s, step, max_rate: See `history.Track`.
        limit_w: The highest average power that the hardware was set to since reading began, W; None if unknown.
        default_limit_w: Used while ``limit_w`` is None, W: more than any hardware of this kind takes.
        covers_cpu: Whether the counter of a GPU also counts the CPU and all memory.
    """

    name: str
    method: str
    label: Label
    origin: str
    max_age_s: float | None = None
    step: float = 0.0
    limit_w: float | None = None
    default_limit_w: float | None = None
    covers_cpu: bool = False

    @property
    def counter_label(self) -> Label:
        """The label of the counter itself; it differs from ``label`` if the reading is divided."""
        return self.label

    @property
    def redundant(self) -> bool:
        """Whether another source counts the same joules; then no figure includes this one."""
        return False

    @property
    def late(self) -> float:
        """The most units that a reading may lack, and that a later reading then contains."""
        return 0.0

    @property
    def max_rate(self) -> float | None:
        """Upper bound, units per second; None if there is none."""
        limit_w = self.default_limit_w if self.limit_w is None else self.limit_w
        return None if limit_w is None else POWER_HEADROOM * limit_w

    def read_limit(self) -> None:  # noqa: B027 - a model has none
        """Read the power limit again.

        ``limit_w`` never falls, so that steps made before the limit was lowered stay plausible.
        """

    @abstractmethod
    def read(self, now_s: float) -> float:
        """Return the units since a fixed moment. They fall only if the hardware's counter was reset.

        Raises:
            ReadFailed: The read failed this time.
            CounterLost: The counter's history has a gap here; the next reading begins a new history.
        """

    @property
    def unseen_s(self) -> float:
        """The longest change of power that the readings may miss, seconds; 0 for a counter, which misses none."""
        return 0.0

    def unseen(self, lengths_s: Iterable[float]) -> float:
        """Return the possible error of the readings, units, for busy intervals of these lengths, seconds."""
        return 0.0

    def joules(self, duration_s: float, units: float) -> Joules:
        """Return the energy of a time in which the counter rose by ``units``."""
        return Joules(units, units, units)

    def power_w(self) -> float | None:
        """Return the power by other means than this counter, W, to check the counter; None if there are none."""
        return None

    def contended(self, now_s: float) -> bool | None:
        """Whether processes outside this wrapper use the hardware; None if unknown. May take milliseconds."""
        return False

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what was opened. The source is not read afterwards."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Hardware that can't be read, and why. ``in_boundary``: no total is known without it."""

    name: str
    why: str
    in_boundary: bool = False
