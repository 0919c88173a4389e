"""What an LLM needs against what a wrapper has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.decision import Limits
from registry.core.fit import (
    ANY_GPU_TYPE,
    ENGINE_BYTES,
    GIB,
    Needs,
    Size,
    fitting,
    host_bytes,
    is_gpu_type,
    needs_of,
    shown_bytes,
    why_no_room,
    why_too_large,
)
from registry.core.records import LLMMemory, LLMSpec

H100 = Size(1, "H100", 80 * GIB)
FOUR_L4 = Size(4, "L4", 24 * GIB)
MAIN = Size(0, None, 64 * GIB)


def spec(gpus: int = 0) -> LLMSpec:
    return LLMSpec("org/llm", "text-generation", gpus=gpus)


def main(gib: float) -> int:
    """Main memory that weights and KV cache of so many GiB need: with the engine's processes, and a tenth free."""
    return int((gib * GIB + ENGINE_BYTES) / 0.9)


def memory(gib: float, kv_gib: float | None = None, *, share: float = 1.0, gpus: int | None = None) -> LLMMemory:
    kv_cache_bytes = None if kv_gib is None else int(kv_gib * GIB)
    return LLMMemory(int(gib * GIB), kv_cache_bytes, 4096 if kv_gib is not None else None, share, gpus)


@pytest.mark.parametrize(
    ("needs", "met_by"),
    [
        (Needs(), {H100, FOUR_L4, MAIN}),
        (Needs(gpus=2), {FOUR_L4}),
        (Needs(bytes_per_gpu=24 * GIB), {H100, FOUR_L4, MAIN}),
        (Needs(bytes_per_gpu=24 * GIB + 1), {H100, MAIN}),
        (Needs(gpu_bytes=96 * GIB), {FOUR_L4, MAIN}),
        (Needs(gpu_bytes=96 * GIB + 1), {MAIN}),
        (Needs(main_bytes=64 * GIB), {H100, FOUR_L4, MAIN}),
        (Needs(main_bytes=64 * GIB + 1), {H100, FOUR_L4}),
    ],
)
def test_each_need_is_held_against_what_it_is_of(needs: Needs, met_by: set[Size]) -> None:
    """GPUs by their number, memory of each GPU, of all of them, and main memory where there is no GPU."""
    assert {size for size in (H100, FOUR_L4, MAIN) if needs.met_by(size)} == met_by


def test_memory_that_is_not_known_rules_nothing_out() -> None:
    """Not known is not none: the wrapper itself finds out."""
    needs = Needs(1, bytes_per_gpu=1000 * GIB, gpu_bytes=1000 * GIB, main_bytes=1000 * GIB)
    assert needs.met_by(Size(1, "H100", None))
    assert not needs.met_by(Size(0, None, None))


@given(
    st.builds(Needs, *[st.integers(0, 200)] * 4),
    st.builds(Needs, *[st.integers(0, 200)] * 4),
    st.builds(Size, st.integers(0, 8), st.none(), st.none() | st.integers(0, 100)),
)
def test_what_meets_the_needs_of_two_is_what_meets_those_of_each(one: Needs, other: Needs, size: Size) -> None:
    """A measurement runs on one machine: that has to do for all of its LLMs."""
    assert one.joined_with(other).met_by(size) == (one.met_by(size) and other.met_by(size))


@pytest.mark.parametrize(
    ("takes", "needs"),
    [
        (None, Needs()),
        (memory(10), Needs(gpu_bytes=10 * GIB, main_bytes=main(10))),
        (memory(10, 2), Needs(gpu_bytes=12 * GIB, main_bytes=main(12))),
        (memory(10, 2, share=0.5), Needs(gpu_bytes=24 * GIB, main_bytes=main(12))),
        (memory(10, 2, gpus=4), Needs(bytes_per_gpu=3 * GIB, main_bytes=main(12))),
        (replace(memory(10), kv_reserved_bytes=3 * GIB), Needs(gpu_bytes=13 * GIB, main_bytes=main(13))),
    ],
)
def test_needs_are_the_least_that_is_certain(takes: LLMMemory | None, needs: Needs) -> None:
    """Weights and KV cache in the share of a GPU that may be used, to the byte; nothing if not known.

    In main memory the engine's processes come on top, and a tenth of it stays free.
    """
    assert needs_of(spec(), takes, Limits()) == needs


def test_gpus_are_needed_whatever_else_is_known() -> None:
    """An LLM that is spread over GPUs needs those."""
    assert needs_of(spec(2), None, Limits()) == Needs(2)
    needs = Needs(2, bytes_per_gpu=5 * GIB, main_bytes=main(10))
    assert needs_of(spec(2), memory(10, gpus=2), Limits()) == needs


def test_an_llm_larger_than_the_machine_fits_on_none_of_it() -> None:
    """24.5 GiB of weights on a machine of 23.5 GiB: both are 24 when rounded."""
    needs = needs_of(spec(), memory(24.5), Limits())
    assert not needs.met_by(Size(0, None, int(23.5 * GIB)))
    assert not needs.met_by(Size(0, None, int(24.6 * GIB)))  # nor where weights alone would fill it
    assert needs.met_by(Size(0, None, int(24.75 * GIB / 0.9) + 1))  # with 0.25 for its processes, a tenth free


def test_the_kv_cache_counts_as_it_is_reserved() -> None:
    """A context of 1 GiB in a reserved cache of 4 GiB takes 4: it fills up. Without a cache that is known: none."""
    limits = Limits(kv_cache_bytes=4 * GIB)
    assert needs_of(spec(), memory(10, 1), limits).main_bytes == main(14)
    assert needs_of(spec(), memory(10), limits).main_bytes == main(10)
    assert needs_of(spec(), replace(memory(10), kv_reserved_bytes=6 * GIB), limits).main_bytes == main(16)
    assert host_bytes(None, limits) == ENGINE_BYTES


def test_who_uses_the_memory_now_is_no_secret() -> None:
    """A start that is put off tells what it needs and what there is; less than nothing is not told."""
    assert why_no_room(3 * GIB, 2 * GIB, 24 * GIB) == (
        "it needs 3.0 GiB of main memory, but only 2.0 GiB of the machine's 24.0 GiB are free, and a tenth of its"
        " memory must stay free"
    )


@pytest.mark.parametrize(("kv_gib", "fits"), [(None, True), (4, True), (4.1, False)])
def test_the_kv_cache_without_gpu_is_as_large_as_configured(kv_gib: float | None, fits: bool) -> None:
    """A context that needs more than ``kv_cache_gib`` runs on no wrapper without GPU, however much memory it has."""
    needs = needs_of(spec(), memory(1, kv_gib), Limits(kv_cache_bytes=4 * GIB))
    assert needs.met_by(Size(0, None, 10_000 * GIB)) is fits
    assert needs.met_by(H100)


def test_a_refusal_tells_the_figures() -> None:
    """What the weights and the KV cache take, where, what there is at most, and what can be done."""
    why = why_too_large(spec(), memory(140, 8, share=0.92), [H100, FOUR_L4, MAIN], Limits())
    assert why == (
        "its weights take 140.0 GiB and the KV cache of 4096 tokens 8.0 GiB, which must fit in 92 % of a GPU's memory"
        " (gpu_memory_utilization), and the largest wrapper has 4 GPUs with 24.0 GiB each; ask for a smaller"
        " max_model_len, a smaller dtype, a quantized LLM or a smaller one"
    )


def test_a_refusal_tells_the_kv_cache_as_it_was_asked_for() -> None:
    """A KV cache whose bytes the request sets is told with the argument that sets them."""
    asked = replace(memory(140), kv_reserved_bytes=8 * GIB)
    why = why_too_large(spec(), asked, [MAIN], Limits())
    assert why.startswith("its weights take 140.0 GiB and its KV cache 8.0 GiB (kv_cache_memory_bytes), and")


def test_a_refusal_counts_only_wrappers_with_the_gpus_that_are_asked_for() -> None:
    """An LLM for one GPU is told of one GPU; without a KV cache that is known, there is none to make smaller."""
    why = why_too_large(spec(1), memory(140, gpus=1), [Size(2, "T4", None), H100, MAIN], Limits())
    assert why == (
        "its weights take 140.0 GiB, on 1 GPU, and the largest wrapper has 1 GPU with 80.0 GiB each; ask for a smaller"
        " dtype, a quantized LLM or a smaller one"
    )
    assert why_too_large(spec(8), memory(1), [H100, FOUR_L4], Limits()) == (
        "it needs 8 GPUs, and the largest wrapper has 4"
    )


@pytest.mark.parametrize(("kv_cache_bytes", "has"), [(None, ""), (GIB, ", 1.0 GiB of it for the KV cache")])
def test_a_refusal_without_gpu_tells_of_main_memory(kv_cache_bytes: int | None, has: str) -> None:
    """No share of a GPU is spoken of where there is none; the configured KV cache is, where it is the limit."""
    why = why_too_large(spec(), memory(140, 8, share=0.92, gpus=1), [MAIN], Limits(kv_cache_bytes=kv_cache_bytes))
    assert why.startswith(
        "its weights take 140.0 GiB and the KV cache of 4096 tokens 8.0 GiB,"
        f" and the largest wrapper has 64.0 GiB of main memory, of which 90 % may be used{has}; ask for"
    )


def test_small_amounts_are_shown_in_smaller_units() -> None:
    """A tiny LLM does not take 0.0 GiB."""
    assert (shown_bytes(300_000), shown_bytes(GIB)) == ("0.3 MiB", "1.0 GiB")


@pytest.mark.parametrize(
    ("asked", "has", "same"),
    [
        ("H100", "H100", True),
        ("h100", "H100", True),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("rtx pro 6000", "RTX-PRO-6000", True),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090", True),
        ("H100", "H200", False),
        ("H20", "H200", False),
        ("L40S", "L4", False),
        ("RTX 6000", "RTX-PRO-6000", False),
        ("H100", None, False),
        (None, None, True),
        (None, "H100", False),
        (ANY_GPU_TYPE, "H100", True),
        (ANY_GPU_TYPE, None, True),
    ],
)
def test_gpu_types_are_compared_as_people_write_them(asked: str | None, has: str | None, same: bool) -> None:
    """Case, hyphens and the rest of a product's name make no difference; another number does."""
    assert is_gpu_type(asked, has) is same


def test_fitting_sizes_have_what_is_needed_and_what_is_asked_for() -> None:
    """Neither a large wrapper with other GPUs will do, nor a small one with the right ones."""
    sizes = frozenset({H100, FOUR_L4, MAIN})
    assert fitting(sizes, Needs(gpu_bytes=90 * GIB), ANY_GPU_TYPE) == {FOUR_L4, MAIN}
    assert fitting(sizes, Needs(gpu_bytes=90 * GIB), "L4") == {FOUR_L4}
    assert fitting(sizes, Needs(gpu_bytes=90 * GIB), "H100") == frozenset()
