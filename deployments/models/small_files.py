"""Reads files of a checkpoint into memory only if they are small: their author decides how large they are."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

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


class NotAFile(OSError):
    """A file of a checkpoint is something else: a folder, a named pipe, a socket or a device."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is no regular file")
        self.strerror = str(self)


# D127: named pipes and devices are never read, because a read of them may not end
def require_regular(name: str, found: os.stat_result) -> None:
    """Raise NotAFile if what was found under this name is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(name)


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError; NotAFile, which is one, if it is no regular file."""
    opened = open(file, "rb", opener=_without_waiting)  # noqa: SIM115 - pathlib has no opener
    try:
        require_regular(file.name, os.fstat(opened.fileno()))
    except NotAFile:
        opened.close()
        raise
    return opened


def _without_waiting(name: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    return os.open(name, flags | os.O_NONBLOCK)


def read_small(file: Path, most_bytes: int) -> bytes:
    """Return a file's content. Reads at most one byte more than the limit.

    Raises:
        FileTooLarge: It is larger than ``most_bytes``.
        NotAFile: It is no regular file.
        OSError: It can't be read.
    """
    with open_regular(file) as opened:
        require_small(file.name, os.fstat(opened.fileno()).st_size, most_bytes)
        content = opened.read(most_bytes + 1)  # it may have grown
    require_small(file.name, len(content), most_bytes)
    return content
