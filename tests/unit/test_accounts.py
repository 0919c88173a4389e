"""What the registry remembers of the costs of requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from registry import accounts
from registry.accounts import Accounts
from registry.allocator import Allocator
from registry.state import WindowKind
from registry.store import Store
from registry.totals import Total


class CountingStore:
    """Tells how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def costs_of_request(self, request_id: str) -> Mapping[WindowKind, Total]:
        self.asked.append(request_id)
        return {}


def test_costs_are_remembered_of_so_many_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three requests two are remembered: those that were asked for last. The third one is read anew."""
    monkeypatch.setattr(accounts, "COSTS_REMEMBERED", 2)
    store = CountingStore()
    kept = Accounts(
        cast("Store", store), cast("Allocator", None), budgets={}, now_s=lambda: 0.0, on_kept=lambda _: None
    )
    for request_id in ("a", "b", "a", "c", "a", "b"):
        assert kept.costs(request_id) == {}
    assert store.asked == ["a", "b", "c", "b"]
