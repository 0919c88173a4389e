"""Checks that GPU memory is free again after an LLM was stopped: NVML reports all memory in use on each GPU."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import structlog

from deployments.machine.gpus import ReadFailed, gpu_memory

TOLERANCE_BYTES = 256 * 2**20
"""Largest excess that is ignored. A driver's own use varies by less; any engine's CUDA context needs more."""
_POLL_S = 0.1

log = structlog.get_logger("deployments.engine.gpu_memory")


# D24: memory that stays used costs the wrapper a restart
class GPUMemory:
    """Baseline of this process's GPUs (CUDA_VISIBLE_DEVICES): the least memory in use while no engine ran.

    Includes memory of other processes, because in a container the driver can't tell whose it is. If NVML can't be read,
    nothing is reported. Without GPUs this does nothing.
    """

    def __init__(self, gpus: int) -> None:
        """Read nothing yet; ``gpus``: the number of GPUs."""
        self._gpus = gpus
        self._base_bytes: dict[str, int] = {}

    @property
    def known(self) -> bool:
        """Whether every GPU has a baseline."""
        return len(self._base_bytes) == self._gpus

    def note(self) -> None:
        """Lower the baseline to the memory in use now, if that is less. Call this before each start."""
        for uuid, (used, _) in self._memory().items():
            self._base_bytes[uuid] = min(used, self._base_bytes.get(uuid, used))

    async def excess(self, timeout_s: float, kept_bytes: int = 0) -> Mapping[str, int]:
        """Wait up to ``timeout_s`` seconds ≥ 0 until memory use is back at the baseline.

        ``kept_bytes`` is the memory that sleeping LLMs may keep on each GPU.

        Returns:
            By UUID, the bytes in use beyond baseline and ``kept_bytes``, for GPUs where these exceed TOLERANCE_BYTES.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            above = {
                uuid: used - self._base_bytes[uuid] - kept_bytes
                for uuid, (used, _) in self._memory().items()
                if uuid in self._base_bytes
            }
            above = {uuid: excess for uuid, excess in above.items() if excess > TOLERANCE_BYTES}
            if not above or loop.time() >= deadline_s:
                return above
            await asyncio.sleep(_POLL_S)

    def lack(self, share: float, kept_bytes: int = 0) -> bool:
        """Whether on any GPU less than this share (0 to 1) is free; ``kept_bytes`` of each count as free."""
        return any(total - used + kept_bytes < share * total for used, total in self._memory().values())

    def _memory(self) -> Mapping[str, tuple[int, int]]:
        """Return bytes in use and total bytes by UUID; empty if any GPU can't be read."""
        if not self._gpus:
            return {}
        try:
            return gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        except ReadFailed as error:
            log.warning("the memory of the GPUs is not watched", reason=str(error))
            return {}
