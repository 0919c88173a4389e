from __future__ import annotations

import pytest

from deployments.energy.figures import Component, total
from registry.wire.labels import Label, worst


def part(joules: float | None, label: Label = Label.MEASURED, **more: object) -> Component:
    """A component whose bounds are those given, else exact."""
    if joules is None:
        return Component("x", "a test", label, **more)  # type: ignore[arg-type]
    known: dict[str, object] = {"low_j": joules, "high_j": joules, "systematic_j": 0.0, "counter_label": label}
    return Component("x", "a test", label, joules=joules, **known | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("joules", [0.0, -1.0])
def test_no_bare_zero(joules: float) -> None:
    """A figure of 0 J, or less, can't be made."""
    with pytest.raises(ValueError, match="an unknown figure must be None"):
        part(joules)


def test_label_fits_the_figure() -> None:
    """A figure can't be labelled unavailable, and no figure can't be labelled anything else."""
    with pytest.raises(ValueError, match="can't be labelled unavailable"):
        part(1.0, Label.UNAVAILABLE)
    with pytest.raises(ValueError, match="can't be labelled measured"):
        part(None, Label.MEASURED)


def test_sum_of_nothing() -> None:
    """Without any source the energy is unavailable, and flagged; it is not 0."""
    energy = total([])
    assert (energy.total_j, energy.label, energy.flags) == (None, Label.UNAVAILABLE, ("no_source",))
    assert worst([]) is Label.UNAVAILABLE


@pytest.mark.parametrize("missing", ["low_j", "high_j", "systematic_j"])
def test_no_figure_without_bounds(missing: str) -> None:
    """A figure without bounds, or without its systematic error, can't be made: nothing passes for exact."""
    with pytest.raises(ValueError, match="need low_j, high_j and systematic_j"):
        part(3.0, Label.MEASURED, **{missing: None})


@pytest.mark.parametrize(("low_j", "high_j"), [(3.1, 4.0), (2.0, 2.9), (-0.1, 4.0)])
def test_figure_is_within_its_bounds(low_j: float, high_j: float) -> None:
    """3 J can't be between 3.1 and 4 J, nor between 2 and 2.9 J, and no bound is below 0."""
    with pytest.raises(ValueError, match="are not within"):
        part(3.0, low_j=low_j, high_j=high_j)


def test_energy_is_never_sourced() -> None:
    """A published factor makes grams, not joules: no energy is labelled sourced."""
    with pytest.raises(ValueError, match="can't be labelled sourced"):
        part(3.0, Label.SOURCED)


def test_the_counter_has_a_label() -> None:
    """A known figure names the label of the counter it was read from; an unknown one has none."""
    with pytest.raises(ValueError, match="can't come from a counter labelled unavailable"):
        part(3.0, counter_label=Label.UNAVAILABLE)
    with pytest.raises(ValueError, match="can't come from a counter labelled measured"):
        part(None, Label.UNAVAILABLE, counter_label=Label.MEASURED)


def test_order_of_labels() -> None:
    """A published factor is worse than a sample of the hardware and better than a model."""
    assert worst([Label.MEASURED_SAMPLED, Label.SOURCED]) is Label.SOURCED
    assert worst([Label.SOURCED, Label.MODELED]) is Label.MODELED


def test_sum_of_measured_parts() -> None:
    """3 J (2.8 to 3.1) and 4 J (3.9 to 4.5), all measured, are 7 J (6.7 to 7.6), measured; errors add up, too."""
    one = part(3.0, low_j=2.8, high_j=3.1, resolution_j=0.2, systematic_j=0.05, flags=("b",))
    energy = total([one, part(4.0, low_j=3.9, high_j=4.5, resolution_j=0.5, systematic_j=0.1)], ["a"])
    assert (energy.total_j, energy.label, energy.counter_label) == (7.0, Label.MEASURED, Label.MEASURED)
    assert (energy.low_j, energy.high_j) == pytest.approx((6.7, 7.6))
    assert (energy.resolution_j, energy.systematic_j) == pytest.approx((0.7, 0.15))
    assert energy.flags == ("a", "b")
    assert energy.boundary == ("x", "x")


def test_estimate_taints_the_sum() -> None:
    """10 J measured (9 to 11) and 4 J modelled (2 to 9) are 14 J modelled, 11 to 20: both ranges count."""
    measured = part(10.0, low_j=9.0, high_j=11.0, resolution_j=1.0)
    modelled = part(4.0, Label.MODELED, low_j=2.0, high_j=9.0)
    energy = total([measured, modelled])
    assert (energy.total_j, energy.low_j, energy.high_j, energy.label) == (14.0, 11.0, 20.0, Label.MODELED)
    assert energy.resolution_j is None


def test_share_of_a_measured_total() -> None:
    """A modelled share of what a counter measured is modelled, and still says that the counter was measured."""
    energy = total([part(10.0, Label.MODELED, counter_label=Label.MEASURED)])
    assert (energy.label, energy.counter_label) == (Label.MODELED, Label.MEASURED)


def test_hole_in_the_sum() -> None:
    """A sum with an unavailable part is unavailable; the parts can still be seen."""
    energy = total([part(10.0), part(None, Label.UNAVAILABLE, flags=("stale",))])
    assert (energy.total_j, energy.label, energy.flags) == (None, Label.UNAVAILABLE, ("stale",))
    assert [component.joules for component in energy.components] == [10.0, None]
