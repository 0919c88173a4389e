"""The hash of a model's weights: what sha256sum says, read once, a piece at a time."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from deployments.models import weights_hash
from deployments.models.weights import Weights, weights_of
from deployments.models.weights_hash import WeightsHash


def checkpoint(folder: Path, **files: bytes) -> Weights:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    weights = weights_of(str(folder))
    assert weights is not None
    return weights


def expected(**files: bytes) -> str:
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}.safetensors\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


async def test_hash_is_what_sha256sum_says(tmp_path: Path) -> None:
    """``sha256sum *.safetensors | sha256sum`` gives the same, for one file and for several."""
    for n, files in enumerate([{"model": b"x" * 10}, {"b": b"2", "a": b"1"}]):
        weights = checkpoint(tmp_path / f"llm{n}", **files)
        assert await WeightsHash(weights, tmp_path / "kept").known(within_s=60) == expected(**files)


async def test_files_are_read_once(tmp_path: Path) -> None:
    """The next process takes what is kept; a file that has changed is read anew."""
    folder, kept = tmp_path / "llm", tmp_path / "kept"
    weights = checkpoint(folder, a=b"1", b=b"2")
    await WeightsHash(weights, kept).known(within_s=60)
    times = [(path, path.stat()) for path, _, _ in weights.files]
    (folder / "a.safetensors").write_bytes(b"X")  # nobody can tell: size and time are the same
    for path, stat in times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert await WeightsHash(weights, kept).known(within_s=60) == expected(a=b"1", b=b"2")
    assert await WeightsHash(checkpoint(folder, a=b"3"), kept).known(within_s=60) == expected(a=b"3", b=b"2")


async def test_reading_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Each call reads for as long as it may, a piece at least, until the hash is known."""
    content = b"x" * (3 * weights_hash._CHUNK_BYTES)
    hashing = WeightsHash(checkpoint(tmp_path / "llm", model=content), tmp_path / "kept")
    calls = 0
    while await hashing.known(within_s=0.0) is None:
        calls += 1
        assert calls <= 10
    assert hashing.sha256 == expected(model=content)


async def test_weights_that_go_away_are_not_known(tmp_path: Path) -> None:
    """A file that can't be read leaves the hash unknown, and raises nothing."""
    weights = checkpoint(tmp_path / "llm", model=b"x")
    (tmp_path / "llm" / "model.safetensors").unlink()
    hashing = WeightsHash(weights, tmp_path / "kept")
    assert await hashing.known(within_s=60) is None
    assert await hashing.known(within_s=60) is None


async def test_who_is_cancelled_leaves_it_to_be_gone_on_with(tmp_path: Path) -> None:
    """A newer command may come at any moment; what was read until then counts."""
    content = b"x" * (3 * weights_hash._CHUNK_BYTES)
    hashing = WeightsHash(checkpoint(tmp_path / "llm", model=content), tmp_path / "kept")
    for _ in range(5):
        reading = asyncio.create_task(hashing.known(within_s=60))
        await asyncio.wait({reading}, timeout=0)
        reading.cancel()
        await asyncio.wait({reading})
    assert await hashing.known(within_s=60) == expected(model=content)
