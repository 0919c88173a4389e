"""What Prometheus is told of energy."""

from __future__ import annotations

from collections import Counter

import pytest
from ray.util.metrics import Counter as RayCounter

from deployments.serve import energy_metrics
from deployments.serve.energy_metrics import EnergyMetrics
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind
from tests.support.energy_windows import record, window

COUNTED: Counter[tuple[str, str, str]] = Counter()


class Counted(RayCounter):
    """Ray's own counter, whose sums can be read."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert tags is not None
        super().inc(value, tags)
        COUNTED[self.info["name"], tags["machine"], tags["kind"]] += value  # type: ignore[assignment] # not whole


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> EnergyMetrics:
    monkeypatch.setattr(energy_metrics, "Counter", Counted)
    COUNTED.clear()
    return EnergyMetrics()


def count(
    metrics: EnergyMetrics, *windows: EnergyWindow, machine: str | None = "gpu-1"
) -> dict[tuple[str, str, str], float]:
    for each in windows:
        metrics.count(KeptWindow(each, machine, None))
    return dict(COUNTED)


def test_measured_and_modelled_joules_have_names_of_their_own(metrics: EnergyMetrics) -> None:
    """No sum mixes measurements with estimates, and a test double's figures are in neither."""
    labels = ("measured", "measured_sampled", "modeled", "simulated")
    windows = (window(n, joules=10.0**n, label=label) for n, label in enumerate(labels))
    assert count(metrics, *windows) == {
        ("greenprompt_energy_measured_joules", "gpu-1", "prompt"): 11.0,
        ("greenprompt_energy_modeled_joules", "gpu-1", "prompt"): 100.0,
    }


def test_shares_of_measured_joules_are_measured(metrics: EnergyMetrics) -> None:
    """Two prompts share 100 J that a counter has measured: each share is an estimate, their sum is not."""
    shares = [record(n, joules=50.0, label="modeled", counter_label="measured") for n in (1, 2)]
    assert count(metrics, *shares) == {("greenprompt_energy_measured_joules", "gpu-1", "prompt"): 100.0}


def test_nothing_counts_twice(metrics: EnergyMetrics) -> None:
    """A lease window holds its prompts and its idle time once more: it adds nothing."""
    idle = window(3, WindowKind.IDLE, request_id=None, joules=5.0)
    lease = window(5, WindowKind.LEASE, joules=200.0)
    windows = window(1), window(2, WindowKind.IDLE), idle, window(4, WindowKind.WAKE, joules=7.0), lease
    assert count(metrics, *windows) == {
        ("greenprompt_energy_measured_joules", "gpu-1", "prompt"): 100.0,
        ("greenprompt_energy_measured_joules", "gpu-1", "idle"): 105.0,
        ("greenprompt_energy_measured_joules", "gpu-1", "wake"): 7.0,
    }


def test_unknown_is_counted_and_not_zero(metrics: EnergyMetrics) -> None:
    """A window without a figure adds to no joules; that there was one is told."""
    windows = [window(n, WindowKind.LOAD, joules=None) for n in (1, 2)]
    assert count(metrics, *windows, machine=None) == {("greenprompt_energy_unknown_windows", "unknown", "load"): 2}
