"""What a lease has used so far, idle time included, and what of its budget is left. Reads no hardware."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.attribution import Flow
from registry.errors import BudgetUsed
from registry.reconcile import LeaseGrant

NEARLY_USED = 0.8
"""The part of a budget from which on answers warn."""


@dataclass(slots=True, eq=False)
class LeaseAccount:
    """One lease, from its bind to its end, in the meter's clock.

    ``flow`` and ``idle`` are those of its stretches that are written down. ``before_j`` and ``before_g`` are what it
    used under an earlier process; the registry may say that again when it is in the windows of this one, too.
    ``units`` sums up the functional units of its prompts, None once those of one are not known; ``tokens`` likewise
    (prompt, cached, output), and ``words``. ``unwritten`` prompts of it are in flight, or not written down.
    """

    grant: LeaseGrant
    begun_s: float
    model: str | None
    flow: Flow | None = None
    idle: Flow | None = None
    unwritten: int = 0
    prompts: int = 0
    units: int | None = 0
    tokens: tuple[int, int, int] | None = (0, 0, 0)
    words: int | None = 0
    flags: set[str] = field(default_factory=set)
    before_j: float = field(init=False)
    before_g: float = field(init=False)

    def __post_init__(self) -> None:
        self.before_j, self.before_g = self.grant.used_j, self.grant.used_g

    @property
    def has_budget(self) -> bool:
        """Whether there is a limit to what it may use."""
        return self.grant.max_j is not None or self.grant.max_g is not None


@dataclass(frozen=True, slots=True)
class Budget:
    """What a lease may use and has used, in J or gCO2eq; ``used`` is None where it can't be told."""

    unit: str
    limit: float
    used: float | None

    @property
    def flag(self) -> str | None:
        """What answers have to say of it: that it is nearly used, or that nobody can tell."""
        if self.used is None:
            return "budget_not_enforced"
        return "budget_nearly_used" if self.used >= NEARLY_USED * self.limit else None

    def require(self) -> None:
        """Raise BudgetUsed if nothing of it is left. What can't be told can't be enforced."""
        if self.used is not None and self.used >= self.limit:
            raise BudgetUsed(self.unit, float(f"{self.used:.6g}"), self.limit)
