"""For all tests: the cheap ones go first, so that a fault shows soon and a running cluster disturbs no other test."""

from __future__ import annotations

from pathlib import Path

import pytest

ORDER = ("unit", "property", "integration", "engine", "cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder; inside a folder the order stays."""
    root = Path(__file__).parent
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(root).parts[0]))
