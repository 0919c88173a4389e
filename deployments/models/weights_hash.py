"""The SHA-256 of a model's weights. Hashing gigabytes takes long, so it runs once and only while nothing is measured.

The value is that of ``sha256sum *.safetensors | sha256sum``, with the files sorted by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog

from deployments.models.weights import Weights
from registry.background import spawn_awaited

_CHUNK_BYTES = 4 * 2**20

log = structlog.get_logger("deployments.models.weights_hash")


class WeightsHash:
    """Hashes weights piece by piece. ``sha256`` is None until it is known; it stays None if a file can't be read.

    The hash of each file is stored in ``directory`` under its path, size and modification time, so a changed file is
    read again.
    """

    def __init__(self, weights: Weights, directory: Path) -> None:
        """Prepare the hash of these weights; reads nothing yet."""
        self.weights = weights
        self.sha256: str | None = None
        self._directory = directory
        self._pieces = self._read()

    async def known(self, *, within_s: float) -> str | None:
        """Continue reading for at most ``within_s`` seconds; return the hash, or None if it is unfinished."""
        over = threading.Event()
        reading = spawn_awaited("hash weights", asyncio.to_thread(self._go_on, over))
        try:
            await asyncio.wait({reading}, timeout=within_s)
        finally:
            over.set()
            await asyncio.wait({reading})  # the thread ends after its current piece, and can be started again then
        return self.sha256

    def _go_on(self, over: threading.Event) -> None:
        try:
            for _ in self._pieces:
                if over.is_set():
                    return
        except OSError as error:
            log.warning("the weights can't be read", reason=str(error))

    def _read(self) -> Iterator[None]:
        lines = hashlib.sha256()
        for path, size, changed_ns in self.weights.files:
            key = hashlib.sha256(f"{path}\0{size}\0{changed_ns}".encode()).hexdigest()
            kept = self._directory / key
            if not kept.is_file():
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while piece := file.read(_CHUNK_BYTES):
                        digest.update(piece)
                        yield
                _write(kept, digest.hexdigest())
            lines.update(f"{kept.read_text(encoding='ascii')}  {path.name}\n".encode())
        self.sha256 = lines.hexdigest()


def _write(path: Path, text: str) -> None:
    """Write a file atomically, because other wrappers of the machine read and write it as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text, encoding="ascii")
    part.replace(path)
