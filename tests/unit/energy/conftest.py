"""For the tests of energy windows: a meter on a bench."""

from __future__ import annotations

from functools import partial

import pytest

from tests.support.meter_bench import Bench, Make


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a bench: ``make(*sources, **energy settings)``."""
    return partial(Bench, monkeypatch)
