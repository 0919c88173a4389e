"""Reads files of a checkpoint into memory only if they are small: their author decides how large they are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# D122: bounds of the files that are read into memory
CONFIG_BYTES: Final = 8 * 2**20
"""Largest configuration of a model, tokenizer or processor, bytes. Most have a few KiB."""

INDEX_BYTES: Final = 64 * 2**20
"""Largest index of safetensors files, bytes. It has about 100 bytes for each tensor: room for 600,000 of them."""

MOST_SHARDS: Final = 2048
"""Most safetensors files of one model; with files of 5 GB, that is a model of 10 TB."""


CONFIGS: Final = ("*config*.json", "params.json")
"""Patterns of the names of configurations: of the model, its tokenizer, its processors, and how it generates."""


class FileTooLarge(Exception):
    """A file of a checkpoint is too large to be read; the text names the file, its size and the limit."""


def require_small(name: str, size_bytes: int, most_bytes: int) -> None:
    """Raise FileTooLarge if a file of this size is above the limit."""
    if size_bytes > most_bytes:
        raise FileTooLarge(
            f"its {name} has {size_bytes:,} bytes, and at most {most_bytes:,} are read; name a model with a smaller one"
        )


def read_small(file: Path, most_bytes: int) -> bytes:
    """Return a file's content. Reads at most one byte more than the limit.

    Raises:
        FileTooLarge: It is larger than ``most_bytes``.
        OSError: It can't be read.
    """
    require_small(file.name, file.stat().st_size, most_bytes)
    with file.open("rb") as opened:
        content = opened.read(most_bytes + 1)  # it may have grown, or be no regular file
    require_small(file.name, len(content), most_bytes)
    return content
