"""How often the 95 % intervals of ``registry/accounting/estimate.py`` contain the truth.

``python -m tests.bench.coverage`` tells it.

Experiments with a known truth are simulated, and the intervals that the product prints for them are compared with it.
``--tables FILE`` writes all tables as Markdown; docs/measurements.md has those of the default arguments.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import NormalDist
from typing import Final, Literal
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from registry.accounting import estimate as product
from registry.accounting.estimate import Sample, estimate, student_975
from tests.bench.report import OUTPUT, counted, publish

PART = "coverage"
PROMPTS: Final = (3, 5, 10, 20, 50)
LEASES: Final = (1, 2, 3, 5, 10)
TARGET: Final = 0.93
RESAMPLES: Final = 1000
"""Draws of each bootstrap that is compared with."""
NORMAL_975: Final = 1.959964

Floats = NDArray[np.float64]
Interval = tuple[Floats, Floats]
Method = Callable[[Floats, Floats, np.random.Generator], Interval]


@dataclass(frozen=True)
class Population:
    """How experiments come about. Each lease asks the same prompts, as ``greenprompt measure`` does.

    An answer of T tokens to a prompt of p tokens costs (10 + 0.1 p + b T) joules, times the factor of its lease, times
    1 ± 8 %. T (mean 200) and p (mean 100) are lognormal with ``sigma``; b is 0.5 ± 10 % from prompt to prompt.
    """

    unit: Literal["token", "answer"]
    sigma: float
    drift: Literal["none", "random", "linear"]
    """Of the leases' factors: 1; 1 ± 5 %; or from 0.913 to 1.087 in equal steps (also 5 % standard deviation)."""

    @property
    def truth(self) -> float:
        """Joules per unit, expected over prompts and leases."""
        return 120 / 200 if self.unit == "token" else 120.0

    @property
    def truth_of_ratios(self) -> float:
        """The expected joules per unit of one answer: what a mean of ratios estimates."""
        return 20 * exp(self.sigma**2) / 200 + 0.5 if self.unit == "token" else 120.0

    def draw(self, chance: np.random.Generator, experiments: int, prompts: int, leases: int) -> tuple[Floats, Floats]:
        """Return the joules and units of experiments, each in the shape (experiments, prompts, leases)."""
        shape = (experiments, prompts, 1)
        tokens = 200 * chance.lognormal(-(self.sigma**2) / 2, self.sigma, shape)
        asked = 100 * chance.lognormal(-(self.sigma**2) / 2, self.sigma, shape)
        alone = 10 + 0.1 * asked + 0.5 * (1 + 0.1 * chance.standard_normal(shape)) * tokens
        noise = 1 + 0.08 * chance.standard_normal((experiments, prompts, leases))
        joules = alone * self._factors(chance, experiments, leases)[:, None, :] * noise
        units = np.broadcast_to(tokens, joules.shape) if self.unit == "token" else np.ones_like(joules)
        return joules, units

    def _factors(self, chance: np.random.Generator, experiments: int, leases: int) -> Floats:
        if self.drift == "random":
            return 1 + 0.05 * chance.standard_normal((experiments, leases))
        width = 0.05 * 3**0.5 if self.drift == "linear" and leases > 1 else 0.0
        return np.broadcast_to(np.linspace(1 - width, 1 + width, leases), (experiments, leases))

    def __str__(self) -> str:
        return f"J/{self.unit}, sigma {self.sigma:g}, drift {self.drift}"


WORLDS: Final = [
    Population(unit, sigma, drift)
    for unit in ("token", "answer")
    for sigma in (0.5, 1.0)
    for drift in ("none", "random", "linear")
]


def samples_of(joules: Floats, units: Floats) -> list[Sample]:
    """One experiment as the product gets it. An answer that is not a number is missing."""
    rows = enumerate(zip(joules.tolist(), units.tolist(), strict=True))
    return [
        Sample(f"lease{lease}", f"prompt{prompt}", amount, unit)
        for prompt, (amounts, of_prompt) in rows
        for lease, (amount, unit) in enumerate(zip(amounts, of_prompt, strict=True))
        if amount == amount  # noqa: PLR0124
    ]


def printed(joules: Floats, units: Floats, _: np.random.Generator | None = None) -> Interval:
    """The intervals of the product; NaN where it prints none."""
    estimates = [estimate(samples_of(a, u)) for a, u in zip(joules, units, strict=True)]
    nan = float("nan")
    low = [nan if each.low is None else each.low for each in estimates]
    high = [nan if each.high is None else each.high for each in estimates]
    return np.array(low), np.array(high)


# --- what it is compared with ----------------------------------------------------------------------------------


def satterthwaite(joules: Floats, units: Floats, _: np.random.Generator) -> Interval:
    """Crossed random effects (prompt, lease, residual) of the linearised ratio; one t by Satterthwaite."""
    _, prompts, leases = joules.shape
    total = units.sum((1, 2))
    value = joules.sum((1, 2)) / total
    deviations = (joules - value[:, None, None] * units) / total[:, None, None]
    by_prompt, by_lease = deviations.sum(2), deviations.sum(1)
    rest = deviations - by_prompt[:, :, None] / leases - by_lease[:, None, :] / prompts
    degrees = (prompts - 1, leases - 1, (prompts - 1) * (leases - 1))
    of_prompts = (by_prompt**2).sum(1) * prompts / degrees[0]
    of_leases = (by_lease**2).sum(1) * leases / degrees[1]
    of_rest = (rest**2).sum((1, 2)) * prompts * leases / degrees[2]
    variance = np.maximum(of_prompts + of_leases - of_rest, np.maximum(of_prompts, of_leases))
    each = zip((of_prompts, of_leases, of_rest), degrees, strict=True)
    together = variance**2 / sum(part**2 / freedom for part, freedom in each)
    half = np.array([student_975(max(1.0, freedom)) for freedom in together]) * np.sqrt(variance)
    return value - half, value + half


def students_t(joules: Floats, units: Floats, _: np.random.Generator) -> Interval:
    """Until 2026-11, the report: the mean of ratios, with all answers as if independent."""
    ratios = (joules / units).reshape(len(joules), -1)
    n = ratios.shape[1]
    half = student_975(n - 1) * ratios.std(1, ddof=1) / n**0.5
    return ratios.mean(1) - half, ratios.mean(1) + half


def percentiles(joules: Floats, units: Floats, chance: np.random.Generator) -> Interval:
    """Until 2026-11, ``greenprompt measure``: the mean of ratios, percentiles of a bootstrap over prompts."""
    prompts = joules.shape[1]
    drawn = chance.multinomial(prompts, np.full(prompts, 1 / prompts), (len(joules), RESAMPLES)) / prompts
    means = np.einsum("ebp,ep->eb", drawn, (joules / units).mean(2))
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    return low, high


def bca(joules: Floats, units: Floats, chance: np.random.Generator, *, crossed: bool = True) -> Interval:
    """A hierarchical bootstrap of the ratio of sums, bias-corrected and accelerated.

    Leases are drawn, and prompts: the same for all leases (crossed), or others for each lease that was drawn.
    """
    limits = [_bca(a, u, chance, crossed=crossed) for a, u in zip(joules, units, strict=True)]
    return np.array([low for low, _ in limits]), np.array([high for _, high in limits])


def nested_bca(joules: Floats, units: Floats, chance: np.random.Generator) -> Interval:
    """The same, with other prompts for each lease that was drawn."""
    return bca(joules, units, chance, crossed=False)


def widened_bca(joules: Floats, units: Floats, chance: np.random.Generator) -> Interval:
    """BCa (crossed), its two sides made longer by t / 1.96 for the smaller of the numbers of prompts and leases."""
    low, high = bca(joules, units, chance)
    value = joules.sum((1, 2)) / units.sum((1, 2))
    longer = student_975(min(joules.shape[1:]) - 1) / NORMAL_975
    return value - longer * (value - low), value + longer * (high - value)


def _bca(joules: Floats, units: Floats, chance: np.random.Generator, *, crossed: bool) -> tuple[float, float]:
    prompts, leases = joules.shape
    normal = NormalDist()
    of_leases = chance.multinomial(leases, np.full(leases, 1 / leases), RESAMPLES)
    even = np.full(prompts, 1 / prompts)
    if crossed:
        of_prompts = chance.multinomial(prompts, even, RESAMPLES)
        sums = [((of_prompts @ amounts) * of_leases).sum(1) for amounts in (joules, units)]
    else:
        drawn = chance.multinomial(of_leases * prompts, even).reshape(RESAMPLES, -1)
        sums = [drawn @ amounts.T.ravel() for amounts in (joules, units)]
    ratios = sums[0] / sums[1]
    value = joules.sum() / units.sum()
    below = np.clip(np.mean(ratios < value), 1 / RESAMPLES, 1 - 1 / RESAMPLES)
    bias = normal.inv_cdf(float(below))
    deviations = joules - value * units
    influence = np.concatenate([deviations.sum(1), deviations.sum(0)])
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    points = []
    for z in (-NORMAL_975, NORMAL_975):
        point = normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        points.append(float(np.quantile(ratios, point)))
    return points[0], points[1]


METHODS: Final[dict[str, tuple[Method, bool]]] = {
    "this one": (printed, False),
    "Satterthwaite": (satterthwaite, False),
    "BCa, crossed": (bca, False),
    "BCa, widened": (widened_bca, False),
    "BCa, nested": (nested_bca, False),
    "old: t": (students_t, True),
    "old: percentiles": (percentiles, True),
}
"""Name → method, and whether it estimates the mean of ratios."""


# --- tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Share of intervals that contain the truth, and their median width.

    A width of 1 is that of ``± 1.96`` true standard errors, which no experiment knows.
    """

    coverage: float
    width: float
    none: str | None = None

    def __str__(self) -> str:
        return f"{100 * self.coverage:.1f} · {self.width:.2f}" if self.none is None else f"- {self.none}"


def cell(interval: Interval, truth: float, error: float) -> Cell:
    """Compare the intervals of one method with the truth."""
    low, high = interval
    return Cell(float(np.mean((low <= truth) & (truth <= high))), float(np.median(high - low) / (2 * 1.96 * error)))


def standard_error(joules: Floats, units: Floats) -> float:
    """The standard deviation of the ratio of sums over the experiments."""
    return float((np.nansum(joules, (1, 2)) / np.nansum(units, (1, 2))).std())


def own_cell(world: Population, experiments: int, prompts: int, leases: int, seed: int) -> Cell:
    """The product's coverage in one world with one number of prompts and leases."""
    chance = np.random.default_rng([seed, WORLDS.index(world), prompts, leases])
    joules, units = world.draw(chance, experiments, prompts, leases)
    reason = estimate(samples_of(joules[0], units[0])).too_few
    if reason is not None:
        return Cell(1.0, 0.0, reason)
    return cell(printed(joules, units), world.truth, standard_error(joules, units))


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def printed_table(experiments: int, seed: int) -> tuple[str, list[Cell]]:
    """Coverage of what is printed, in all worlds; and its cells with an interval."""
    rows, cells = [], []
    for world, prompts in itertools.product(WORLDS, PROMPTS):
        row = [own_cell(world, experiments, prompts, leases, seed) for leases in LEASES]
        cells += [each for each in row if each.none is None]
        if prompts >= product.MIN_PROMPTS:
            rows.append([str(world), prompts, *("-" if each.none else each for each in row)])
    short = own_cell(WORLDS[0], 1, product.MIN_PROMPTS - 1, product.MIN_LEASES - 1, seed).none
    text = markdown(["world", "prompts", *(f"{n} leases" if n > 1 else "1 lease" for n in LEASES)], rows)
    return f"{text}\n`-` stands for no interval but, for example, `{short}`; so do all rows that are not here.\n", cells


def below_table(experiments: int, seed: int) -> str:
    """Coverage if the least number of prompts were not asked for, in the worlds with the most skewed amounts."""
    rows = []
    with mock.patch.object(product, "MIN_PROMPTS", 3):
        for world, prompts in itertools.product(WORLDS[9:11], (3, 4, 5, 6, 8)):
            row = [own_cell(world, experiments, prompts, leases, seed) for leases in LEASES[1:]]
            rows.append([str(world), prompts, *row])
    return markdown(["world", "prompts", *(f"{n} leases" for n in LEASES[1:])], rows)


def with_gaps(chance: np.random.Generator, joules: Floats, units: Floats) -> tuple[Floats, Floats]:
    """Take away a tenth of the answers, and all of the last lease after a third of its prompts."""
    _, prompts, _ = joules.shape
    missing = chance.random(joules.shape) < 0.1
    missing[:, prompts // 3 :, -1] = True
    missing[:, 0, :] = False
    missing[:, :, 0] = False
    return np.where(missing, np.nan, joules), np.where(missing, np.nan, units)


def gaps_table(experiments: int, seed: int) -> tuple[str, list[Cell]]:
    """Coverage when a tenth of the answers is missing and the last lease was aborted after a third of its prompts."""
    rows, cells = [], []
    for world, prompts in itertools.product(WORLDS, (10, 20, 50)):
        if world.drift == "linear":
            continue
        row = []
        for leases in LEASES[1:]:
            chance = np.random.default_rng([seed, 7, WORLDS.index(world), prompts, leases])
            joules, units = world.draw(chance, experiments, prompts, leases)
            joules, units = with_gaps(chance, joules, units)
            row.append(cell(printed(joules, units), world.truth, standard_error(joules, units)))
        cells += row
        rows.append([str(world), prompts, *row])
    return markdown(["world", "prompts", *(f"{n} leases" for n in LEASES[1:])], rows), cells


def methods_table(experiments: int, seed: int) -> str:
    """Coverage and width of the methods that were tried."""
    rows = []
    worlds = [WORLDS[0], WORLDS[1], WORLDS[9], WORLDS[10]]
    for world, prompts, leases in itertools.product(worlds, (10, 50), (2, 3, 10)):
        chance = np.random.default_rng([seed, 8, WORLDS.index(world), prompts, leases])
        joules, units = world.draw(chance, experiments, prompts, leases)
        error = standard_error(joules, units)
        cells = [
            cell(method(joules, units, chance), world.truth_of_ratios if of_ratios else world.truth, error)
            for method, of_ratios in METHODS.values()
        ]
        rows.append([str(world), f"{prompts} x {leases}", *cells])
    return markdown(["world", "prompts x leases", *METHODS], rows)


def overlap(method: Method, joules: Floats, units: Floats, chance: np.random.Generator) -> float:
    """The share of experiments in which the intervals of the first and the second half of the leases overlap."""
    (low, high), (other_low, other_high) = (
        method(a, u, chance) for a, u in zip(np.split(joules, 2, 2), np.split(units, 2, 2), strict=True)
    )
    return float(np.mean((low <= other_high) & (other_low <= high)))


def equal_table(experiments: int, seed: int) -> str:
    """How often the intervals of two equal LLMs, asked the same prompts, overlap."""
    rows = []
    for world, prompts, leases in itertools.product((WORLDS[1], WORLDS[10]), (10, 50), (2, 3, 10)):
        chance = np.random.default_rng([seed, 9, WORLDS.index(world), prompts, leases])
        joules, units = world.draw(chance, experiments, prompts, 2 * leases)
        row = [f"{100 * overlap(method, joules, units, chance):.1f}" for method, _ in METHODS.values()]
        rows.append([str(world), f"{prompts} x {leases}", *row])
    return markdown(["world", "prompts x leases", *METHODS], rows)


def tables(experiments: int, few: int, seed: int, cells: list[Cell]) -> Iterator[str]:
    """All of them, each with its title; the cells that the product prints are added to ``cells``."""
    text, found = printed_table(experiments, seed)
    cells += found
    yield f"### What is printed ({experiments:,} experiments per cell)\n\n{text}"
    text, found = gaps_table(experiments, seed)
    cells += found
    yield f"### A tenth of the answers missing, the last lease aborted ({experiments:,})\n\n{text}"
    title = f"### Without a least number of prompts, in the hardest worlds ({experiments:,})"
    yield f"{title}\n\n{below_table(experiments, seed)}"
    yield f"### Methods tried ({few:,})\n\n{methods_table(few, seed)}"
    yield f"### Two equal LLMs: intervals that overlap, in % ({few:,})\n\n{equal_table(few, seed)}"


def main(arguments: list[str]) -> int:
    """Simulate, print, write; 1 if an interval that is printed covers too seldom."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=2000, help="in each cell of the first table")
    parser.add_argument("--few", type=int, default=500, help="in each cell of the other tables")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tables", type=Path, help="write the tables to this file, too")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    cells: list[Cell] = []
    texts = []
    for text in tables(chosen.experiments, chosen.few, chosen.seed, cells):
        print(text, flush=True)
        texts.append(text)
    if chosen.tables is not None:
        chosen.tables.write_text("\n".join(texts), encoding="utf-8")
    worst = counted(PART, "lowest_coverage", min(each.coverage for each in cells), "1", of=chosen.experiments)
    publish([worst], output=chosen.output, targets={worst.name: f"≥ {TARGET:g}"})
    return 0 if worst.value >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
