"""Whether GPUs have their memory back after an LLM was stopped, by NVML's account of all that is in use on them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping

import pynvml

from deployments.energy_sources import ReadFailed, gpu_uuids

TOLERANCE_BYTES = 256 * 2**20
"""What a driver's own use goes up and down by; the smallest engine takes more for its CUDA context alone."""
_POLL_S = 0.1

_log = logging.getLogger(__name__)


class GPUMemory:
    """The base line of this process' GPUs (CUDA_VISIBLE_DEVICES): the least that was in use while no engine ran.

    Others' use counts, since the driver can't tell whose it is in a container. Where NVML can't say, nothing is known,
    and nothing is found fault with. Without GPUs it does nothing.
    """

    def __init__(self, gpus: int) -> None:
        """Read nothing yet; ``gpus``: how many there are."""
        self._gpus = gpus
        self._base_bytes: dict[str, int] = {}

    def note(self) -> None:
        """No engine runs now, and one is about to start: what is in use is no engine's."""
        for uuid, used in self._used().items():
            self._base_bytes[uuid] = min(used, self._base_bytes.get(uuid, used))

    async def excess(self, timeout_s: float) -> Mapping[str, int]:
        """Wait until the base line is reached, for at most ``timeout_s`` seconds ≥ 0.

        Returns:
            By UUID, the bytes that a GPU still holds beyond it, where they exceed TOLERANCE_BYTES.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            above = {
                uuid: used - self._base_bytes[uuid] for uuid, used in self._used().items() if uuid in self._base_bytes
            }
            above = {uuid: excess for uuid, excess in above.items() if excess > TOLERANCE_BYTES}
            if not above or loop.time() >= deadline_s:
                return above
            await asyncio.sleep(_POLL_S)

    def _used(self) -> Mapping[str, int]:
        """Bytes in use by UUID; nothing when that can't be told of all of them."""
        if not self._gpus:
            return {}
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            _log.warning("the memory of the GPUs is not watched: %s", error)
            return {}
        try:
            return {
                uuid: int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)
                for uuid in gpu_uuids(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            }
        except (pynvml.NVMLError, ReadFailed) as error:
            _log.warning("the memory of the GPUs is not watched: %s", error)
            return {}
        finally:
            pynvml.nvmlShutdown()
