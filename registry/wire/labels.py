"""Labels of figures: how an energy figure was determined."""

from __future__ import annotations

MEASURED = frozenset({"measured", "measured_sampled"})
"""Labels of figures measured by hardware. All others are shown with a ``~``."""
