"""The product's source files, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
HOUSES: Final = ("registry", "deployments", "greenprompt_client")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Every product file, parsed."""
    for house in HOUSES:
        for path in sorted((ROOT / house).rglob("*.py")):
            yield path, ast.parse(path.read_text())
