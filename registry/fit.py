"""What an LLM needs against what a wrapper has: GPUs, their type, memory. Pure.

Needs are the least that is known for certain, and sizes the most, so that nothing is refused which might run; the
wrapper, which knows the figures to the byte, has the last word before it starts an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple

from registry.state import Limits, LLMMemory, LLMSpec

GIB: Final = 2**30

ANY_GPU_TYPE: Final = "*"
"""Stands for "no matter which" where a GPU type is named; None is a type of its own (not known, or no GPU)."""

_NOWHERE_GIB: Final = 2**40
"""More memory than there is anywhere."""


class Size(NamedTuple):
    """What a wrapper has. Wrappers of one size are alike to every choice, so there had better be few sizes.

    ``gib`` is the memory of each GPU, or without GPU its share of main memory, in GiB rounded up; None: not known.
    ``draining``: its machine is handed to nobody.
    """

    gpus: int
    gpu_type: str | None = None
    gib: int | None = None
    draining: bool = False


class Needs(NamedTuple):
    """What a wrapper must have at least; 0 is no condition.

    ``gib_per_gpu`` on each GPU, ``gpu_gib`` on all GPUs together, ``main_gib`` of main memory where it has no GPU.
    """

    gpus: int = 0
    gib_per_gpu: int = 0
    gpu_gib: int = 0
    main_gib: int = 0

    def met_by(self, size: Size) -> bool:
        """True unless it is certain that a wrapper of this size is too small."""
        if size.gpus < self.gpus:
            return False
        if size.gib is None:
            return True
        if size.gpus == 0:
            return size.gib >= self.main_gib
        return size.gib >= self.gib_per_gpu and size.gpus * size.gib >= self.gpu_gib

    def joined_with(self, other: Needs) -> Needs:
        """What a wrapper must have that is to run both, one after the other."""
        return Needs(*map(max, self, other))


def needs_of(spec: LLMSpec, memory: LLMMemory | None, limits: Limits) -> Needs:
    """What an LLM needs, as far as it is known."""
    if memory is None:
        return Needs(spec.gpus)
    kv_cache_bytes = memory.kv_cache_bytes or 0
    gpu_gib = int((memory.weights_bytes + kv_cache_bytes) / memory.gpu_share) // GIB
    main_gib = (memory.weights_bytes + kv_cache_bytes) // GIB
    if limits.kv_cache_bytes is not None and kv_cache_bytes > limits.kv_cache_bytes:
        main_gib = _NOWHERE_GIB
    if memory.gpus is None:
        return Needs(spec.gpus, gpu_gib=gpu_gib, main_gib=main_gib)
    return Needs(spec.gpus, gib_per_gpu=gpu_gib // memory.gpus, main_gib=main_gib)


def why_too_large(
    spec: LLMSpec,
    memory: LLMMemory | None,
    sizes: Iterable[Size],
    limits: Limits,
    *,
    where: str = "the largest wrapper",
) -> str:
    """The figures, in words: what the LLM needs, what the largest of these wrappers has, and what can be done."""
    sizes = tuple(sizes)
    most_gpus = max(size.gpus for size in sizes)
    if most_gpus < spec.gpus or memory is None:
        return f"it needs {spec.gpus} GPUs, and {where} has {most_gpus}"
    known = [(max(1, size.gpus) * size.gib, size) for size in sizes if size.gib and size.gpus >= spec.gpus]
    _, largest = max(known, key=lambda each: each[0])
    if largest.gpus:
        has = f"{largest.gpus} GPU{_s(largest.gpus)} with {largest.gib} GiB each"
    else:
        has = f"{largest.gib} GiB of main memory"
        if limits.kv_cache_bytes is not None:
            has += f", {shown_bytes(limits.kv_cache_bytes)} of it for the KV cache"
    return f"{words_of(memory, on_gpus=largest.gpus > 0)}, and {where} has {has}; {advice_for(memory)}"


def words_of(memory: LLMMemory, *, on_gpus: bool) -> str:
    """What an LLM needs, for people: ``its weights take 15.0 GiB and …``."""
    words = f"its weights take {shown_bytes(memory.weights_bytes)}"
    if memory.kv_cache_bytes is not None:
        words += f" and the KV cache of {memory.context_tokens} tokens {shown_bytes(memory.kv_cache_bytes)}"
    if on_gpus and memory.gpus is not None:
        words += f", on {memory.gpus} GPU{_s(memory.gpus)}"
    if on_gpus and memory.gpu_share < 1:
        words += f", which must fit in {100 * memory.gpu_share:g} % of a GPU's memory (gpu_memory_utilization)"
    return words


def advice_for(memory: LLMMemory) -> str:
    """What a client can do about an LLM that is too large."""
    shorter = "a smaller max_model_len, " if memory.kv_cache_bytes is not None else ""
    return f"ask for {shorter}a smaller dtype, a quantized LLM or a smaller one"


def shown_bytes(size_bytes: int) -> str:
    """An amount of memory for people."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / 2**20:.1f} MiB"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


@lru_cache(maxsize=4096)
def fitting(sizes: frozenset[Size], needs: Needs, gpu_type: str | None) -> frozenset[Size]:
    """Those sizes of wrappers that may be handed out, are large enough, and have GPUs of this type."""
    return frozenset(
        size for size in sizes if not size.draining and needs.met_by(size) and is_gpu_type(gpu_type, size.gpu_type)
    )


def is_gpu_type(asked: str | None, has: str | None) -> bool:
    """True when GPUs of type ``has`` (as Ray calls them: ``H100``) are what was asked for.

    Case, spaces and hyphens don't matter, and a product's full name will do: ``NVIDIA H100 80GB HBM3`` asks for
    ``H100``. Ray knows no more than that: memory and form of the board are not told apart.
    """
    if asked in (ANY_GPU_TYPE, has):
        return True
    return asked is not None and has is not None and _words(has) <= _words(asked)


def _words(gpu_type: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in gpu_type.casefold()).split())
