"""The cost of a prompt token relative to an output token, learned from prompts that ran alone. Pure."""

from __future__ import annotations

from typing import NamedTuple

from deployments.energy.figures import Energy
from registry.wire.flags import Flag

FEWEST_PROMPTS = 10
"""With fewer prompts the weight is unknown."""
LEAST_SPREAD = 0.05
"""Least value of 1 - r², where r is the correlation of prompt and output tokens over all prompts. Below it, both
numbers rise together, and their costs can't be separated."""
_ERRORS = 2.0
"""The range of a weight is this many standard errors to either side."""
_ROUNDING = 1e-9
"""Relative rounding error of a sum of squares about the mean, if all numbers are equal."""
_UNFIT = frozenset({Flag.SHARED, Flag.TOO_SHORT, Flag.PROVISIONAL, Flag.CONTENDED})


class Weight(NamedTuple):
    """The cost of a computed prompt token relative to an output token: an estimate and its range, >= 0."""

    low: float
    mid: float
    high: float


UNKNOWN = Weight(0.0, 0.5, 1.0)
"""Used until the weight is known. 0: only output tokens cost energy; 1: all tokens cost the same; 0.5: in between."""


class _Sums(NamedTuple):
    """Sums of products of prompt tokens (x), output tokens (y) and joules (j)."""

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    xj: float = 0.0
    yj: float = 0.0
    jj: float = 0.0

    def plus(self, x: float, y: float, j: float, *, times: float = 1.0) -> _Sums:
        more = (x * x, x * y, y * y, x * j, y * j, j * j)
        return _Sums(*(old + times * product for old, product in zip(self, more, strict=True)))

    @property
    def _determinant(self) -> float:
        return self.xx * self.yy - self.xy * self.xy

    def told_apart(self, whole: _Sums) -> bool:
        """Whether both kinds of tokens vary independently; ``whole``: the sums before the means were subtracted."""
        vary = self.xx > _ROUNDING * whole.xx and self.yy > _ROUNDING * whole.yy
        return vary and self._determinant >= LEAST_SPREAD * self.xx * self.yy

    def costs(self) -> tuple[float, float]:
        """Return joules per prompt token and per output token."""
        return (
            (self.yy * self.xj - self.xy * self.yj) / self._determinant,
            (self.xx * self.yj - self.xy * self.xj) / self._determinant,
        )

    def rest(self, per_x: float, per_y: float) -> float:
        """Return the sum of squared residuals that these costs leave."""
        return self.jj - per_x * self.xj - per_y * self.yj

    def spread(self, weight: float) -> float:
        """Return the variance of the ratio of both costs, to first order, for residual variance 1 and output cost 1."""
        return max(self.yy + 2 * weight * self.xy + weight * weight * self.xx, 0.0) / self._determinant


# D60: the weight of a prompt token is learned
class TokenWeight:
    """Learns the weight of one LLM on one machine; a new LLM needs a new one.

    The joules are fitted by least squares, from sums of products, with three costs: of a prompt, of
    a prompt token and of an output token. Without the first, a prompt's fixed cost would be charged
    to its tokens. If it comes out negative, the fit is repeated without it. A negative cost of a
    prompt token counts as weight 0; without a positive cost of an output token the weight is
    unknown.
    """

    def __init__(self) -> None:
        self._prompts = 0
        self._x = self._y = self._j = 0.0
        self._sums = _Sums()

    def learn(self, computed: int, output: int, energy: Energy) -> None:
        """Learn from a prompt: its computed prompt tokens, its output tokens and its energy.

        A prompt whose energy is unknown, or not its own alone, is ignored.
        """
        joules = energy.total_j
        if joules is None or _UNFIT.intersection(energy.flags):
            return
        self._prompts += 1
        self._x += computed
        self._y += output
        self._j += joules
        self._sums = self._sums.plus(computed, output, joules)

    @property
    def weight(self) -> Weight:
        """The weight; `UNKNOWN` until the prompts give a narrower range."""
        if self._prompts < FEWEST_PROMPTS:
            return UNKNOWN
        free = self._sums.plus(self._x, self._y, self._j, times=-1 / self._prompts)  # about the means
        if not free.told_apart(self._sums):
            return UNKNOWN
        costs = per_prompt_token, per_output_token = free.costs()
        if self._j < per_prompt_token * self._x + per_output_token * self._y:  # a prompt's cost is < 0: take 0
            per_prompt_token, per_output_token = self._sums.costs()
        if per_output_token <= 0:
            return UNKNOWN
        # The uncertainty is that of the fit in which all three costs are free.
        variance = max(free.rest(*costs), 0.0) / (self._prompts - 3)
        weight = per_prompt_token / per_output_token
        error = _ERRORS * (variance * free.spread(weight)) ** 0.5 / per_output_token
        known = Weight(max(weight - error, 0.0), max(weight, 0.0), max(weight + error, 0.0))
        return known if known.high - known.low < UNKNOWN.high - UNKNOWN.low else UNKNOWN
