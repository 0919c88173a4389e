"""The weights of a model as files, and reading them into the page cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from deployments.machine.memory import MainMemory
from deployments.models import weights
from deployments.models.small_files import INDEX_BYTES
from deployments.models.weights import read_ahead, weights_of
from tests.support.weight_folders import FOLDERS, Files


def write(folder: Path, files: Files) -> Path:
    """Write files of these contents."""
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def make(folder: Path, **files: int) -> Path:
    """Files of so many bytes; ``_`` stands for a dot."""
    for name, size in files.items():
        (folder / name.replace("_", ".")).write_bytes(bytes(size))
    return folder


@pytest.mark.parametrize(("files", "load_format", "loaded"), FOLDERS)
def test_the_files_are_those_that_vllm_loads(
    tmp_path: Path, files: Files, load_format: str, loaded: Sequence[str]
) -> None:
    """Where a model has its weights in several forms those count that vLLM takes; the index names the files."""
    found = weights_of(str(write(tmp_path, files)), load_format)
    assert found is not None
    assert [file.name for file, _, _ in found.files] == loaded
    assert found.size_bytes == sum((tmp_path / name).stat().st_size for name in loaded)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 1}', "[" * 100_000])
def test_an_index_that_cannot_be_read_names_nothing(tmp_path: Path, index: str) -> None:
    """All files count then; the engine reports the index."""
    write(tmp_path, {"a.safetensors": "1", "model.safetensors.index.json": index})
    assert getattr(weights_of(str(tmp_path)), "size_bytes", None) == 1


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    """All files count then; the check before the start reports the index."""
    write(tmp_path, {"a.safetensors": "1", "b.safetensors": "2"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert getattr(weights_of(str(tmp_path)), "size_bytes", None) == 1
    with index.open("ab") as opened:
        opened.write(b" " * INDEX_BYTES)
    assert getattr(weights_of(str(tmp_path)), "size_bytes", None) == 2


def test_no_weights(tmp_path: Path) -> None:
    """Of a hub id, or of a folder without weights, nothing is known."""
    assert weights_of("org/model") is None
    assert weights_of(str(make(tmp_path, config_json=10))) is None


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """Of weights of which a file can't be read nothing is known."""
    (make(tmp_path, a_safetensors=3) / "b.safetensors").symlink_to(tmp_path / "gone")
    assert weights_of(str(tmp_path)) is None


def test_changed_weights_differ(tmp_path: Path) -> None:
    """The same files are equal, those that were written anew are not."""
    file = make(tmp_path, a_safetensors=3) / "a.safetensors"
    before = weights_of(str(tmp_path))
    assert before == weights_of(str(tmp_path))
    os.utime(file, ns=(0, 0))
    assert before != weights_of(str(tmp_path))


def test_reads_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of every file is asked for."""
    chunk, advice = 128 * 1024, os.POSIX_FADV_WILLNEED
    wanted = [(0, chunk, advice), (chunk, chunk, advice), (2 * chunk, chunk, advice), (0, chunk, advice)]
    asked: list[tuple[int, ...]] = []
    all_of_it = threading.Event()

    def advise(_fd: int, *advice: int) -> None:
        asked.append(advice)
        if len(asked) == len(wanted):
            all_of_it.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with read_ahead(weights_of(str(make(tmp_path, a_safetensors=300_000, b_safetensors=10)))):
        assert all_of_it.wait(10)
    assert asked == wanted


def test_ends_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read any more once the swap is over, however much there is."""
    over, asked = threading.Event(), []

    def advise(_fd: int, offset: int, *_: int) -> None:
        asked.append(offset)
        over.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    found = weights_of(str(make(tmp_path, a_safetensors=1_000_000, b_safetensors=5)))
    assert found is not None
    weights._read(found, over)
    assert asked == [0]


def test_weights_that_are_removed_meanwhile(tmp_path: Path) -> None:
    """A file that is gone when its turn comes is passed over."""
    found = weights_of(str(make(tmp_path, a_safetensors=3, b_safetensors=4)))
    assert found is not None
    found.files[0][0].unlink()
    weights._read(found, threading.Event())


def test_too_large_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that would push one another out of memory, or that nobody knows, are left alone."""
    monkeypatch.setattr(weights, "main_memory", lambda: MainMemory(total_bytes=9, available_bytes=2))
    monkeypatch.setattr(threading, "Thread", None)
    with read_ahead(weights_of(str(make(tmp_path, a_safetensors=3)))), read_ahead(None):
        pass
