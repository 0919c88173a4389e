from __future__ import annotations

import random

import pytest

from deployments.energy.figures import Component, Energy, total
from deployments.energy.token_weights import FEWEST_PROMPTS, UNKNOWN, TokenWeight
from registry.wire.labels import Label


def cost(joules: float, *flags: str) -> Energy:
    part = Component(
        "gpu:x", "a test", Label.MEASURED, joules=joules, low_j=joules, high_j=joules, systematic_j=0.0,
        counter_label=Label.MEASURED, flags=flags,
    )  # fmt: skip
    return total([part])


def learned(*prompts: tuple[int, int, float], flags: tuple[str, ...] = ()) -> TokenWeight:
    """What is learned from prompts: their computed tokens, output tokens and joules."""
    weight = TokenWeight()
    for computed, output, joules in prompts:
        weight.learn(computed, output, cost(joules, *flags))
    return weight


def exact(prompts: int, weight: float = 0.05) -> list[tuple[int, int, float]]:
    """Prompts of different mixtures, of 20 mJ an output token."""
    return [(100 * (index % 5), 50 + 10 * (index % 3), 0.02 * (weight * 100 * (index % 5) + 50 + 10 * (index % 3)))
            for index in range(prompts)]  # fmt: skip


def test_prompts_that_fit_exactly() -> None:
    """Where a prompt token costs 1 mJ and an output token 20 mJ, the weight is 0.05 without any range."""
    weight = learned(*exact(FEWEST_PROMPTS)).weight
    assert weight.mid == pytest.approx(0.05)
    assert (weight.low, weight.high) == pytest.approx((0.05, 0.05), abs=1e-6)


def test_too_few_prompts() -> None:
    """With fewer than ten prompts the weight is from 0 to 1: by output tokens only, or all tokens alike."""
    assert learned(*exact(FEWEST_PROMPTS - 1)).weight == UNKNOWN == (0.0, 0.5, 1.0)


def test_prompts_that_are_all_alike() -> None:
    """Where prompt and output tokens rise together, or one of them never changes, nothing tells them apart."""
    assert learned(*[(10 * size, size, 0.03 * size) for size in range(1, 50)]).weight == UNKNOWN
    assert learned(*[(10 * size + 7, size, 0.03 * size + 1) for size in range(1, 50)]).weight == UNKNOWN
    assert learned(*[(size, 150, 0.01 * size + 3) for size in range(1, 50)]).weight == UNKNOWN
    assert learned(*[(0, 50, 1.0)] * 50).weight == UNKNOWN
    assert learned(*[(50, 0, 1.0)] * 50).weight == UNKNOWN


def test_costs_are_not_negative() -> None:
    """810 + 150 tokens cost 2.2 J, 3 + 150 tokens 3.1 J, 3 + 300 tokens 6 J: a prompt token costs nothing, not less."""
    weight = learned(*[(810, 150, 2.2), (3, 150, 3.1), (3, 300, 6.0)] * 5).weight
    assert (weight.low, weight.mid) == (0.0, 0.0)
    assert weight.high == pytest.approx(0.0, abs=1e-6)


def test_what_every_prompt_costs_is_no_cost_of_its_tokens() -> None:
    """With 1 mJ a prompt token, 20 mJ an output token, and 1.5 J for each prompt besides, the weight is still 0.05.

    With 2 % of noise the range contains it in 90 of 100 experiments and more, whatever that fixed cost is.
    """
    weight = learned(*[(computed, output, joules + 1.5) for computed, output, joules in exact(15)]).weight
    assert weight == pytest.approx((0.05, 0.05, 0.05), abs=1e-6)
    for fixed in (0.0, 1.5):
        within = 0
        for seed in range(100):
            chance = random.Random(seed)
            prompts = [(chance.randint(20, 1500), chance.randint(20, 300)) for _ in range(40)]
            weight = learned(
                *[(p, o, (0.002 * p + 0.02 * o + fixed) * chance.gauss(1, 0.02)) for p, o in prompts]
            ).weight
            within += weight.low <= 0.1 <= weight.high
        assert within >= 90


def test_prompts_that_tell_nothing() -> None:
    """Joules that have nothing to do with the tokens leave the weight as unknown as before."""
    chance = random.Random(1)
    noise = [(chance.randrange(100), chance.randrange(1, 100), chance.uniform(0.1, 9.0)) for _ in range(12)]
    assert learned(*noise).weight == UNKNOWN


@pytest.mark.parametrize("flag", ["shared", "too_short", "provisional", "contended"])
def test_prompts_that_were_not_alone(flag: str) -> None:
    """A share, an estimate, a figure of the moment, and one with others at work on the machine teach nothing."""
    assert learned(*exact(50), flags=(flag,)).weight == UNKNOWN


def test_unknown_energy() -> None:
    """A prompt whose energy is not known teaches nothing."""
    weight = TokenWeight()
    for _ in range(50):
        weight.learn(10, 10, total([]))
    assert weight.weight == UNKNOWN


def test_range_contains_the_weight() -> None:
    """With 5 % of noise on every prompt, the range contains the true weight in 90 of 100 experiments and more."""
    within = 0
    for seed in range(200):
        chance = random.Random(seed)
        prompts = [(chance.randrange(1, 2000), chance.randrange(20, 300)) for _ in range(30)]
        weight = learned(*[(p, o, 0.02 * (0.03 * p + o) * chance.gauss(1, 0.05)) for p, o in prompts]).weight
        within += weight.low <= 0.03 <= weight.high
        assert weight.high - weight.low < 0.1
    assert within >= 180
