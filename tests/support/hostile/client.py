"""Sends hostile inputs over HTTP, and measures the CPU time of the processes that get them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import httpx

from tests.support.hostile.rows import Hostile

ANSWER_S = 60.0
"""Longest time of an answer, seconds."""


async def send(
    url: str, row: Hostile, path: str, content: bytes, headers: Iterable[tuple[str, str]]
) -> tuple[int, str]:
    """Send a row; return the status, and the answer as far as the client has stayed.

    The status is 0 if the client left before an answer, or the server closed the connection while it was sending.
    """
    # The path is sent as it is: httpx must not normalize it.
    target: dict[str, Any] = {"target": path.encode()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    async with httpx.AsyncClient(timeout=row.leaves_s or ANSWER_S, trust_env=False, verify=False) as http:
        try:
            async with http.stream(row.method, url, content=content, headers=raw, extensions=target) as answer:
                text = ""
                async for part in answer.aiter_text():
                    text += part
                    if row.hangs_up:
                        break
                return answer.status_code, text
        except httpx.ReadTimeout:
            if row.leaves_s is None:
                raise
            return 0, ""
        except (httpx.ReadError, httpx.WriteError):  # closed with a part of the body unread, so the answer is lost
            return 0, ""


def cpu_s(pid: int) -> float:
    """CPU time of a process, seconds, to the nanosecond: clock_getcpuclockid(3) makes the id of its clock."""
    return time.clock_gettime((~pid << 3) | 2)
