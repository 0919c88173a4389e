"""How many examples Hypothesis makes. HYPOTHESIS_PROFILE: ``default``, ``ci`` or ``long`` (a hundred times as many)."""

from __future__ import annotations

import os

from hypothesis import settings

EXAMPLES = 100

settings.register_profile("default", max_examples=EXAMPLES, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=EXAMPLES, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=100 * EXAMPLES, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
