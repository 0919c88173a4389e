"""Energy of CPUs and main memory by the kernel's powercap zones (RAPL)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from deployments.energy.counters.base import CounterLost, Source, Unreadable
from deployments.machine.gpus import ReadFailed
from registry.wire.flags import Flag
from registry.wire.labels import Label

PACKAGE_LIMIT_W = 1500.0
"""Power limit assumed for a package that reports none, W. The largest server processors are made for 500 W (AMD EPYC
9005, Intel Xeon 6900P: thermal design power, data sheets), with short peaks of up to twice that."""
DRAM_LIMIT_W = 500.0
"""Power limit assumed for the memory of a package that reports none, W: 24 modules of 20 W."""
UNLIMITED_W = 4095.0
"""A limit of this many watts means no limit: all bits of the register's field are set. Source: Intel SDM 3B, 15.10.3:
15 bits of 1/8 W."""
_LONGEST_WRAP_S = 2.0
"""Longest time between two readings, seconds, for which a fall counts as a wrap; after more it is a gap."""
_WRAP_SLACK_S = 0.25
"""A fall is checked for a wrap as if the reading were this many seconds later than recorded, because a read may be
delayed. The rise itself is checked afterwards with exact times, like every step."""
_MOVES_TO_TELL = 3
_DIE = re.compile(r"(package-\d+)-die-\d+")


class PowercapZone(Source):
    """A package or dram zone of RAPL (Intel, AMD): µJ, wraps at max_energy_range_uj, steps every ~1 ms.

    Source: Linux, Documentation/power/powercap; Intel SDM 3B, 14.10 (counters are updated every ~1 ms).
    """

    method = "powercap"
    label = Label.MEASURED
    max_age_s = 2e-3
    step = 1e-3

    def __init__(self, name: str, zone: Path) -> None:
        """Read the zone's range, counter and limits once. Raises OSError or ValueError if it can't be read."""
        self.name = name
        self.origin = f"powercap energy counter {zone.name} of the whole machine"
        self.default_limit_w = DRAM_LIMIT_W if name.startswith("dram") else PACKAGE_LIMIT_W
        self._zone = zone
        self._path = str(zone / "energy_uj")
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._total_uj = 0
        self._last_s: float | None = None
        self._last_uj = int((zone / "energy_uj").read_text())
        self.limit_w = _zone_limit_w(zone)

    def read_limit(self) -> None:
        """Read the zone's power limits again."""
        told_w = _zone_limit_w(self._zone)
        if told_w is not None:
            self.limit_w = max(told_w, self.limit_w or 0.0)

    def shown_uj(self) -> int:
        """Return the zone's raw counter, µJ, not corrected for wraps.

        Raises:
            ReadFailed: The read failed this time.
        """
        try:
            return _read_int(self._path)
        except (OSError, ValueError) as error:
            raise ReadFailed(str(error)) from error

    def read(self, now_s: float) -> float:
        """Return the joules since the first reading, corrected for wraps.

        Raises:
            ReadFailed: The read failed this time.
            CounterLost: The counter was reset, or it was not read for too long to recognise its wraps.
        """
        now_uj = self.shown_uj()
        last_s, last_uj = self._last_s, self._last_uj
        self._last_s, self._last_uj = now_s, now_uj
        if last_s is None:
            return self._total_uj / 1e6
        most_uj_s = (self.max_rate or 0.0) * 1e6
        if (now_s - last_s) * most_uj_s >= self._range_uj:
            raise CounterLost(Flag.POLL_GAP)  # it may have wrapped more than once
        delta_uj = now_uj - last_uj
        if delta_uj < 0:
            delta_uj += self._range_uj
            if delta_uj > min(self._range_uj / 2, (now_s - last_s + _WRAP_SLACK_S) * most_uj_s):
                raise CounterLost(Flag.COUNTER_RESET)  # backwards, and not by wrapping
            if now_s - last_s > _LONGEST_WRAP_S:
                raise CounterLost(Flag.POLL_GAP)
        self._total_uj += delta_uj
        return self._total_uj / 1e6


class DiePackage(Source):
    """A package with one zone per die: separate counters on Intel, a single one on some AMD processors.

    The readings show which. The first die is read, then the others, then the first die again. This is
    repeated while the counter moves. All dies show a single counter if the values of the others always
    lie between the two readings of the first die. They may also be lower, by at most what a zone can
    count in ``max_age_s``. A single counter is counted once. Reads fail until this is known.

    Source: Linux, drivers/powercap/intel_rapl_common.c names zones by die; AMD's counters are per package.
    """

    method = "powercap"
    label = Label.MEASURED
    max_age_s = PowercapZone.max_age_s
    step = PowercapZone.step

    def __init__(self, name: str, dies: Sequence[PowercapZone]) -> None:
        self.name = name
        self._dies = dies
        self._counted: Sequence[PowercapZone] = ()
        self._shown_uj: int | None = None
        self._moves = 0
        self.origin = f"powercap energy counters of the {len(dies)} dies of {name} of the whole machine"
        self.read_limit()

    def read_limit(self) -> None:
        """Read the power limits of all dies again. The package's is their sum; None if one is unknown."""
        for die in self._dies:
            die.read_limit()
        limits_w = [die.limit_w for die in self._dies]
        known_w = [limit_w for limit_w in limits_w if limit_w is not None]
        self.limit_w = sum(known_w) if len(known_w) == len(limits_w) else None
        self.default_limit_w = PACKAGE_LIMIT_W * len(self._dies)

    def read(self, now_s: float) -> float:
        """Return the joules since the first reading."""
        if not self._counted:
            self._look()
        return sum(die.read(now_s) for die in self._counted)

    def _look(self) -> None:
        first, *others = self._dies
        before_uj = first.shown_uj()
        shown_uj = [die.shown_uj() for die in others]
        after_uj = first.shown_uj()
        oldest_uj = before_uj - self.max_age_s * (first.max_rate or 0.0) * 1e6
        if before_uj <= after_uj and not all(oldest_uj <= uj <= after_uj for uj in shown_uj):
            self._counted = self._dies
            return
        self._moves += self._shown_uj is not None and before_uj != self._shown_uj
        self._shown_uj = before_uj
        if self._moves < _MOVES_TO_TELL:
            raise ReadFailed("not known yet whether its dies show one counter")
        self._counted = [first]
        self.origin = f"{first.origin}, counted once: all {len(self._dies)} dies of {self.name} show the same counter"


def _read_int(path: str) -> int:
    """Return the number in a file. Three times as fast as Path.read_text; called 20 times a second."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def _zone_limit_w(zone: Path) -> float | None:
    """Return the highest of a zone's power limits (long and short term, maximum), W; None if it reports none."""
    limits = []
    for path in (*zone.glob("constraint_*_power_limit_uw"), *zone.glob("constraint_*_max_power_uw")):
        try:
            limits.append(int(path.read_text()) / 1e6)
        except (OSError, ValueError):
            continue  # zones list constraints that they don't support
    return max((limit for limit in limits if 0 < limit < UNLIMITED_W), default=None)


def probe_powercap(root: Path) -> list[Source | Unreadable]:
    """Return all package and memory zones. A kind without zones, or with an unreadable one, gives only `Unreadable`."""
    if not root.is_dir():
        return [Unreadable("powercap", f"{root} does not exist")]
    found: dict[str, list[PowercapZone | Unreadable]] = {"package": [], "dram": []}
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
        whole = [zone for zone in zones if isinstance(zone, PowercapZone)]
        sources.extend(broken or _by_package(whole) or [Unreadable(kind, f"no such zone in {root}")])
    return sources


def _by_package(zones: Sequence[PowercapZone]) -> list[Source]:
    """Return the zones, with the dies of each package joined."""
    dies: dict[str, list[PowercapZone]] = {}
    for zone in zones:
        die = _DIE.fullmatch(zone.name)
        dies.setdefault(die[1] if die else zone.name, []).append(zone)
    return [group[0] if len(group) == 1 else DiePackage(name, group) for name, group in dies.items()]
