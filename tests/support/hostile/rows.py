"""A hostile input, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

JSON = (("Content-Type", "application/json"),)

LEAKS = ("Traceback (most recent", "site-packages", "object at 0x", '.py", line')
"""Texts of an answer that show what runs inside: stack traces, paths of the installation, addresses in memory."""


@dataclass(frozen=True)
class Hostile:
    """A hostile request, and the allowed answers.

    ``source``: the advisory after which it is made, else the sort of attack. ``status``: the allowed statuses.
    ``body``: sent as it is if it is bytes, else as JSON. ``hangs_up``: the client leaves when the first part of the
    answer has come. ``leaves_s``: it leaves after so many seconds, and has the status 0 if there was no answer yet.
    """

    name: str
    path: str
    body: Any
    status: tuple[int, ...]
    source: str
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = JSON
    hangs_up: bool = False
    leaves_s: float | None = None

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        return (
            self.body if isinstance(self.body, bytes) else b"" if self.body is None else json.dumps(self.body).encode()
        )


def ids(rows: Iterable[Hostile]) -> list[str]:
    """The names of rows, as the ids of their tests. Raises AssertionError if two are the same."""
    names = [row.name for row in rows]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return names
