"""Estimates an amount per unit (joules per token …) and its 95 % interval from single prompts. Pure.

**What is estimated.** The total amount divided by the total units, as expected for prompts of this kind
and leases of this LLM on this machine. ``value`` is the ratio of the sums, not the mean of the ratios:
long answers have more weight, because they take more energy.

**The interval.** Prompts differ, and so do leases (temperature, clock rates, placement). Several leases
ask the same prompts, so samples are not independent. They are therefore summed in two ways: by prompt
and by lease. Each way gives a variance of ``value``, and a Student's t with its own degrees of freedom.
Half the width of the interval is ``sqrt((t_prompts · s_prompts)² + (t_leases · s_leases)²)``, which
covers at least 95 % of normal deviations whatever the two variances are. Three corrections follow,
because the distribution over prompts is skewed:

* The degrees of freedom come from the *effective* number of prompts: ten prompts of which one is as long as the others
  together count as 3.6 (``_effective``).
* The side to which the prompts are skewed is widened by Johnson's term.
* The interval is symmetric in the logarithm, so it never contains an amount below 0.

**Systematic errors** have the same sign in all samples, so more samples don't reduce them. They may be
larger on one side: even if energy was measured badly, a lower bound of it is known. The low end of the
interval is computed as if every amount were too high by its whole systematic error; the high end, as if
every amount were too low. So the interval starts at 0 only if the amounts may be 0.

The result is deterministic: equal samples, in any order, give equal digits.

``docs/measurements.md`` shows how often the interval contains the true value; the limits below come from there.

Source: S. Banerjee, "Approximate confidence interval for linear functions of means of k populations
when the population variances are not equal", Sankhyā A 22 (1960), for the sum of two t's; N. J.
Johnson, "Modified t tests and confidence intervals for asymmetrical populations", JASA 73 (1978),
for the skewness; L. Kish, "Survey Sampling" (1965), for the effective number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import cos, exp, fsum, inf, lgamma, pi, sqrt, tan
from statistics import median
from typing import Final

# D66: no interval below these
MIN_PROMPTS: Final = 10
"""Minimum number of prompts for an interval: with fewer, it may contain the true value in less than 93 % of cases."""

MIN_LEASES: Final = 2
"""Minimum number of leases for an interval: one lease does not show how leases differ."""

_SKEW_WEIGHT: Final = 1.5
"""Factor of Johnson's term. 1 would be right for the true skewness, but few prompts underestimate it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The ``amount`` ≥ 0 (joules, grams, seconds …) and the ``units`` ≥ 0 (tokens …) of one prompt.

    ``lease`` and ``prompt`` group the samples: the same text has the same ``prompt`` in every lease. The amount of a
    prompt with 0 units (refused, cut off) is added like any other. ``systematic_low``, ``systematic_high``, ≥ 0: by how
    much the true amount may be lower (but not below 0) or higher because of errors with the same sign in all samples.
    """

    lease: str
    prompt: str
    amount: float
    units: float
    systematic_low: float = 0.0
    systematic_high: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """An amount per unit with its 95 % interval ``low`` to ``high``; None: not known.

    ``n``, ``prompts``, ``leases``: number of samples, and of their prompts and leases. ``value``: ratio of the sums.
    ``mean_of_ratios``, ``median``, ``stdev`` (n - 1): of the ratios of single samples with units. ``low``, ``high``
    include systematic errors; ``statistical_low``, ``statistical_high`` do not. ``systematic_low``,
    ``systematic_high``: by how much ``value`` may be too high or too low because of systematic errors alone.
    ``too_few``: why there is no interval.
    """

    n: int
    prompts: int
    leases: int
    value: float | None
    mean_of_ratios: float | None
    median: float | None
    stdev: float | None
    low: float | None
    high: float | None
    statistical_low: float | None
    statistical_high: float | None
    systematic_low: float | None
    systematic_high: float | None
    too_few: str | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum of the samples of one prompt, or of one lease."""

    amount: float
    units: float


# D65: one estimate for every published mean
def estimate(samples: Sequence[Sample]) -> Estimate:
    """Estimate the amount per unit.

    Not every lease has to ask every prompt. Takes some 0.3 s for 50,000 samples.

    Raises:
        ValueError: an amount, a number of units or a systematic error is below 0 or not finite.
    """
    if not all(0 <= each < inf for s in samples for each in (s.amount, s.units, s.systematic_low, s.systematic_high)):
        raise ValueError("amounts, units and systematic errors must be finite, and 0 or more")
    ratios = [s.amount / s.units for s in samples if s.units]
    units = fsum(s.units for s in samples)
    amounts = [s.amount for s in samples]
    less = [max(0.0, s.amount - s.systematic_low) for s in samples]
    more = [s.amount + s.systematic_high for s in samples]
    value, least, most = (fsum(each) / units if units else None for each in (amounts, less, more))
    prompts, leases = _groups(s.prompt for s in samples), _groups(s.lease for s in samples)

    def summed(each: Sequence[float]) -> tuple[list[_Sum], list[_Sum]]:
        return _sums(samples, each, prompts), _sums(samples, each, leases)

    sums = summed(amounts)
    too_few = _too_few(*sums)
    low = high = lowest = highest = None
    if value is not None and too_few is None:
        low, high = _interval(*sums)
        lowest, highest = min(low, _interval(*summed(less))[0]), max(high, _interval(*summed(more))[1])
    return Estimate(
        n=len(samples),
        prompts=len(prompts),
        leases=len(leases),
        value=value,
        mean_of_ratios=fsum(ratios) / len(ratios) if ratios else None,
        median=median(ratios) if ratios else None,
        stdev=_stdev(ratios) if len(ratios) > 1 else None,
        low=lowest,
        high=highest,
        statistical_low=low,
        statistical_high=high,
        systematic_low=None if value is None or least is None else value - least,
        systematic_high=None if value is None or most is None else most - value,
        too_few=too_few,
    )


def _groups(names: Iterable[str]) -> list[list[int]]:
    """Return the positions of the samples, grouped by name."""
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        groups.setdefault(name, []).append(at)
    return list(groups.values())


def _sums(samples: Sequence[Sample], amounts: Sequence[float], groups: Iterable[Sequence[int]]) -> list[_Sum]:
    """Return the sums of the groups, with ``amounts`` in place of the samples' own."""
    return [_Sum(fsum(amounts[at] for at in group), fsum(samples[at].units for at in group)) for group in groups]


def _too_few(prompts: Sequence[_Sum], leases: Sequence[_Sum]) -> str | None:
    """Return why there is no interval, None if there is one. Prompts and leases without units are not counted."""
    counts = (("prompts", prompts, MIN_PROMPTS), ("leases", leases, MIN_LEASES))
    known = [(name, sum(each.units > 0 for each in sums), least) for name, sums, least in counts]
    return "; ".join(f"too few {name}: {n} (at least {least})" for name, n, least in known if n < least) or None


def _interval(prompts: Sequence[_Sum], leases: Sequence[_Sum]) -> tuple[float, float]:
    """Return the 95 % interval, from the sums of the same samples by prompt and by lease."""
    value = fsum(each.amount for each in prompts) / fsum(each.units for each in prompts)
    if not value:
        return 0.0, 0.0
    by_prompt = _deviations(value, prompts)
    n = len(prompts)
    squares = fsum(d * d for d in by_prompt)
    variance = squares * n / (n - 1)
    effective = min(_effective([p.units for p in prompts]), _effective([p.amount for p in prompts]))
    t = student_975(max(1.0, effective - 1))
    skewness = _skewness(by_prompt, squares)
    widened = _SKEW_WEIGHT * abs(skewness) * (1 + 2 * t * t) / (6 * sqrt(n))
    of_leases = _lease_error(value, leases)
    down = sqrt(((t + widened) if skewness < 0 else t) ** 2 * variance + of_leases**2)
    up = sqrt(((t + widened) if skewness > 0 else t) ** 2 * variance + of_leases**2)
    return value * exp(-down), value * exp(min(up, 500.0))  # floats overflow at e^709


def _deviations(value: float, sums: Sequence[_Sum]) -> list[float]:
    """Return for each sum: its amount minus the amount expected from its units, relative to the total amount."""
    amount = fsum(each.amount for each in sums)
    return [(each.amount - value * each.units) / amount for each in sums]


def _lease_error(value: float, leases: Sequence[_Sum]) -> float:
    """Return t times the relative standard error of ``value`` that comes from differences between leases.

    The variance is unbiased for leases of any size if their amounts per unit have the same variance; an
    aborted lease has little weight. For n leases of equal size, ``factor`` is n / (n - 1).
    """
    units = fsum(lease.units for lease in leases)
    weights = [lease.units / units for lease in leases]
    together = fsum(w * w for w in weights)
    # (1 - 2w + together), written so that rounding can't make it negative
    factor = together / fsum(w * w * ((1 - w) ** 2 + max(0.0, together - w * w)) for w in weights)
    variance = factor * fsum(d * d for d in _deviations(value, leases))
    return student_975(max(1.0, 1 / together - 1)) * sqrt(variance)


def _effective(sizes: Sequence[float]) -> float:
    """Return the effective number of parts: their number if all are equal, 1 if one part is the whole sum.

    For example, one part of 9 and nine parts of 1 count as 18² / (81 + 9) = 3.6.
    """
    total = fsum(sizes)
    return 1 / fsum((size / total) ** 2 for size in sizes)


def _skewness(deviations: Sequence[float], squares: float) -> float:
    """Return the adjusted skewness of deviations whose mean is 0; 0 if there is none."""
    n = len(deviations)
    spread = sqrt(squares / n)
    if not spread:
        return 0.0
    return fsum((d / spread) ** 3 for d in deviations) / n * sqrt(n * (n - 1)) / (n - 2)


def _stdev(values: Sequence[float]) -> float:
    mean = fsum(values) / len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def student_975(degrees: float) -> float:
    """Return the 97.5 % point of Student's t for 1 or more degrees of freedom, whole or not.

    With t = sqrt(degrees) · tan(a), 95 % of the density cos(a)^(degrees - 1) lie between -a and a.
    Newton's method finds a from below, because the density falls; the integral is Simpson's rule.
    Good to 1e-7.
    """
    power = degrees - 1
    half = sqrt(pi) / 2 * exp(lgamma(degrees / 2) - lgamma((degrees + 1) / 2))
    wanted = 0.95 * half
    angle, change = 0.0, 1.0
    while change > 1e-7 * angle:  # convergence is quadratic: the next change would be about the square of this one
        step = angle / 64
        inner = [cos(k * step) ** power for k in range(65)]
        area = step / 3 * (inner[0] + 4 * fsum(inner[1:64:2]) + 2 * fsum(inner[2:64:2]) + inner[64])
        change = (wanted - area) / inner[64]
        angle += change
    return sqrt(degrees) * tan(angle)
