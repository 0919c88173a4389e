"""For the tests of the ingress and of the wrappers' replicas."""

from __future__ import annotations

import pytest

from deployments.serve import issuer_keys
from tests.support.fake_counters import ManualClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock by which the keys of an issuer get old."""
    clock = ManualClock()
    monkeypatch.setattr(issuer_keys, "monotonic", clock)
    return clock
