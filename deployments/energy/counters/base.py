"""What a source of energy figures is: a cumulative counter, how exact it is, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from deployments.energy.figures import Label

POWER_HEADROOM = 1.2
"""Power above this many times the limit is no plausible reading."""


class ReadFailed(Exception):
    """A source could not be read this time; its counter goes on counting."""


class CounterLost(Exception):
    """What the counter did since the last reading can't be told; ``flag`` says why."""

    def __init__(self, flag: str) -> None:
        super().__init__(flag)
        self.flag = flag


class Joules(NamedTuple):
    """An amount of energy; low and high differ from mid only where it is modelled."""

    low: float
    mid: float
    high: float


class Source(ABC):
    """A cumulative counter of energy, or of what energy follows from. Used by one thread at a time.

    ``name`` is that of the component, ``method`` how it is read, ``origin`` says both in words. ``max_age_s``,
    ``step`` and ``max_rate`` (units a second) are as `windows.Track` wants them. ``limit_w`` is the highest average
    power that the hardware has been set to since it is read, None if not known; ``default_limit_w`` stands for it then:
    more than any hardware of the kind takes. ``covers_cpu``: a GPU's counter has the CPU and all memory in it. The
    units are joules unless the class says otherwise.
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
        """The label of the counter that is read; another than ``label`` where its reading is divided."""
        return self.label

    @property
    def redundant(self) -> bool:
        """Whether another source counts the same joules: then this one is in no figure."""
        return False

    @property
    def late(self) -> float:
        """Units that may show at once though they came before."""
        return 0.0

    @property
    def max_rate(self) -> float | None:
        """More units a second can't be; None if there is no such bound."""
        limit_w = self.default_limit_w if self.limit_w is None else self.limit_w
        return None if limit_w is None else POWER_HEADROOM * limit_w

    def read_limit(self) -> None:  # noqa: B027 - a model has none
        """Read the power limit again. It only rises: steps from before it was lowered have to be explained, too."""

    @abstractmethod
    def read(self, now_s: float) -> float:
        """Units since some fixed moment, never less than before unless the hardware's counter was reset.

        Raises:
            ReadFailed: Not this time.
            CounterLost: The history of the counter has a hole here; the next reading begins a new one.
        """

    @property
    def unseen_s(self) -> float:
        """For how long the hardware's power may change without a trace in the readings, seconds; 0 for a counter."""
        return 0.0

    def unseen(self, lengths_s: Iterable[float]) -> float:
        """Units by which readings may be wrong for pieces of work of these lengths, whatever time they lie in."""
        return 0.0

    def joules(self, duration_s: float, units: float) -> Joules:
        """The energy of a time in which the counter went up by so many units."""
        return Joules(units, units, units)

    def power_w(self) -> float | None:
        """Watts that the hardware tells by other means than this counter, to check it by; None if it tells none."""
        return None

    def contended(self, now_s: float) -> bool | None:
        """Whether processes that are not ours use the hardware; None: can't be told. May take milliseconds."""
        return False

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what was opened. The source is not read any more."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What was looked for and can't be read, and why. ``in_boundary``: no total is known without it."""

    name: str
    why: str
    in_boundary: bool = False
