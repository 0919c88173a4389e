"""``python -m tests.docs`` writes the pages of docs/ that are made from the code."""

from __future__ import annotations

from tests.docs.pages import DOCS, PAGES


def main() -> None:
    """Write every page, and name those that have changed."""
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
