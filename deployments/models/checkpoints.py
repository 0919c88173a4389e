"""Reads what checkpoints say of themselves: in folders, in the local cache of the Hugging Face hub, on the hub.

Only headers are read, never weights. Without torch, so that the ingress can use it.
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
from registry.core.records import LLMMemory, LLMSpec
from registry.errors import in_one_line

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsRepoMetadata

KEPT_S = 600.0
"""How long what a checkpoint says is taken as true: a branch of the hub moves, a folder may be replaced."""

UNKNOWN_KEPT_S = 30.0
"""How long a checkpoint that could not be read is not looked at again."""

READ_LIMIT_S = 3.0
"""Longest wait for a checkpoint; what comes later serves those who ask later."""

HUB_TIMEOUT_S = 10.0
"""Longest wait for one answer of the hub."""

_KEPT = 1024

log = structlog.get_logger("deployments.models.checkpoints")


class Checkpoints:
    """Checkpoints by model and revision, each read once in a while. Used from one event loop."""

    def __init__(self, read: Callable[[str, str | None], Checkpoint | None], now_s: Callable[[], float]) -> None:
        """``read`` blocks, in a thread; ``now_s`` is a monotonic clock."""
        self._read = read
        self._now_s = now_s
        self._kept: OrderedDict[tuple[str, str | None], tuple[asyncio.Future[Checkpoint | None], float]] = OrderedDict()

    async def memory(self, model: str, spec: LLMSpec, *, gpus: int | None = None) -> LLMMemory | None:
        """The least memory that an LLM takes, None if it is not known; within ``READ_LIMIT_S``.

        ``model`` is where it lies: a hub id or an absolute folder. ``gpus``: those of the wrapper that is to run it.
        """
        reading, begun_s = self._reading(model, spec.revision)
        left_s = begun_s + READ_LIMIT_S - self._now_s()  # who comes later does not wait for a hub that hangs
        await asyncio.wait({reading}, timeout=max(left_s, 0))
        checkpoint = reading.result() if reading.done() else None
        if checkpoint is None:
            return None
        generates = spec.modeltyp == "text-generation"
        return memory_of(checkpoint, json.loads(spec.engine_args), generates=generates, gpus=gpus)

    def _reading(self, model: str, revision: str | None) -> tuple[asyncio.Future[Checkpoint | None], float]:
        """The reading of a checkpoint, over or under way, and when it began."""
        known = self._kept.pop((model, revision), None)
        if known is not None:
            reading, begun_s = known
            kept_s = UNKNOWN_KEPT_S if reading.done() and reading.result() is None else KEPT_S
            if self._now_s() - begun_s >= kept_s:
                known = None
        if known is None:
            known = asyncio.ensure_future(asyncio.to_thread(self._read_once, model, revision)), self._now_s()
        self._kept[model, revision] = known
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return known

    def _read_once(self, model: str, revision: str | None) -> Checkpoint | None:
        """In a thread. Whatever is wrong with a checkpoint, or on the way to it, the engine will tell more of it."""
        try:
            return self._read(model, revision)
        except Exception as error:
            log.info("a checkpoint can't be read", model=model, reason=in_one_line(error))
            return None


def checkpoints_here() -> Checkpoints:
    """What lies on this machine: folders, and the local cache of the hub."""
    return Checkpoints(read_local, time.monotonic)


def checkpoints_anywhere() -> Checkpoints:
    """What lies on this machine, else what the hub tells."""
    return Checkpoints(lambda model, revision: read_local(model, revision) or read_hub(model, revision), time.monotonic)


def read_local(model: str, revision: str | None) -> Checkpoint | None:
    """A checkpoint that lies on this machine; None: it does not, or not as a whole. May block on a slow disk."""
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
    """A checkpoint on the Hugging Face hub; None for a folder. Raises what its client raises.

    May block for minutes where the network swallows what is sent.
    """
    if Path(model).is_absolute():
        return None
    api = HfApi()
    # First, since it does not try again and again where there is no network. All that follows is of one commit.
    commit = api.model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    config_file = api.hf_hub_download(model, "config.json", revision=commit, etag_timeout=HUB_TIMEOUT_S)
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    return _checkpoint(config, api.get_safetensors_metadata(model, revision=commit, timeout=HUB_TIMEOUT_S))


def _checkpoint(config: Any, weights: SafetensorsRepoMetadata) -> Checkpoint:
    """The sizes of all tensors that are loaded, by part and type. Raises TypeError or KeyError for nonsense."""
    if not isinstance(config, Mapping):
        raise TypeError("config.json holds no object")
    sizes: dict[str | None, Counter[str]] = {"body": Counter(), "head": Counter(), None: Counter()}
    for name, file in weights.weight_map.items():
        tensor = weights.files_metadata[file].tensors[name]
        first, end = tensor.data_offsets
        sizes[part_of(name, config)][tensor.dtype] += end - first
    return Checkpoint(config, body=sizes["body"], head=sizes["head"])
