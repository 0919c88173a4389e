"""Energy counters for Prometheus, with measured and modelled joules in separate metrics."""

from __future__ import annotations

from ray.util.metrics import Counter

from registry.accounting.totals import SPENT
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow, counter_label_of
from registry.wire.labels import MEASURED

_TAGS = ("machine", "kind")


class EnergyMetrics:
    """Counters since the registry's start, by machine and kind: prompt, idle, load, wake. The kinds can be added up.

    A prompt's share of measured joules counts as measured, because all shares together equal the measured total.
    Unknown energy is counted in windows and adds no joules.
    """

    def __init__(self) -> None:
        self._measured = Counter(
            "greenprompt_energy_measured_joules", "Joules that hardware counters measured", tag_keys=_TAGS
        )
        self._modeled = Counter("greenprompt_energy_modeled_joules", "Joules that are estimated", tag_keys=_TAGS)
        self._unknown = Counter(
            "greenprompt_energy_unknown_windows", "Energy windows whose joules are not known", tag_keys=_TAGS
        )

    def count(self, kept: KeptWindow) -> None:
        """Add a window's joules. A lease window adds nothing, because its energy is in other windows already."""
        window = kept.window
        if window.kind not in SPENT:
            return
        tags = {"machine": kept.machine_id or "unknown", "kind": window.kind.value}
        if window.total_j is None:
            self._unknown.inc(1, tags)
            return
        label = _counter_label(window)
        if label in MEASURED:
            self._measured.inc(window.total_j, tags)
        elif label == "modeled":
            self._modeled.inc(window.total_j, tags)


def _counter_label(window: EnergyWindow) -> str:
    """Return the label of the counters that a window's joules were read from, before any sharing."""
    if window.label in MEASURED:
        return window.label
    return counter_label_of(window) or window.label
