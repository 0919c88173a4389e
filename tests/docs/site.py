"""A hook of MkDocs (``make docs``): adds the decisions to the navigation, in the order of their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Add every page of docs/decisions to the navigation."""
    docs = Path(config.docs_dir)
    pages = [str(page.relative_to(docs)) for page in sorted((docs / "decisions").glob("*.md"))]
    config.nav.append({"Decisions": pages})
    return config
