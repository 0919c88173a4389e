"""A model's weight files: their size, whether they have changed, and reading them ahead of the engine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.machine.memory import main_memory
from deployments.models.download import INDICES, weight_files
from deployments.models.small_files import INDEX_BYTES, FileTooLarge, read_small, require_regular
from registry.background import spawn_thread

_CHUNK_BYTES = 128 * 1024
"""Bytes per call: the usual read-ahead of a disk. In one call, the kernel reads no more than the disk's read-ahead.
Source: Linux, mm/readahead.c, force_page_cache_ra."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weight files: path, bytes, modification time (ns). Equal as long as the files do not change."""

    files: tuple[tuple[Path, int, int], ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk; about the LLM's size in memory, which is less if it is quantised while loading."""
        return sum(size for _, size, _ in self.files)


def weights_of(model: str, load_format: str = "auto") -> Weights | None:
    """Return the weight files in a model's folder that vLLM loads. Does not read the weights.

    Args:
        model: The folder, or a Hugging Face id.
        load_format: vLLM's engine argument.

    Returns:
        The files, sorted by name; None if there are none, ``model`` is no folder, or one can't be read or is no
        regular file.
    """
    folder = Path(model)
    with suppress(OSError):  # e.g. a broken link: the engine reports such problems
        names = sorted(weight_files([file.name for file in folder.iterdir()], load_format))
        files = [folder / name for name in _in_index(folder, names, load_format)]
        stats = [(file, file.stat()) for file in files]
        for file, found in stats:
            require_regular(file.name, found)  # a read of a named pipe or a device may not end
        return Weights(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)) if files else None
    return None


def _in_index(folder: Path, files: Sequence[str], load_format: str) -> Sequence[str]:
    """Return those of the files that the index of safetensors names; all if there is none. Raises OSError."""
    if not files or not files[0].endswith(".safetensors"):
        return files
    mistral = load_format != "safetensors" and files[0].startswith("consolidated")
    index = folder / INDICES[mistral]
    if not index.is_file():
        return files
    try:
        named = set(json.loads(read_small(index, INDEX_BYTES))["weight_map"].values())
    except (FileTooLarge, RecursionError, ValueError, LookupError, TypeError, AttributeError):  # reported elsewhere
        return files
    return [file for file in files if file in named]


# D29: read ahead from the swap on, not before
@contextmanager
def read_ahead(weights: Weights | None) -> Iterator[None]:
    """Let the kernel read the weights into its page cache, at most until this context ends.

    Weights that exceed the available memory are not read: they would evict one another.
    """
    if weights is None or weights.size_bytes > main_memory().available_bytes:
        yield
        return
    over = threading.Event()
    reader = spawn_thread("read-ahead", lambda: _read(weights, over))
    try:
        yield
    finally:
        over.set()
        reader.join()


def _read(weights: Weights, over: threading.Event) -> None:
    for file, size, _ in weights.files:
        # A file that is being removed or is unreadable: the engine reports that.
        with suppress(OSError), file.open("rb") as opened:
            for offset in range(0, size, _CHUNK_BYTES):
                if over.is_set():
                    return
                os.posix_fadvise(opened.fileno(), offset, _CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
