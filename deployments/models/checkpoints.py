"""Reads checkpoint metadata: from folders, from the local Hugging Face cache, from the hub.

Reads only headers, never weights. A file that is too large is not read into memory. Does not need torch, so that the
ingress can use it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import structlog
from huggingface_hub import HfApi, parse_local_safetensors_file_metadata, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile

from deployments.models.memory_need import Checkpoint, memory_of, needed_fields, part_of
from deployments.models.small_files import (
    CONFIG_BYTES,
    INDEX_BYTES,
    MOST_SHARDS,
    FileTooLarge,
    read_small,
    require_regular,
    require_small,
)
from registry.background import spawn_awaited
from registry.core.records import LLMMemory, LLMSpec
from registry.errors import in_one_line

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

    Header: TypeAlias = tuple[str, SafetensorsFileMetadata]
    Outcome: TypeAlias = Checkpoint | FileTooLarge | None

KEPT_S = 600.0
"""How long a checkpoint's data are used, seconds: a branch on the hub can move, a folder can be replaced."""

UNKNOWN_KEPT_S = 30.0
"""How long an unreadable checkpoint is not read again, seconds."""

READ_LIMIT_S = 3.0
"""Longest wait for a checkpoint, seconds; data that arrive later serve later calls."""

HUB_TIMEOUT_S = 10.0
"""Longest wait for one response of the hub, seconds."""

CONFIG: Final = "config.json"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

HEADERS_AT_ONCE: Final = 4
"""How many headers of safetensors files are read at once; the hub's library reads up to 25 MB of each."""

_KEPT = 1024
_KEPT_CHARS: Final = 16 * 1024
"""Longest data of a checkpoint that is kept, characters of JSON. Real ones have less than 4,000."""

log = structlog.get_logger("deployments.models.checkpoints")


class Checkpoints:
    """Checkpoints by model and revision; each is read again after KEPT_S seconds. Used from one event loop."""

    def __init__(self, read: Callable[[str, str | None], Checkpoint | None], now_s: Callable[[], float]) -> None:
        """``read`` may block; it runs in a thread. ``now_s`` is a monotonic clock."""
        self._read = read
        self._now_s = now_s
        self._kept: OrderedDict[tuple[str, str | None], tuple[asyncio.Future[Outcome], float]] = OrderedDict()

    async def memory(self, model: str, spec: LLMSpec, *, gpus: int | None = None) -> LLMMemory | None:
        """Return the least memory that an LLM needs, None if unknown. Waits up to ``READ_LIMIT_S``.

        ``model`` is its location: a hub id or an absolute folder. ``gpus``: number of GPUs of the wrapper that will run
        it.

        Raises:
            FileTooLarge: Its configuration or index is too large to be read.
        """
        reading, begun_s = self._reading(model, spec.revision)
        left_s = begun_s + READ_LIMIT_S - self._now_s()  # later callers do not wait again for a hub that hangs
        await asyncio.wait({reading}, timeout=max(left_s, 0))
        checkpoint = reading.result() if reading.done() else None
        if checkpoint is None:
            return None
        if isinstance(checkpoint, FileTooLarge):
            raise FileTooLarge(*checkpoint.args)  # a new object, because each raise adds to an object's traceback
        generates = spec.modeltyp == "text-generation"
        return memory_of(checkpoint, json.loads(spec.engine_args), generates=generates, gpus=gpus)

    def _reading(self, model: str, revision: str | None) -> tuple[asyncio.Future[Outcome], float]:
        """Return the task that reads a checkpoint, done or running, and when it began."""
        known = self._kept.pop((model, revision), None)
        if known is not None:
            reading, begun_s = known
            unknown = reading.done() and not isinstance(reading.result(), Checkpoint)
            kept_s = UNKNOWN_KEPT_S if unknown else KEPT_S
            if self._now_s() - begun_s >= kept_s:
                known = None
        if known is None:
            reading = spawn_awaited("read a checkpoint", asyncio.to_thread(self._read_once, model, revision))
            known = reading, self._now_s()
        self._kept[model, revision] = known
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return known

    def _read_once(self, model: str, revision: str | None) -> Outcome:
        """Read a checkpoint in a thread; None if that fails, because the engine reports problems in more detail."""
        try:
            return self._read(model, revision)
        except FileTooLarge as error:
            return FileTooLarge(*error.args)  # its traceback would keep what was read in memory
        except Exception as error:
            log.info("a checkpoint can't be read", model=model, reason=in_one_line(error))
            return None


def checkpoints_here() -> Checkpoints:
    """Return the checkpoints on this machine: folders and the local cache of the hub."""
    return Checkpoints(read_local, time.monotonic)


def checkpoints_anywhere() -> Checkpoints:
    """Return the checkpoints on this machine; those that are not here are read from the hub."""
    return Checkpoints(lambda model, revision: read_local(model, revision) or read_hub(model, revision), time.monotonic)


def read_local(model: str, revision: str | None) -> Checkpoint | None:
    """Read a checkpoint on this machine; None if it is not here or incomplete. May block on a slow disk.

    Raises:
        FileTooLarge: A file would take too much memory.
        ValueError, TypeError, KeyError, SafetensorsParsingError: A file is damaged.
    """
    folder = Path(model)
    if not folder.is_absolute():
        cached = try_to_load_from_cache(model, CONFIG, revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        config = json.loads(read_small(folder / CONFIG, CONFIG_BYTES))
        if (folder / SINGLE).exists():
            return _checkpoint(config, None, [_local_header(folder, SINGLE)])
        index = _index(folder / INDEX)
        return _checkpoint(config, index, (_local_header(folder, file) for file in _files(index)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_hub(model: str, revision: str | None) -> Checkpoint | None:
    """Read a checkpoint from the Hugging Face hub; None for a folder, and if it has no safetensors files.

    May block for minutes if the network drops packets.

    Raises:
        FileTooLarge: A file would take too much memory; it is not downloaded.
        Exception: The hub's client's own.
    """
    if Path(model).is_absolute():
        return None
    api = HfApi()
    # First, because this call does not retry without a network. All later calls use the commit it returns. Only the
    # commit is asked for, because the model's author decides how large the rest of the answer is.
    commit = api.model_info(model, revision=revision, timeout=HUB_TIMEOUT_S, expand=["sha"]).sha
    files = api.get_paths_info(model, [CONFIG, SINGLE, INDEX], revision=commit)
    sizes = {file.path: file.size for file in files if isinstance(file, RepoFile)}
    weights = next((name for name in (SINGLE, INDEX) if name in sizes), None)
    if CONFIG not in sizes or weights is None:
        return None

    def load(name: str, most_bytes: int) -> Path:
        require_small(name, sizes[name], most_bytes)
        return Path(api.hf_hub_download(model, name, revision=commit, etag_timeout=HUB_TIMEOUT_S))

    def header(name: str) -> tuple[str, SafetensorsFileMetadata]:
        return name, api.parse_safetensors_file_metadata(model, name, revision=commit, timeout=HUB_TIMEOUT_S)

    config = json.loads(read_small(load(CONFIG, CONFIG_BYTES), CONFIG_BYTES))
    if weights == SINGLE:
        return _checkpoint(config, None, [header(SINGLE)])
    index = _index(load(INDEX, INDEX_BYTES))
    return _checkpoint(config, index, _at_once(header, _files(index)))


def _local_header(folder: Path, file: str) -> Header:
    path = folder / file
    require_regular(path.name, path.stat())
    return file, parse_local_safetensors_file_metadata(path)


def _at_once(header: Callable[[str], Header], files: Sequence[str]) -> Iterator[Header]:
    """Yield the headers of all files. At most HEADERS_AT_ONCE are in memory."""
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        for first in range(0, len(files), HEADERS_AT_ONCE):
            yield from pool.map(header, files[first : first + HEADERS_AT_ONCE])


def _index(file: Path) -> Mapping[str, str]:
    """Return the file of each tensor. Raises FileTooLarge; ValueError, TypeError or KeyError for invalid data."""
    index = json.loads(read_small(file, INDEX_BYTES))["weight_map"]
    if any(not isinstance(name, str) or Path(name).name != name for name in index.values()):
        raise ValueError(f"{file.name} names a file that is not in its folder")
    return cast("Mapping[str, str]", index)


def _files(index: Mapping[str, str]) -> Sequence[str]:
    files = sorted(set(index.values()))
    if len(files) > MOST_SHARDS:
        raise FileTooLarge(f"its weights are in {len(files)} files, and the headers of at most {MOST_SHARDS} are read")
    return files


def _checkpoint(config: Any, index: Mapping[str, str] | None, headers: Iterable[Header]) -> Checkpoint:
    """Sum the sizes of all tensors that are loaded, by part and type. Raises ValueError, TypeError or KeyError.

    ``index``: the file of each tensor that is loaded; None: all tensors.
    """
    if not isinstance(config, Mapping):
        raise TypeError("config.json holds no object")
    config = needed_fields(config)
    sizes: dict[str | None, Counter[str]] = {"body": Counter(), "head": Counter(), None: Counter()}
    found = 0
    for file, header in headers:
        for name, tensor in header.tensors.items():
            if index is None or index.get(name) == file:
                first, end = tensor.data_offsets
                if not (isinstance(first, int) and isinstance(end, int) and 0 <= first <= end < 2**63):
                    raise ValueError(f"{file} has a tensor with invalid offsets")
                sizes[part_of(name, config)][tensor.dtype] += end - first
                found += 1
    if index is not None and found != len(index):
        raise KeyError("a tensor of the index is not in its file")
    if len(json.dumps([config, sizes["body"], sizes["head"]])) > _KEPT_CHARS:
        raise ValueError("the fields that decide its memory are too long to be kept")
    return Checkpoint(config, body=sizes["body"], head=sizes["head"])
