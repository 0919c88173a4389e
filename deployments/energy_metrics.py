"""What was used, for Prometheus: measured and modelled joules under names of their own."""

from __future__ import annotations

from ray.util.metrics import Counter

from deployments.notation import MEASURED
from registry.state import KeptWindow, WindowKind

_TAGS = ("machine", "kind")


class EnergyMetrics:
    """Counters since the registry was started, by machine and by kind: lease, load, wake, or idle (held by nobody).

    Prompts and the idle time of a lease are inside its lease, so the kinds add up. What is not known is counted in
    windows, and adds no joules.
    """

    def __init__(self) -> None:
        self._measured = Counter("greenprompt_energy_measured_joules", "Joules from hardware counters", tag_keys=_TAGS)
        self._modeled = Counter("greenprompt_energy_modeled_joules", "Joules that are an estimate", tag_keys=_TAGS)
        self._unknown = Counter("greenprompt_energy_unknown_windows", "Windows without a figure", tag_keys=_TAGS)

    def count(self, kept: KeptWindow) -> None:
        """Add a window; one that is inside another adds nothing."""
        window = kept.window
        inside = window.kind is WindowKind.PROMPT or (window.kind is WindowKind.IDLE and window.request_id is not None)
        if inside:
            return
        tags = {"machine": kept.machine_id or "unknown", "kind": window.kind.value}
        if window.total_j is None:
            self._unknown.inc(1, tags)
        elif window.label in MEASURED:
            self._measured.inc(window.total_j, tags)
        elif window.label == "modeled":
            self._modeled.inc(window.total_j, tags)
