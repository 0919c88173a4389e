from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product as pairs

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.accounting.estimate import MIN_LEASES, MIN_PROMPTS, Estimate, Sample, estimate, student_975
from tests.bench import coverage
from tests.bench.coverage import Population

LEAST = 0.93 - 3 * math.sqrt(0.93 * 0.07 / 300)
"""0.886: of 300 experiments fewer are covered in 1 of 700 cases if 93 % should be."""


def grid(prompts: int, leases: int, amount: Callable[[int, int], float], **more: float) -> list[Sample]:
    """50 units for each prompt in each lease, and this amount."""
    return [
        Sample(f"l{lease}", f"p{prompt}", amount(prompt, lease), 50, **more)
        for prompt, lease in pairs(range(prompts), range(leases))
    ]


def limits(found: Estimate) -> tuple[float, float]:
    """The statistical interval, which there must be."""
    assert found.statistical_low is not None
    assert found.statistical_high is not None
    return found.statistical_low, found.statistical_high


def test_headline_is_the_ratio_of_the_sums() -> None:
    """100 J for 10 tokens and 20 J for 40 tokens are 120 J / 50 tokens = 2.4 J per token.

    The single ratios are 10 and 0.5: their mean and median are 5.25, their standard deviation is 9.5 / sqrt(2) = 6.718.
    """
    found = estimate([Sample("a", "p", 100, 10), Sample("a", "q", 20, 40)])
    assert (found.n, found.prompts, found.leases) == (2, 2, 1)
    assert (found.value, found.mean_of_ratios, found.median) == (2.4, 5.25, 5.25)
    assert found.stdev == pytest.approx(9.5 / math.sqrt(2))
    assert found.too_few == "too few prompts: 2 (at least 10); too few leases: 1 (at least 2)"
    assert (found.low, found.high, found.statistical_low, found.statistical_high) == (None, None, None, None)


def test_systematic_error_does_not_shrink_with_more_samples() -> None:
    """100 ± 2 J for 50 tokens, 20 times the same: 2 J per token, 1.96 to 2.04; with 200 samples as well.

    Statistically there is no error: all are equal. The systematic one is 20 · 2 J / (20 · 50) = 0.04 J per token.
    """
    for leases in (2, 20):
        found = estimate(grid(10, leases, lambda *_: 100, systematic_low=2, systematic_high=2))
        assert (found.value, found.stdev) == (2, 0)
        assert (found.systematic_low, found.systematic_high) == pytest.approx((0.04, 0.04))
        assert limits(found) == (2, 2)
        assert (found.low, found.high) == pytest.approx((1.96, 2.04))


def test_systematic_error_may_be_larger_on_one_side() -> None:
    """100 J that may be 90 to 180, of 50 tokens: 2 J per token, 1.8 to 3.6."""
    found = estimate(grid(10, 2, lambda *_: 100, systematic_low=10, systematic_high=80))
    assert (found.systematic_low, found.systematic_high) == pytest.approx((0.2, 1.6))
    assert (found.low, found.high) == pytest.approx((1.8, 3.6))


def test_systematic_error_leads_to_no_negative_amount() -> None:
    """1 ± 3 J for 50 tokens are 0.02 J per token, 0 to 0.08: energy is not negative."""
    found = estimate(grid(10, 2, lambda *_: 1, systematic_low=3, systematic_high=3))
    assert (found.low, found.high) == pytest.approx((0, 0.08))


def test_interval_with_systematic_errors_by_hand() -> None:
    """Five prompts cost 90 J and five 110 J for 50 tokens, in both leases; each may be 80 J less, or 80 J more.

    At least 10 and 30 J: 0.4 J per token. Each prompt adds ±20 / 400 = ±0.05 of it: variance 10/9 · 10 · 0.05² =
    0.02778, standard error 0.16667. The effective number of prompts is 400² / (5 · 20² + 5 · 60²) = 8; t for 7 degrees
    of freedom is 2.3646. So it begins at 0.4 · e^-0.3941 = 0.2697, and not at 0: 1.8545 - 1.6 J had left 0.2545.
    At most 170 and 190 J: 3.6 J per token, ±20 / 3600 each: standard error 0.01852, effectively 9.969 prompts, t for
    8.969 is 2.2634. It ends at 3.6 · e^0.04192 = 3.7541.
    """
    found = estimate(
        grid(10, 2, lambda prompt, _: (90, 110)[prompt % 2], systematic_low=80, systematic_high=80),
    )
    assert (found.low, found.high) == pytest.approx((0.2697, 3.7541), abs=1e-4)
    assert limits(found) == pytest.approx((1.8545, 2.1569), abs=1e-4)


@given(st.integers(0, 2**32))
def test_without_systematic_errors_the_interval_is_the_statistical_one(seed: int) -> None:
    """What the tables of coverage are made of: samples without systematic errors have one interval, to the digit."""
    chance = random.Random(seed)
    found = estimate(grid(12, 3, lambda *_: chance.lognormvariate(3, 1)))
    assert (found.low, found.high) == limits(found)
    assert (found.systematic_low, found.systematic_high) == (0, 0)


@pytest.mark.parametrize("part", [-1.0, 1.0])
@pytest.mark.parametrize("of_amount", [True, False], ids=["in proportion", "the same for all"])
def test_interval_contains_the_truth_whatever_the_systematic_error_is(part: float, *, of_amount: bool) -> None:
    """What is published is wrong by up to all of its systematic term, 40 % of it or 20 J: 93 % contain the truth."""
    joules, units = Population("token", 0.5, "random").draw(np.random.default_rng(7), 300, 20, 3)
    truth, covered = Population("token", 0.5, "random").truth, 0
    for amounts, tokens in zip(joules, units, strict=True):
        samples = []
        for (prompt, lease), true in np.ndenumerate(amounts):
            term = 0.4 * true if of_amount else 20.0
            told = max(true + part * term, 0.0)
            samples.append(Sample(f"l{lease}", f"p{prompt}", told, float(tokens[prompt, lease]), term, term))
        found = estimate(samples)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert covered / 300 >= LEAST


def test_interval_of_two_leases_that_differ() -> None:
    """Ten equal prompts cost 90 J in one lease and 110 J in the other, for 50 tokens: 2 J per token.

    The two leases add -0.05 and 0.05 of the value. Their variance is 2/1 · (0.05² + 0.05²) = 0.01, the standard error
    0.1; t for 1 degree of freedom is 12.706. So 2 · e^-1.2706 = 0.561 to 2 · e^1.2706 = 7.126.
    """
    found = estimate(grid(10, 2, lambda _, lease: (90, 110)[lease]))
    assert limits(found) == pytest.approx((0.561, 7.126), abs=1e-3)


def test_interval_of_prompts_that_differ() -> None:
    """Five prompts cost 90 J and five 110 J, the same in both leases, for 50 tokens: 2 J per token.

    Each prompt adds ±20 / 2000 = ±0.01 of the value: variance 10/9 · 10 · 0.01² = 0.001111, standard error 0.03333. The
    effective number of prompts is 2000² / (5 · 180² + 5 · 220²) = 9.90; t for 8.90 degrees of freedom is 2.266. Skewed
    they are not. So 2 · e^-0.07553 = 1.8545 to 2 · e^0.07553 = 2.1569.
    """
    found = estimate(grid(10, 2, lambda prompt, _: (90, 110)[prompt % 2]))
    assert limits(found) == pytest.approx((1.8545, 2.1569), abs=1e-4)


@pytest.mark.parametrize(("rare", "longer"), [(200, "high"), (10, "low")])
def test_interval_is_longer_on_the_side_of_the_rare_prompts(rare: float, longer: str) -> None:
    """One prompt in ten that costs much more (or less) than others makes it likely that there are more of them."""
    found = estimate(grid(10, 3, lambda prompt, _: 100 if prompt else rare))
    assert found.value is not None
    low, high = limits(found)
    assert (math.log(high / found.value) > math.log(found.value / low)) == (longer == "high")


def test_prompt_without_units_adds_its_amount() -> None:
    """A refused prompt has cost 5 J: 19 · 100 J + 5 J for 19 · 50 tokens. It has no ratio of its own."""
    refused = [Sample("l1", "p9", 5, 0), *grid(10, 2, lambda *_: 100)[:-1]]
    found = estimate(refused)
    assert (found.n, found.mean_of_ratios) == (20, 2)
    assert found.value == pytest.approx(1905 / 950)
    assert found.low is not None


def test_nothing_known_is_none() -> None:
    """Without samples, or without any units, nothing is known, and it is said why."""
    for samples in ([], grid(0, 0, lambda *_: 1), [Sample("a", "p", 7, 0)]):
        found = estimate(samples)
        assert found.n == len(samples)
        unknown = (found.value, found.mean_of_ratios, found.median, found.stdev, found.low, found.high)
        assert {*unknown, found.systematic_low, found.systematic_high} == {None}
        assert found.too_few == "too few prompts: 0 (at least 10); too few leases: 0 (at least 2)"


def test_all_amounts_zero_are_known() -> None:
    """0 J is a value, not an unknown one."""
    found = estimate(grid(10, 2, lambda *_: 0))
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("prompts", "leases", "why"),
    [
        (MIN_PROMPTS, MIN_LEASES, None),
        (MIN_PROMPTS - 1, MIN_LEASES, "too few prompts: 9 (at least 10)"),
        (50, 1, "too few leases: 1 (at least 2)"),
    ],
)
def test_too_few_prompts_or_leases_have_no_interval(prompts: int, leases: int, why: str | None) -> None:
    """At the least numbers there is an interval; below, its place is taken by the reason."""
    found = estimate(grid(prompts, leases, lambda prompt, lease: 100 + prompt + lease, systematic_low=1))
    assert found.too_few == why
    assert (found.low is None) == (found.high is None) == (found.statistical_low is None) == (why is not None)
    assert found.value is not None
    assert found.systematic_low == pytest.approx(0.02)
    assert found.systematic_high == 0


def test_prompts_and_leases_without_units_are_not_counted() -> None:
    """Ten prompts of which one was refused everywhere are nine; a lease that answered nothing is none."""
    refused = [Sample("l0", "q", 5, 0), Sample("l9", "p0", 5, 0)]
    found = estimate([*grid(9, 1, lambda *_: 100), *refused])
    assert (found.prompts, found.leases) == (10, 2)
    assert found.too_few == "too few prompts: 9 (at least 10); too few leases: 1 (at least 2)"


def test_aborted_lease_weighs_little() -> None:
    """One answer of a third lease, 1 % of the tokens, hardly changes the value, and is no third of the evidence.

    With t for the effective number of leases (2.04 of them) the interval stays as wide as that of two.
    """

    def amount(prompt: int, lease: int) -> float:
        return 100 + prompt % 3 + 4 * lease

    two, three = grid(50, 2, amount), grid(50, 3, amount)
    started = [*two, Sample("l2", "p0", 104, 50)]
    width = [math.log(high / low) for low, high in (limits(estimate(s)) for s in (two, started, three))]
    assert width[1] == pytest.approx(width[0], rel=0.2)
    assert width[2] < width[0] / 2


@pytest.mark.parametrize(
    "bad",
    [
        (-1, 1, 0, 0),
        (1, -1, 0, 0),
        (1, 1, -1, 0),
        (1, 1, 0, -1),
        (math.nan, 1, 0, 0),
        (1, math.nan, 0, 0),
        (math.inf, 1),
    ],
)
def test_impossible_samples_are_refused(bad: tuple[float, ...]) -> None:
    """Negative amounts, units and errors, and what is not finite, are a mistake of the caller."""
    with pytest.raises(ValueError, match="0 or more"):
        estimate([Sample("a", "p", *bad)])


@given(
    st.lists(
        st.builds(
            Sample,
            lease=st.sampled_from("abcd"),
            prompt=st.sampled_from("0123456789ABCDEF"),
            amount=st.floats(0, 1e9),
            units=st.integers(0, 100_000),
            systematic_low=st.floats(0, 10),
            systematic_high=st.floats(0, 10),
        ),
        max_size=80,
    ),
    st.randoms(use_true_random=False),
)
def test_order_and_odd_values_do_no_harm(samples: list[Sample], chance: random.Random) -> None:
    """Samples in another order give the same digits; limits are finite, not negative, and around the value."""
    found = estimate(samples)
    chance.shuffle(samples)
    assert estimate(samples) == found
    if found.value is not None and found.low is not None and found.high is not None:
        low, high = limits(found)
        assert 0 <= found.low <= low <= found.value <= high <= found.high < math.inf


@pytest.mark.parametrize(
    ("degrees", "t"),
    [
        (1, math.tan(0.475 * math.pi)),
        (2, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
        (5, 2.570582),
        (9, 2.262157),
        (30, 2.042272),
        (1000, 1.962339),
        (1e6, 1.959966),
    ],
)
def test_students_t(degrees: float, t: float) -> None:
    """The 97.5 % points are those of the tables; for 1 and 2 degrees of freedom there is a formula."""
    assert student_975(degrees) == pytest.approx(t, abs=1e-6)


def test_students_t_between_whole_numbers() -> None:
    """For 1.5 degrees of freedom it is 6.0167: 2.5 % of t's density, integrated numerically, lie beyond."""
    x = np.tan(np.linspace(math.atan(student_975(1.5)), math.pi / 2, 2_000_001)[:-1])
    density = math.gamma(1.25) / math.sqrt(1.5 * math.pi) / math.gamma(0.75) * (1 + x**2 / 1.5) ** -1.25
    assert np.sum(density * (1 + x**2)) * (math.pi / 2 - math.atan(x[0])) / 2_000_000 == pytest.approx(0.025, abs=1e-4)


@pytest.mark.parametrize(
    ("world", "prompts", "leases"),
    [
        (Population("token", 0.5, "random"), 50, 2),
        (Population("token", 1.0, "none"), 10, 10),
        (Population("answer", 0.5, "linear"), 20, 3),
        (Population("answer", 1.0, "random"), 10, 5),
    ],
    ids=str,
)
def test_interval_contains_the_truth(world: Population, prompts: int, leases: int) -> None:
    """In simulated experiments 93 % of the intervals or more contain the true value. Student's t over answers fails."""
    chance = np.random.default_rng(15)
    joules, units = world.draw(chance, 300, prompts, leases)
    error = coverage.standard_error(joules, units)
    assert coverage.cell(coverage.printed(joules, units), world.truth, error).coverage >= LEAST
    assert coverage.cell(coverage.students_t(joules, units, chance), world.truth_of_ratios, error).coverage < LEAST


def test_interval_contains_the_truth_if_answers_are_missing() -> None:
    """The same with a tenth of the answers missing and a lease that was aborted after a third of them."""
    world = Population("token", 0.5, "random")
    joules, units = coverage.with_gaps(np.random.default_rng(3), *world.draw(np.random.default_rng(2), 300, 20, 3))
    error = coverage.standard_error(joules, units)
    assert coverage.cell(coverage.printed(joules, units), world.truth, error).coverage >= LEAST


def test_intervals_of_equal_llms_overlap() -> None:
    """Two equal LLMs, 50 prompts in 3 leases each that drift by 5 %: the intervals overlap in 97 % of cases or more.

    Those of Student's t over answers, as they were, are apart in more than 5 %.
    """
    chance = np.random.default_rng(4)
    joules, units = Population("token", 0.5, "random").draw(chance, 300, 50, 6)
    assert coverage.overlap(coverage.printed, joules, units, chance) >= 0.97
    assert coverage.overlap(coverage.students_t, joules, units, chance) < 0.95
