from __future__ import annotations

import pytest

from deployments.energy import Component, Label, total, worst


def part(joules: float | None, label: Label = Label.MEASURED, **more: object) -> Component:
    return Component("x", "a test", label, joules, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("joules", [0.0, -1.0])
def test_no_bare_zero(joules: float) -> None:
    """A figure of 0 J, or less, can't be made."""
    with pytest.raises(ValueError, match="what is not known is None"):
        part(joules)


def test_label_fits_the_figure() -> None:
    """A figure can't be labelled unavailable, and no figure can't be labelled anything else."""
    with pytest.raises(ValueError, match="can't be labelled unavailable"):
        part(1.0, Label.UNAVAILABLE)
    with pytest.raises(ValueError, match="can't be labelled measured"):
        part(None)


def test_sum_of_nothing() -> None:
    """Without any source the energy is unavailable, and flagged; it is not 0."""
    energy = total([])
    assert (energy.total_j, energy.label, energy.flags) == (None, Label.UNAVAILABLE, ("no_source",))
    assert worst([]) is Label.UNAVAILABLE


def test_sum_of_measured_parts() -> None:
    """Measured parts sum up to a measured total, without a range, with the sum of their resolutions."""
    energy = total([part(3.0, resolution_j=0.1, flags=("b",)), part(4.0, resolution_j=0.2)], ["a"])
    assert (energy.total_j, energy.low_j, energy.high_j, energy.label) == (7.0, None, None, Label.MEASURED)
    assert energy.resolution_j == pytest.approx(0.3)
    assert energy.flags == ("a", "b")
    assert energy.boundary == ("x", "x")


def test_estimate_taints_the_sum() -> None:
    """A modelled part makes the total modelled; its range is that of the part around what was measured."""
    energy = total([part(10.0, resolution_j=1.0), part(4.0, Label.MODELED, low_j=2.0, high_j=9.0)])
    assert (energy.total_j, energy.low_j, energy.high_j, energy.label) == (14.0, 12.0, 19.0, Label.MODELED)
    assert energy.resolution_j is None


def test_hole_in_the_sum() -> None:
    """A sum with an unavailable part is unavailable; the parts can still be seen."""
    energy = total([part(10.0), part(None, Label.UNAVAILABLE, flags=("stale",))])
    assert (energy.total_j, energy.label, energy.flags) == (None, Label.UNAVAILABLE, ("stale",))
    assert [component.joules for component in energy.components] == [10.0, None]
