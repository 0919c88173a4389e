"""Checks whether an LLM fits on a wrapper: number of GPUs, GPU type, memory. Pure.

Needs are lower bounds and sizes are upper bounds, so that an LLM that might run is never refused. The
wrapper knows the exact figures and checks again before it starts an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple

from registry.core.decision import Limits
from registry.core.records import LLMMemory, LLMSpec

GIB: Final = 2**30

HOST_SHARE: Final = 0.9
"""Fraction of main memory that may be in use once an LLM runs; the rest is left to everything else on the machine."""

ENGINE_BYTES: Final = 256 * 2**20
"""Minimum main memory of an engine's processes without weights and KV cache: 220 MiB with vLLM 0.32 on a CPU."""

SIZE_STEP_BYTES: Final = 64 * 2**20
"""A machine's memory is rounded up to a multiple of this, so that machines of the same kind have the same Size."""

ANY_GPU_TYPE: Final = "*"
"""Means any GPU type; None means not known or no GPU."""

_NOWHERE_BYTES: Final = 2**70
"""More memory than any machine has."""


class Size(NamedTuple):
    """The hardware of a wrapper. Wrappers of equal size are treated alike. Each further size makes decisions slower.

    ``memory_bytes``: memory of each GPU, or without GPUs the wrapper's share of main memory; None: not known.
    ``draining``: its machine gets no new leases.
    """

    gpus: int
    gpu_type: str | None = None
    memory_bytes: int | None = None
    draining: bool = False


# D19: needs are a lower bound, sizes an upper one
class Needs(NamedTuple):
    """What a wrapper must have at least; 0: no condition.

    * ``gpus``: number of GPUs.
    * ``bytes_per_gpu``: memory of each GPU; ``gpu_bytes``: memory of all its GPUs together.
    * ``main_bytes``: main memory; required only of a wrapper without GPU.
    """

    gpus: int = 0
    bytes_per_gpu: int = 0
    gpu_bytes: int = 0
    main_bytes: int = 0

    def met_by(self, size: Size) -> bool:
        """True unless it is certain that a wrapper of this size is too small."""
        if size.gpus < self.gpus:
            return False
        if size.memory_bytes is None:
            return True
        if size.gpus == 0:
            return size.memory_bytes >= self.main_bytes
        return size.memory_bytes >= self.bytes_per_gpu and size.gpus * size.memory_bytes >= self.gpu_bytes

    def joined_with(self, other: Needs) -> Needs:
        """Return what a wrapper must have to run both, one after the other."""
        return Needs(*map(max, self, other))


def needs_of(spec: LLMSpec, memory: LLMMemory | None, limits: Limits) -> Needs:
    """Return what an LLM needs of a wrapper; what is not known is 0."""
    if memory is None:
        return Needs(spec.gpus)
    kv_cache_bytes = memory.kv_reserved_bytes or memory.kv_cache_bytes or 0
    gpu_bytes = int((memory.weights_bytes + kv_cache_bytes) / memory.gpu_share)
    main_bytes = int(host_bytes(memory, limits) / HOST_SHARE)
    if limits.kv_cache_bytes is not None and (memory.kv_cache_bytes or 0) > limits.kv_cache_bytes:
        main_bytes = _NOWHERE_BYTES
    if memory.gpus is None:
        return Needs(spec.gpus, gpu_bytes=gpu_bytes, main_bytes=main_bytes)
    return Needs(spec.gpus, bytes_per_gpu=gpu_bytes // memory.gpus, main_bytes=main_bytes)


def host_bytes(memory: LLMMemory | None, limits: Limits) -> int:
    """Return the main memory that an LLM takes without GPUs: weights, reserved KV cache, and its processes; bytes."""
    if memory is None:
        return ENGINE_BYTES
    kv_cache_bytes = memory.kv_reserved_bytes
    if kv_cache_bytes is None:
        # If the checkpoint does not describe a KV cache, the LLM may have none.
        known = memory.kv_cache_bytes is not None
        kv_cache_bytes = max(memory.kv_cache_bytes or 0, limits.kv_cache_bytes or 0) if known else 0
    return memory.weights_bytes + kv_cache_bytes + ENGINE_BYTES


def why_too_large(
    spec: LLMSpec,
    memory: LLMMemory | None,
    sizes: Iterable[Size],
    limits: Limits,
    *,
    where: str = "the largest wrapper",
) -> str:
    """Return a text: what the LLM needs, what the largest of these wrappers has, and what the client can do.

    ``sizes`` must not be empty.
    """
    sizes = tuple(sizes)
    most_gpus = max(size.gpus for size in sizes)
    if most_gpus < spec.gpus or memory is None:
        return f"it needs {spec.gpus} GPUs, and {where} has {most_gpus}"
    known = [(size.memory_bytes, size) for size in sizes if size.memory_bytes and size.gpus >= spec.gpus]
    each_bytes, largest = max(known, key=lambda each: each[0] * max(1, each[1].gpus))
    if largest.gpus:
        has = f"{largest.gpus} GPU{_s(largest.gpus)} with {shown_bytes(each_bytes)} each"
    else:
        has = f"{shown_bytes(each_bytes)} of main memory, of which {100 * HOST_SHARE:g} % may be used"
        if limits.kv_cache_bytes is not None:
            has += f", {shown_bytes(limits.kv_cache_bytes)} of it for the KV cache"
    return f"{words_of(memory, on_gpus=largest.gpus > 0)}, and {where} has {has}; {advice_for(memory)}"


def words_of(memory: LLMMemory, *, on_gpus: bool) -> str:
    """Return what an LLM needs as text: ``its weights take 15.0 GiB and …``."""
    words = f"its weights take {shown_bytes(memory.weights_bytes)}"
    if memory.kv_reserved_bytes is not None:
        words += f" and its KV cache {shown_bytes(memory.kv_reserved_bytes)} (kv_cache_memory_bytes)"
    elif memory.kv_cache_bytes is not None:
        words += f" and the KV cache of {memory.context_tokens} tokens {shown_bytes(memory.kv_cache_bytes)}"
    if on_gpus and memory.gpus is not None:
        words += f", on {memory.gpus} GPU{_s(memory.gpus)}"
    if on_gpus and memory.gpu_share < 1:
        words += f", which must fit in {100 * memory.gpu_share:g} % of a GPU's memory (gpu_memory_utilization)"
    return words


def why_no_room(need_bytes: int, free_bytes: int, total_bytes: int) -> str:
    """Return a text: the LLM is not started because it needs more main memory than is free on the machine."""
    return (
        f"it needs {shown_bytes(need_bytes)} of main memory, but only {shown_bytes(max(0, free_bytes))} of the "
        f"machine's {shown_bytes(total_bytes)} are free, and a tenth of its memory must stay free"
    )


def advice_for(memory: LLMMemory) -> str:
    """Return advice for a client whose LLM is too large."""
    shorter = "a smaller max_model_len, " if memory.kv_cache_bytes is not None else ""
    return f"ask for {shorter}a smaller dtype, a quantized LLM or a smaller one"


def shown_bytes(size_bytes: int) -> str:
    """Return an amount of memory as text, in GiB or MiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / 2**20:.1f} MiB"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


@lru_cache(maxsize=4096)
def fitting(sizes: frozenset[Size], needs: Needs, gpu_type: str | None) -> frozenset[Size]:
    """Return the sizes that are not draining, are large enough, and have GPUs of this type."""
    return frozenset(
        size for size in sizes if not size.draining and needs.met_by(size) and is_gpu_type(gpu_type, size.gpu_type)
    )


# D20: a GPU type belongs to the measurement
def is_gpu_type(asked: str | None, has: str | None) -> bool:
    """True when GPUs of type ``has`` (Ray's name, e.g. ``H100``) match the type asked for.

    Case, spaces and hyphens are ignored, and a full product name matches too: ``NVIDIA H100 80GB HBM3`` matches
    ``H100``. Memory size and board type are not compared, since Ray does not report them.
    """
    if asked in (ANY_GPU_TYPE, has):
        return True
    return asked is not None and has is not None and _words(has) <= _words(asked)


def _words(gpu_type: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in gpu_type.casefold()).split())
