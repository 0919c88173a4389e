"""A hook of MkDocs (``make docs``): adds the decisions to the navigation: their list, then each by its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Add every page of docs/decisions to the navigation."""
    docs = Path(config.docs_dir)
    index, decisions = docs / "decisions" / "index.md", sorted((docs / "decisions").glob("[0-9]*.md"))
    pages = [str(page.relative_to(docs)) for page in (index, *decisions)]
    config.nav.append({"Decisions": pages})
    return config
