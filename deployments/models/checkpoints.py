"""Reads checkpoint metadata: from folders, from the local Hugging Face cache, from the hub.

Reads only headers, never weights. Does not need torch, so that the ingress can use it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from huggingface_hub import HfApi, get_local_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError

from deployments.models.memory_need import Checkpoint, memory_of, part_of
from registry.background import spawn_awaited
from registry.core.records import LLMMemory, LLMSpec
from registry.errors import in_one_line

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsRepoMetadata

KEPT_S = 600.0
"""How long a checkpoint's data are used, seconds: a branch on the hub can move, a folder can be replaced."""

UNKNOWN_KEPT_S = 30.0
"""How long an unreadable checkpoint is not read again, seconds."""

READ_LIMIT_S = 3.0
"""Longest wait for a checkpoint, seconds; data that arrive later serve later calls."""

HUB_TIMEOUT_S = 10.0
"""Longest wait for one response of the hub, seconds."""

_KEPT = 1024

log = structlog.get_logger("deployments.models.checkpoints")


class Checkpoints:
    """Checkpoints by model and revision; each is read again after KEPT_S seconds. Used from one event loop."""

    def __init__(self, read: Callable[[str, str | None], Checkpoint | None], now_s: Callable[[], float]) -> None:
        """``read`` may block; it runs in a thread. ``now_s`` is a monotonic clock."""
        self._read = read
        self._now_s = now_s
        self._kept: OrderedDict[tuple[str, str | None], tuple[asyncio.Future[Checkpoint | None], float]] = OrderedDict()

    async def memory(self, model: str, spec: LLMSpec, *, gpus: int | None = None) -> LLMMemory | None:
        """Return the least memory that an LLM needs, None if unknown. Waits up to ``READ_LIMIT_S``.

        ``model`` is its location: a hub id or an absolute folder. ``gpus``: number of GPUs of the wrapper that will run
        it.
        """
        reading, begun_s = self._reading(model, spec.revision)
        left_s = begun_s + READ_LIMIT_S - self._now_s()  # later callers do not wait again for a hub that hangs
        await asyncio.wait({reading}, timeout=max(left_s, 0))
        checkpoint = reading.result() if reading.done() else None
        if checkpoint is None:
            return None
        generates = spec.modeltyp == "text-generation"
        return memory_of(checkpoint, json.loads(spec.engine_args), generates=generates, gpus=gpus)

    def _reading(self, model: str, revision: str | None) -> tuple[asyncio.Future[Checkpoint | None], float]:
        """Return the task that reads a checkpoint, done or running, and when it began."""
        known = self._kept.pop((model, revision), None)
        if known is not None:
            reading, begun_s = known
            kept_s = UNKNOWN_KEPT_S if reading.done() and reading.result() is None else KEPT_S
            if self._now_s() - begun_s >= kept_s:
                known = None
        if known is None:
            reading = spawn_awaited("read a checkpoint", asyncio.to_thread(self._read_once, model, revision))
            known = reading, self._now_s()
        self._kept[model, revision] = known
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return known

    def _read_once(self, model: str, revision: str | None) -> Checkpoint | None:
        """Read a checkpoint in a thread; None if that fails, because the engine reports problems in more detail."""
        try:
            return self._read(model, revision)
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
        ValueError, TypeError, KeyError, SafetensorsParsingError: A file is damaged.
    """
    folder = Path(model)
    if not folder.is_absolute():
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _checkpoint(config, get_local_safetensors_metadata(folder))
    except (FileNotFoundError, NotADirectoryError, NotASafetensorsRepoError):
        return None


def read_hub(model: str, revision: str | None) -> Checkpoint | None:
    """Read a checkpoint from the Hugging Face hub; None for a folder. Raises the exceptions of the hub's client.

    May block for minutes if the network drops packets.
    """
    if Path(model).is_absolute():
        return None
    api = HfApi()
    # First, because this call does not retry without a network. All later calls use the commit it returns.
    commit = api.model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    config_file = api.hf_hub_download(model, "config.json", revision=commit, etag_timeout=HUB_TIMEOUT_S)
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    return _checkpoint(config, api.get_safetensors_metadata(model, revision=commit, timeout=HUB_TIMEOUT_S))


def _checkpoint(config: Any, weights: SafetensorsRepoMetadata) -> Checkpoint:
    """Sum the sizes of all tensors that are loaded, by part and type. Raises TypeError or KeyError for invalid data."""
    if not isinstance(config, Mapping):
        raise TypeError("config.json holds no object")
    sizes: dict[str | None, Counter[str]] = {"body": Counter(), "head": Counter(), None: Counter()}
    for name, file in weights.weight_map.items():
        tensor = weights.files_metadata[file].tensors[name]
        first, end = tensor.data_offsets
        sizes[part_of(name, config)][tensor.dtype] += end - first
    return Checkpoint(config, body=sizes["body"], head=sizes["head"])
