"""Whether GPUs have their memory back after an LLM was stopped, by NVML's account of all that is in use on them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping

from deployments.energy.counters.probe import ReadFailed, gpu_memory

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

    @property
    def known(self) -> bool:
        """Whether there is a base line of every GPU."""
        return len(self._base_bytes) == self._gpus

    def note(self) -> None:
        """No engine runs now, and one is about to start: what is in use is no engine's."""
        for uuid, (used, _) in self._memory().items():
            self._base_bytes[uuid] = min(used, self._base_bytes.get(uuid, used))

    async def excess(self, timeout_s: float, kept_bytes: int = 0) -> Mapping[str, int]:
        """Wait until the base line is reached, for at most ``timeout_s`` seconds ≥ 0.

        ``kept_bytes`` is what LLMs that sleep may keep of each GPU.

        Returns:
            By UUID, the bytes that a GPU still holds beyond that, where they exceed TOLERANCE_BYTES.
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
        """Whether less than this share (0 to 1) of some GPU is free, ``kept_bytes`` of each counted as free."""
        return any(total - used + kept_bytes < share * total for used, total in self._memory().values())

    def _memory(self) -> Mapping[str, tuple[int, int]]:
        """Bytes in use, and all there are, by UUID; nothing when that can't be told of all of them."""
        if not self._gpus:
            return {}
        try:
            return gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        except ReadFailed as error:
            _log.warning("the memory of the GPUs is not watched: %s", error)
            return {}
