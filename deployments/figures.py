"""Answers → figures: mean, spread and confidence interval by LLM. What is not known is counted, never taken for 0."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

from deployments.energy import Label, worst

RESAMPLES = 2000
"""How often the bootstrap draws."""

CONFIDENCE = 0.95

FIGURES: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "gco2eq_per_unit": lambda answer: answer["sci_score"],
    "energy_j": lambda answer: answer["energy"]["total_j"],
    "output_tokens": lambda answer: answer["usage"]["completion_tokens"],
    "duration_s": lambda answer: answer["duration_s"],
}
"""What is summed up of every answer; each is None where it is not known."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the ``n`` answers in which it is known; ``unknown`` are those in which it is not.

    ``low`` and ``high`` are the 95 % confidence interval of the mean: percentiles of a bootstrap that draws prompts,
    with all their repetitions, since answers to the same prompt are no independent ones (of a single prompt, it draws
    answers). None: not known; ``stdev`` and the interval want two values at least.
    """

    n: int
    unknown: int
    mean: float | None
    median: float | None
    stdev: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class LLMFigures:
    """What an experiment found out about one LLM; warm-ups are not in it.

    ``label`` is the worst of its answers' energy, ``known_label`` of those whose energy is known; ``unit`` the
    functional unit, None where it is not always the same.
    ``estimate_low`` and ``estimate_high`` are the means of the scores' own ranges, None where they have none: the
    interval of a modelled figure says how prompts differ, not how good the model is. ``missing`` were never answered.
    """

    llm: str
    label: Label
    known_label: Label
    unit: str | None
    answers: int
    errors: int
    missing: int
    spreads: Mapping[str, Spread]
    estimate_low: float | None
    estimate_high: float | None
    flags: Mapping[str, int]
    machines: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        told = asdict(self)
        return {**told, **told.pop("spreads")}


def llm_figures(llm: str, lines: Sequence[Mapping[str, Any]], *, expected: int, seed: int) -> LLMFigures:
    """Sum up the lines of an LLM, ``expected`` of them when all is done; those of warm-ups are passed over."""
    counted = [line for line in lines if line["llm"] == llm and not line["warmup"]]
    answers = [line for line in counted if line["error"] is None]
    units = {answer["unit"] for answer in answers}
    unit = units.pop() if len(units) == 1 else None
    spreads = {}
    for name, figure in FIGURES.items():
        values = [None if name == "gco2eq_per_unit" and unit is None else figure(answer) for answer in answers]
        spreads[name] = spread([(answer["prompt"], value) for answer, value in zip(answers, values, strict=True)], seed)
    labels = [Label(answer["sci_method"]) for answer in answers]
    return LLMFigures(
        llm=llm,
        label=worst(labels),
        known_label=worst(label for label in labels if label is not Label.UNAVAILABLE),
        unit=unit,
        answers=len(answers),
        errors=len(counted) - len(answers),
        missing=expected - len(counted),
        spreads=spreads,
        estimate_low=_mean_of_all([answer["sci_low"] for answer in answers]),
        estimate_high=_mean_of_all([answer["sci_high"] for answer in answers]),
        flags=dict(sorted(Counter(flag for answer in answers for flag in answer["flags"]).items())),
        machines=tuple(sorted({line["machine"] for line in answers if line["machine"] is not None})),
    )


def spread(values: Sequence[tuple[str, float | None]], seed: int) -> Spread:
    """Sum up values, each with the prompt that it belongs to."""
    known = [(prompt, value) for prompt, value in values if value is not None]
    numbers = [value for _, value in known]
    low, high = _interval(known, seed)
    return Spread(
        n=len(known),
        unknown=len(values) - len(known),
        mean=fmean(numbers) if numbers else None,
        median=median(numbers) if numbers else None,
        stdev=stdev(numbers) if len(numbers) > 1 else None,
        low=low,
        high=high,
    )


def _interval(known: Sequence[tuple[str, float]], seed: int) -> tuple[float | None, float | None]:
    import numpy as np

    by_prompt: dict[str, list[float]] = {}
    for prompt, value in known:
        by_prompt.setdefault(prompt, []).append(value)
    groups = list(by_prompt.values())
    if len(groups) == 1:
        groups = [[value] for value in groups[0]]
    if len(groups) < 2:
        return None, None
    sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    chance = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = chance.integers(len(groups), size=len(groups))
        means[n] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def as_csv(figures: Sequence[LLMFigures]) -> str:
    """A row per LLM; what is not known is empty."""
    text = io.StringIO()
    plain = ("llm", "label", "known_label", "unit", "answers", "errors", "missing", "estimate_low", "estimate_high")
    columns = [f"{name}_{part}" for name in FIGURES for part in Spread.__dataclass_fields__]
    writer = csv.DictWriter(text, [*plain, *columns], lineterminator="\n")
    writer.writeheader()
    for each in figures:
        spreads = {f"{name}_{part}": value for name, s in each.spreads.items() for part, value in asdict(s).items()}
        writer.writerow({name: getattr(each, name) for name in plain} | spreads)
    return text.getvalue()


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
