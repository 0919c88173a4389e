"""Counts the tokens of prompts at the engine's output, for answers that do not report usage.

By default, a stream reports no usage; a stream that breaks off ends before its usage is sent. The
answers are not changed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from deployments.tokens import Tokens

Generate = Callable[..., AsyncGenerator[Any, None]]


# D63: few prompts have unknown tokens
class TokenCount:
    """The tokens so far (prompt, cached, generated) of one client prompt, which can be several engine prompts."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int | None]] = {}
        self._outputs: dict[tuple[str, int], int] = {}

    @property
    def tokens(self) -> Tokens | None:
        """The tokens so far; None before the engine's first output."""
        if not self._prompts:
            return None
        cached = [of_one for _, of_one in self._prompts.values()]
        return Tokens(
            sum(prompt for prompt, _ in self._prompts.values()),
            None if None in cached else sum(of_one for of_one in cached if of_one is not None),
            sum(self._outputs.values()),
        )

    def add(self, output: Any, *, delta: bool) -> None:
        """Add one vLLM ``RequestOutput``; ``delta``: it has only the tokens since the previous one."""
        self._prompts[output.request_id] = len(output.prompt_token_ids or ()), output.num_cached_tokens
        for one in output.outputs:
            key = output.request_id, one.index
            self._outputs[key] = len(one.token_ids) + (self._outputs.get(key, 0) if delta else 0)


_COUNT: ContextVar[TokenCount | None] = ContextVar("token_count", default=None)


@contextmanager
def counting_tokens() -> Iterator[TokenCount]:
    """Count the tokens of the prompt that this block answers, in this task and its child tasks."""
    count = TokenCount()
    token = _COUNT.set(count)
    try:
        yield count
    finally:
        _COUNT.reset(token)


def counted(generate: Generate) -> Generate:
    """Return vLLM's ``AsyncLLM.generate``, wrapped to count tokens where ``counting_tokens`` is active."""

    def generate_counted(prompt: Any, sampling_params: Any, *args: Any, **more: Any) -> AsyncGenerator[Any, None]:
        outputs = generate(prompt, sampling_params, *args, **more)
        count = _COUNT.get()
        if count is None:
            return outputs
        return _counted(outputs, count, delta=sampling_params.output_kind.name == "DELTA")

    return generate_counted


async def _counted(outputs: AsyncGenerator[Any, None], count: TokenCount, *, delta: bool) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):  # vLLM aborts a request when its generator is closed
        async for output in outputs:
            count.add(output, delta=delta)
            yield output
