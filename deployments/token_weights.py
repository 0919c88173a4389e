"""What a prompt token costs relative to an output token: learned from prompts that were alone. Pure."""

from __future__ import annotations

from typing import NamedTuple

from deployments.energy import Energy

FEWEST_PROMPTS = 10
"""With fewer prompts the weight is not known."""
LEAST_SPREAD = 0.05
"""1 - cos² of prompt and output tokens over all prompts: below it they rise together and can't be told apart."""
_ERRORS = 2.0
"""The range of a weight is so many standard errors to either side."""
_UNFIT = frozenset({"shared", "too_short", "provisional", "contended"})


class Weight(NamedTuple):
    """The cost of a prompt token that was computed, relative to an output token: an estimate and its range, >= 0."""

    low: float
    mid: float
    high: float


UNKNOWN = Weight(0.0, 0.5, 1.0)
"""Before it is known: from output tokens only to all tokens alike, and their middle."""


class TokenWeight:
    """Learns the weight of one LLM on one machine; a new LLM needs a new one.

    Least squares of joules over prompt and output tokens, both of whose costs are >= 0, by the sums of their products.
    """

    def __init__(self) -> None:
        self._prompts = 0
        self._xx = self._xy = self._yy = self._xj = self._yj = self._jj = 0.0

    def learn(self, computed: int, output: int, energy: Energy) -> None:
        """Take a prompt: how many of its tokens were computed, how many came out, and what it cost.

        One whose energy is not known, or is not its own alone, is passed over.
        """
        joules = energy.total_j
        if joules is None or _UNFIT.intersection(energy.flags):
            return
        self._prompts += 1
        self._xx += computed * computed
        self._xy += computed * output
        self._yy += output * output
        self._xj += computed * joules
        self._yj += output * joules
        self._jj += joules * joules

    @property
    def weight(self) -> Weight:
        """The weight as far as it is known; `UNKNOWN` as long as the prompts tell no more than that."""
        size = self._xx * self._yy
        determinant = size - self._xy * self._xy
        if self._prompts < FEWEST_PROMPTS or determinant < LEAST_SPREAD * size or size <= 0:
            return UNKNOWN
        per_prompt_token = (self._yy * self._xj - self._xy * self._yj) / determinant
        per_output_token = (self._xx * self._yj - self._xy * self._xj) / determinant
        if per_output_token <= 0:
            return UNKNOWN
        rest = self._jj - per_prompt_token * self._xj - per_output_token * self._yj
        variance = max(rest, 0.0) / (self._prompts - 2)
        weight = per_prompt_token / per_output_token
        # Of a ratio of two estimates, to first order.
        spread = (self._yy + 2 * weight * self._xy + weight * weight * self._xx) / determinant
        error = _ERRORS * (variance * max(spread, 0.0)) ** 0.5 / per_output_token
        known = Weight(max(weight - error, 0.0), max(weight, 0.0), max(weight + error, 0.0))
        return known if known.high - known.low < UNKNOWN.high - UNKNOWN.low else UNKNOWN
