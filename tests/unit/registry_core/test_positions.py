"""Places in the queue by themselves; tests/property/test_positions.py compares them with an oracle."""

from __future__ import annotations

from registry.core.policy import Turns
from registry.core.positions import Positions


def test_one_of_two_equal_tenants_leaves() -> None:
    """Those who wait like it keep their places, each a place further in front; the last one leaves nothing behind."""
    turns = Turns([])
    positions = Positions(turns)
    for tenant in ("a", "b", "c"):
        turns.begin(tenant)
        positions.put(tenant, 1)
    assert [positions.before(tenant, 0) for tenant in ("a", "b", "c")] == [0, 1, 2]
    turns.end("b")
    positions.put("b", 0)
    assert [positions.before(tenant, 0) for tenant in ("a", "c")] == [0, 1]
    for tenant in ("a", "c"):
        turns.end(tenant)
        positions.put(tenant, 0)
    assert not positions._waiting


def test_one_of_two_tenants_without_a_turn_leaves() -> None:
    """Tenants whose requests all wait for earlier ones of their measurements come after those with a turn."""
    turns = Turns([])
    positions = Positions(turns)
    turns.begin("a")
    for tenant in ("a", "blocked", "also"):
        positions.put(tenant, 1)
    assert positions.before("a", 0) == 0
    positions.put("also", 0)
    assert positions.before("blocked", 0) >= 1
    positions.put("blocked", 0)
    assert not positions._blocked
