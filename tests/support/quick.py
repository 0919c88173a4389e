"""How much a simulation does in `make check`, which sets HYPOTHESIS_PROFILE to quick."""

from __future__ import annotations

import os


def fewer_if_quick(number: int) -> int:
    """A fifth of this number in `make check`, as of Hypothesis's examples; otherwise all."""
    return max(number // 5, 1) if os.environ.get("HYPOTHESIS_PROFILE") == "quick" else number
