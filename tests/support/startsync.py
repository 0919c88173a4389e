"""The program in docs/upstream/ray-startsync.md, which ends a GCS or a raylet that does not use TLS."""

from __future__ import annotations

import re
from pathlib import Path

REPORT = Path(__file__).resolve().parents[2] / "docs" / "upstream" / "ray-startsync.md"


def startsync() -> str:
    """The program, in Python. Its argument is the address, as host:port."""
    (program,) = re.findall(r"```python\n(.*?)```", REPORT.read_text(encoding="utf-8"), re.DOTALL)
    return str(program)
