"""Ray's metrics of a registry: what docs/reference/metrics.md names is exported under just that name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Registry
from tests.support.listening_ports import listening_ports

pytestmark = pytest.mark.cluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md"
LIMIT_S = 90
"""Ray's agents collect metrics every 10 s, and a window is written down some seconds after the fact."""


def exported(registry: Registry) -> dict[str, set[str]]:
    """The labels of our metrics by name, as a Prometheus server reads them from the head."""
    ports = listening_ports(registry.process_named("ray::DashboardAgent"))
    found: dict[str, set[str]] = {}
    for port in ports:
        with suppress(httpx.TransportError):  # its other ports speak gRPC
            for line in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines():
                if line.startswith("ray_greenprompt"):
                    name, _, labels = line.partition("{")
                    found.setdefault(name, set()).update(re.findall(r'(\w+="[^"]*")', labels))
    return found


def test_metrics_have_the_names_of_the_page(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """After a lease with a prompt, each metric that the page names is there, with its kinds of use."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    url = registry.until(request_id, "deployed")["url"]
    httpx.post(f"{url}/process_prompt", json={"question": "Why?"}, timeout=60).raise_for_status()
    registry.delete(request_id)
    # The local configuration has estimates; measured joules need a counter, and unknown windows a failure.
    named = set(re.findall(r"`(ray_greenprompt_\w+)`", PAGE.read_text()))
    assert len(named) == 4
    wanted = {name for name in named if "measured" not in name and "unknown" not in name}
    deadline_s = time.monotonic() + LIMIT_S
    while not wanted <= (found := exported(registry)).keys() or 'kind="prompt"' not in found[modeled(wanted)]:
        assert time.monotonic() < deadline_s, found
        time.sleep(1)
    kinds = {label for label in found[modeled(wanted)] if label.startswith("kind=")}
    assert kinds <= {f'kind="{kind}"' for kind in ("prompt", "idle", "load", "wake")}


def modeled(names: set[str]) -> str:
    """The one of estimated joules."""
    return next(name for name in names if "modeled" in name)
