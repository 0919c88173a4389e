"""Tokens that the engine has given out for a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.token_count import counted, counting_tokens
from deployments.tokens import Tokens

DELTA, CUMULATIVE = (SimpleNamespace(output_kind=SimpleNamespace(name=name)) for name in ("DELTA", "CUMULATIVE"))


class FakeGenerate:
    """Stands in for vLLM's ``generate``: three steps of a prompt of 5 tokens, 2 of them cached."""

    def __init__(self) -> None:
        self.closed = 0

    async def __call__(self, prompt: str, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        given = [[1, 2], [3], [4, 5, 6]]
        try:
            for step in range(3):
                new = given[step] if params is DELTA else [token for piece in given[: step + 1] for token in piece]
                outputs = [SimpleNamespace(index=index, token_ids=new) for index in range(len(prompt))]
                yield SimpleNamespace(
                    request_id=request_id, prompt_token_ids=[0] * 5, num_cached_tokens=2, outputs=outputs
                )
        finally:
            self.closed += 1


@pytest.mark.parametrize("params", [DELTA, CUMULATIVE])
async def test_tokens_are_those_that_were_given_out(params: Any) -> None:
    """Whether vLLM gives out pieces or all so far: two answers of 6 tokens to a prompt of 5 are 5 and 12."""
    with counting_tokens() as count:
        assert count.tokens is None
        pieces = [piece async for piece in counted(FakeGenerate())("ab", params, "r")]
    assert len(pieces) == 3
    assert count.tokens == Tokens(5, 2, 12)


async def test_requests_of_one_prompt_are_added_up() -> None:
    """A client's prompt can be several to the engine, in tasks of their own; those of others are not among them."""
    generate = counted(FakeGenerate())

    async def answer(request_id: str) -> None:
        async for _ in generate("a", DELTA, request_id):
            await asyncio.sleep(0)

    async def prompt(*request_ids: str) -> Tokens | None:
        with counting_tokens() as count:
            async with asyncio.TaskGroup() as tasks:
                for request_id in request_ids:
                    tasks.create_task(answer(request_id))
        return count.tokens

    both, other = await asyncio.gather(prompt("r-1", "r-2"), prompt("r-3"))
    assert (both, other) == (Tokens(10, 4, 12), Tokens(5, 2, 6))


async def test_what_breaks_off_has_what_came_until_then() -> None:
    """A stream that its client leaves after two of three steps has 3 tokens, and vLLM's own generator is closed."""
    fake = FakeGenerate()
    with counting_tokens() as count:
        outputs = counted(fake)("a", DELTA, "r")
        await anext(outputs)
        await anext(outputs)
        await outputs.aclose()
    assert count.tokens == Tokens(5, 2, 3)
    assert fake.closed == 1


async def test_without_a_prompt_nothing_is_counted() -> None:
    """What nobody counts for, as a warm-up, goes through as it is."""
    fake = FakeGenerate()
    assert len([piece async for piece in counted(fake)("a", DELTA, "r")]) == 3
    assert fake.closed == 1
