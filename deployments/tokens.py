"""The token counts of a prompt: the engine counts them, the meter divides energy by them."""

from __future__ import annotations

from typing import NamedTuple


class Tokens(NamedTuple):
    """Tokens of a prompt, as vLLM counts them.

    ``cached`` are prompt tokens that were not computed again; None if unknown.
    """

    prompt: int
    cached: int | None
    output: int

    @property
    def computed(self) -> int | None:
        """Prompt tokens that were computed; None if unknown."""
        return None if self.cached is None else self.prompt - self.cached
