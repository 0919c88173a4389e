"""The energy of CPUs and main memory by the kernel's powercap zones (RAPL)."""

from __future__ import annotations

import os
from pathlib import Path

from deployments.energy import Label
from deployments.source import CounterLost, ReadFailed, Source, Unreadable


class PowercapZone(Source):
    """A package or dram zone of Intel's or AMD's RAPL, µJ, wrapping at max_energy_range_uj; steps every ~1 ms.

    Source: Linux, Documentation/power/powercap; Intel SDM 3B, 14.10 (counters are updated every ~1 ms).
    """

    method = "powercap"
    label = Label.MEASURED
    max_age_s = 2e-3
    step = 1e-3

    def __init__(self, name: str, zone: Path) -> None:
        """Raises OSError or ValueError when the zone can't be read."""
        self.name = name
        self.origin = f"powercap energy counter {zone.name} of the whole machine"
        self._path = str(zone / "energy_uj")
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._total_uj = 0
        self._last_s: float | None = None
        self._last_uj = int((zone / "energy_uj").read_text())
        self.limit_w = _zone_limit_w(zone)

    def read(self, now_s: float) -> float:
        """Joules since the first reading, over all wraps."""
        try:
            now_uj = _read_int(self._path)
        except (OSError, ValueError) as error:
            raise ReadFailed(str(error)) from error
        last_s, last_uj = self._last_s, self._last_uj
        self._last_s, self._last_uj = now_s, now_uj
        if last_s is None:
            return self._total_uj / 1e6
        if self.max_rate is not None and (now_s - last_s) * self.max_rate * 1e6 >= self._range_uj:
            raise CounterLost("poll_gap")  # it may have wrapped more than once
        delta_uj = (now_uj - last_uj) % self._range_uj
        if delta_uj > self._range_uj // 2:
            raise CounterLost("counter_reset")  # backwards, and not by wrapping
        self._total_uj += delta_uj
        return self._total_uj / 1e6


def _read_int(path: str) -> int:
    """A file of one number. A third of what Path.read_text takes, 20 times a second."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def _zone_limit_w(zone: Path) -> float | None:
    """The highest of a zone's power limits (long and short term, and the maximum); None where it tells none."""
    limits = []
    for path in (*zone.glob("constraint_*_power_limit_uw"), *zone.glob("constraint_*_max_power_uw")):
        try:
            limits.append(int(path.read_text()) / 1e6)
        except (OSError, ValueError):
            continue  # zones list constraints that they don't support
    return max((limit for limit in limits if limit > 0), default=None)


def probe_powercap(root: Path) -> list[Source | Unreadable]:
    """All packages and all memory zones, or the reasons. A kind with an unreadable zone is left out altogether."""
    if not root.is_dir():
        return [Unreadable("powercap", f"{root} does not exist")]
    found: dict[str, list[Source | Unreadable]] = {"package": [], "dram": []}
    for zone in sorted(root.glob("intel-rapl:*")):
        name = zone.name
        try:
            name = (zone / "name").read_text().strip()
            kind = name.split("-")[0]
            if kind == "dram":
                name = f"dram-{zone.name.split(':')[1]}"
            if kind in found:
                found[kind].append(PowercapZone(name, zone))
        except (OSError, ValueError) as error:
            found.setdefault(name.split("-")[0], []).append(Unreadable(name, str(error)))
    sources: list[Source | Unreadable] = []
    for kind, zones in found.items():
        broken = [zone for zone in zones if isinstance(zone, Unreadable)]
        sources.extend(broken or zones or [Unreadable(kind, f"no such zone in {root}")])
    return sources
