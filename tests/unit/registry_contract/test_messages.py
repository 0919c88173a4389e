"""What wrappers report, where it computes something."""

from __future__ import annotations

import pytest

from registry.contract.messages import Download


@pytest.mark.parametrize(("done", "total", "share"), [(0, 0, 1.0), (0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0)])
def test_the_share_of_a_download(done: int, total: int, share: float) -> None:
    """Nothing to download counts as downloaded."""
    assert Download(done, total).share == share
