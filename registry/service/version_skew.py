"""Which machines run other versions of the software than the others do. Pure.

Figures of different versions don't compare, so an operator should know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Versions = Mapping[str, str]
"""Version by name of the software."""


def joined(reports: list[Versions]) -> dict[str, str]:
    """The versions of a machine, as its wrappers tell: where those differ (``0.31.0 and 0.32.0``), both."""
    names = sorted({name for versions in reports for name in versions})
    return {name: " and ".join(sorted({v[name] for v in reports if name in v})) for name in names}


def differences(machines: Mapping[str, Versions]) -> dict[str, list[str]]:
    """For each machine, what it has in another version than most machines: ``vllm 0.31.0, elsewhere 0.32.0``.

    Most are more than half of those that have it at all: what a machine lacks is no difference (a driver, where there
    is no GPU), and where no version has such a majority all of them differ.
    """
    counts: dict[str, Counter[str]] = {}
    for versions in machines.values():
        for name, version in versions.items():
            counts.setdefault(name, Counter())[version] += 1
    return {
        machine_id: [
            f"{name} {version}, elsewhere {', '.join(_others(counts[name], version))}"
            for name, version in sorted(versions.items())
            if 2 * counts[name][version] <= counts[name].total() and len(counts[name]) > 1
        ]
        for machine_id, versions in machines.items()
    }


def _others(counted: Counter[str], version: str) -> list[str]:
    """All versions but this one, the most frequent first."""
    return [other for other, _ in sorted(counted.items(), key=lambda each: (-each[1], each[0])) if other != version]
