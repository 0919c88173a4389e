"""What a lease has used so far, idle time included, and what is left of its budget. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.energy.attribution import Flow
from deployments.energy.timeline import Interval
from registry.contract.messages import LeaseGrant
from registry.errors import BudgetUsed
from registry.wire.flags import Flag

NEARLY_USED = 0.8
"""Answers warn when this part of a budget is used."""


# D64: the counted stretch
@dataclass(slots=True, eq=False)
class Counted:
    """The counted stretch of a lease: from the start of the first to the end of the last prompt that is no warm-up.

    ``flow`` is the sum over its time, except for LLM starts and for ``intervals``, which are not
    added yet. ``most``: most prompts in flight at once. ``prompt_s``: seconds of all prompts in it,
    warm-ups included. ``warmed_up``: a warm-up was in flight in it. These three are as of
    ``ended_s``, which is None before the first end.
    """

    begun_s: float | None = None
    ended_s: float | None = None
    most: int = 0
    prompt_s: float = 0.0
    warmed_up: bool = False
    prompts: int = 0
    output_tokens: int = 0
    tokens_unknown: int = 0
    units: int = 0
    units_unknown: int = 0
    flow: Flow | None = None
    intervals: list[Interval] = field(default_factory=list)
    _in_flight: int = 0
    _warmups: int = 0
    _at_s: float = 0.0
    _most: int = 0
    _prompt_s: float = 0.0
    _warmed_up: bool = False
    """``_most``, ``_prompt_s`` and ``_warmed_up`` hold the values until now; the public ones until ``ended_s``."""

    def begin(self, at_s: float, *, warmup: bool) -> None:
        """Note that a prompt of the lease begins."""
        self._pass(at_s)
        self._in_flight += 1
        self._warmups += warmup
        if not warmup and self.begun_s is None:
            self.begun_s = at_s
            self._most, self._prompt_s, self._warmed_up = 0, 0.0, False
        self._most = max(self._most, self._in_flight)
        self._warmed_up = self._warmed_up or self._warmups > 0

    def end(self, at_s: float, *, warmup: bool) -> None:
        """Note that a prompt of the lease ends."""
        self._pass(at_s)
        self._in_flight -= 1
        self._warmups -= warmup
        if not warmup:
            self.ended_s = at_s
            self.most, self.prompt_s, self.warmed_up = self._most, self._prompt_s, self._warmed_up

    def _pass(self, at_s: float) -> None:
        self._prompt_s += self._in_flight * (at_s - self._at_s)
        self._at_s = at_s

    def add(self, start_s: float, end_s: float) -> None:
        """Add an interval of the lease, later than those before; the part before ``begun_s`` is ignored."""
        if self.begun_s is None or end_s <= max(start_s, self.begun_s):
            return
        start_s = max(start_s, self.begun_s)
        if self.intervals and self.intervals[-1][1] == start_s:  # one window of the counters, not two
            start_s = self.intervals.pop()[0]
        self.intervals.append((start_s, end_s))

    def take(self, at_least_s: float) -> list[Interval]:
        """Take out the times up to ``ended_s``, to be summed up; none if they total less than ``at_least_s``."""
        if self.ended_s is None:
            return []
        ended_s = self.ended_s
        taken = [(start_s, min(end_s, ended_s)) for start_s, end_s in self.intervals if start_s < ended_s]
        if sum(end_s - start_s for start_s, end_s in taken) < at_least_s:
            return []
        self.intervals = [(max(start_s, ended_s), end_s) for start_s, end_s in self.intervals if end_s > ended_s]
        return taken


@dataclass(slots=True, eq=False)
class LeaseAccount:
    """One lease, from its bind to its end, in the meter's clock.

    ``writes_text``: its LLM answers with text; an LLM that embeds or scores has no output tokens.
    ``flow`` and ``idle`` are sums over its written stretches. ``before_j`` (J) and ``before_g``
    (gCO2eq) are what it used under an earlier process. They are taken from the first grant only: a
    later one may include windows of this process. ``units`` sums the functional units of all but
    ``units_unknown`` prompts; ``tokens`` (prompt, cached, output) those of all but
    ``tokens_unknown``. ``cached`` and ``words`` are None once they are unknown for one prompt.
    ``unwritten``: prompts that are in flight or not written.
    """

    grant: LeaseGrant
    begun_s: float
    model: str | None
    writes_text: bool = True
    flow: Flow | None = None
    idle: Flow | None = None
    unwritten: int = 0
    prompts: int = 0
    warmups: int = 0
    units: int = 0
    units_unknown: int = 0
    tokens: tuple[int, int | None, int] = (0, 0, 0)
    tokens_unknown: int = 0
    words: int | None = 0
    counted: Counted = field(default_factory=Counted)
    flags: set[str] = field(default_factory=set)
    handed_over_s: float | None = field(init=False)
    """UTC second at which an earlier process of the wrapper received the lease; None if there was none."""
    before_j: float = field(init=False)
    before_g: float = field(init=False)

    def __post_init__(self) -> None:
        self.handed_over_s = self.grant.handed_over_s
        self.before_j, self.before_g = self.grant.used_j, self.grant.used_g

    @property
    def has_budget(self) -> bool:
        """Whether the lease has a limit."""
        return self.grant.max_j is not None or self.grant.max_g is not None


@dataclass(frozen=True, slots=True)
class Budget:
    """A lease's limit and what it has used, in J or gCO2eq; ``used`` is None if unknown."""

    unit: str
    limit: float
    used: float | None

    @property
    def flag(self) -> Flag | None:
        """The flag for answers: the budget is nearly used, or the use is unknown; else None."""
        if self.used is None:
            return Flag.BUDGET_NOT_ENFORCED
        return Flag.BUDGET_NEARLY_USED if self.used >= NEARLY_USED * self.limit else None

    def require(self) -> None:
        """Raise BudgetUsed if nothing of the budget is left. If the use is unknown, the limit is not enforced."""
        if self.used is not None and self.used >= self.limit:
            raise BudgetUsed(self.unit, float(f"{self.used:.6g}"), self.limit)
