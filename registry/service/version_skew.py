"""Finds machines whose software versions differ from those of most machines. Pure.

Figures from different versions are not comparable, so operators should know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Versions = Mapping[str, str]
"""Versions by name of the software."""


def joined(of_wrappers: list[Versions]) -> dict[str, str]:
    """Return a machine's versions, joined from its wrappers' reports; both if they differ (``0.31.0 and 0.32.0``)."""
    names = sorted({name for versions in of_wrappers for name in versions})
    return {name: " and ".join(sorted({v[name] for v in of_wrappers if name in v})) for name in names}


# D32: versions are reported, and decide nothing
def differing_versions(machines: Mapping[str, Versions]) -> dict[str, list[str]]:
    """Return by machine the software whose version is not the majority's: ``vllm 0.31.0, elsewhere 0.32.0``.

    The majority is more than half of the machines that have the software. If no version has a majority,
    all of these machines differ. Missing software is no difference (e.g. no GPU driver without a GPU).
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
    """Return all versions but this one, most frequent first."""
    return [other for other, _ in sorted(counted.items(), key=lambda each: (-each[1], each[0])) if other != version]
