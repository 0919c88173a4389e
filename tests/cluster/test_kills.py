"""The storm of ``make bench PART=kills``, a small one: the registry dies again and again while leases come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.bench.kills import storm
from tests.cluster.conftest import Registry

pytestmark = [pytest.mark.cluster, pytest.mark.fault]


async def test_nothing_is_lost_or_granted_twice_while_the_registry_is_killed(
    registry: Registry, llm: Callable[..., dict[str, Any]]
) -> None:
    """Five kills at random moments: every request is served once and released, and the wrapper is free at the end."""
    seen = await storm(registry, [llm("a"), llm("b")], kills=5, cycles=40, clients=4, seed=20, limit_s=120)
    assert seen.faults == []
    assert len(seen.kills_s) == 5
    assert len(seen.leases) == len(seen.accepted) == 40
