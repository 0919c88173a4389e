"""A model's weights as files: how large they are, whether they have changed, and reading them ahead of the engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.machine.memory import main_memory

_FORMATS = ("*.safetensors", "*.bin", "*.pt")  # vLLM takes the first of them that a folder has
_DUPLICATE = "consolidated"  # Mistral's models come in two forms, of which vLLM reads the other one
_CHUNK_BYTES = 128 * 1024
"""One call reads no more ahead than a disk's own read-ahead (mm/readahead.c, force_page_cache_ra), usually this."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold a model's weights: path, bytes, time of the last change (ns). Equal while nothing changes."""

    files: tuple[tuple[Path, int, int], ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, and about what the LLM takes in memory: less, if it is quantised when it is loaded."""
        return sum(size for _, size, _ in self.files)


def weights_of(model: str) -> Weights | None:
    """The weights of a model in a folder of this machine; None if there is no such folder, or one that can't be read.

    Reads no weights.
    """
    folder = Path(model)
    with suppress(OSError):  # a link that leads nowhere, say: what is wrong with it the engine tells
        for pattern in _FORMATS:
            found = sorted(folder.glob(pattern))
            if found:
                files = [file for file in found if not file.name.startswith(_DUPLICATE)] or found
                stats = [(file, file.stat()) for file in files]
                return Weights(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
    return None


@contextmanager
def read_ahead(weights: Weights | None) -> Iterator[None]:
    """Have the kernel read the weights into its page cache for as long as this lasts, at the most.

    Weights that don't fit into the memory that is free are left alone: they would push one another out.
    """
    if weights is None or weights.size_bytes > main_memory().available_bytes:
        yield
        return
    over = threading.Event()
    reader = threading.Thread(target=_read, args=(weights, over), name="read-ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def _read(weights: Weights, over: threading.Event) -> None:
    for file, size, _ in weights.files:
        # One that is being removed, or can't be read: what is wrong with it the engine tells.
        with suppress(OSError), file.open("rb") as opened:
            for offset in range(0, size, _CHUNK_BYTES):
                if over.is_set():
                    return
                os.posix_fadvise(opened.fileno(), offset, _CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
