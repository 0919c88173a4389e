"""Sends one real prompt to an LLM before it is handed over, to find out whether it refuses all prompts.

The prompt is sent like one to ``process_prompt``, with the request's own arguments. Whether the LLM
refuses it depends on these arguments, on the chat template (which may be missing), and on the
sampling defaults in the LLM's files. It is sent once per start of an LLM and set of arguments.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final
from weakref import WeakKeyDictionary

import structlog
from starlette.types import Message

from deployments.engine.vllm_api import RunningLLM
from deployments.models.args.mapping import PromptArgs
from deployments.wrapper.native_call import call, native_prompt, problem_of
from registry.background import spawn_awaited
from registry.wire.words import canonical_json

log = structlog.get_logger("deployments.wrapper.probe")

QUESTION: Final = "What does a prompt cost the climate?"

PROBE_MAX_S: Final = 30.0
"""Longest wait for the answer, seconds. A slower LLM is handed over all the same."""

_GRACE_S: Final = 1.0


# D89: one real prompt before the hand-over
class Probe:
    """Probes the LLMs of one wrapper, and remembers the results."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[RunningLLM, dict[str, str | None]] = WeakKeyDictionary()

    async def refusal(self, running: RunningLLM, args: PromptArgs) -> str | None:
        """Return why an LLM can't answer prompts with these arguments; None if it can, or if that is unknown.

        Only for LLMs that write text. Any status except 200 counts as a refusal. A fault of the
        server (5xx) may pass, so it is not remembered: the next hand-over probes again.
        """
        path, body = native_prompt(running.served_model_name, args, QUESTION)
        body["max_tokens"] = 1  # one token is enough: the limit does not decide whether the prompt is refused
        body.pop("min_tokens", None)
        known, key = self._known.setdefault(running, {}), canonical_json({"path": path, **body})
        if key not in known:
            answer = await self._ask(running, path, body)
            if answer is None:
                return None
            status, content = answer
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return f"its first prompt failed with status {status}: {problem_of(content)}"
            refused = status != HTTPStatus.OK
            known[key] = f"it refuses every prompt of this request: {problem_of(content)}" if refused else None
        return known[key]

    async def _ask(self, running: RunningLLM, path: str, body: dict[str, object]) -> tuple[int, bytes] | None:
        """Return the answer's status and body; None if the LLM has died, is being stopped, or is too slow."""
        caller = _Caller()
        asking = spawn_awaited("probe an LLM", call(running.asgi, path, body, caller))
        try:
            await asyncio.wait({asking}, timeout=PROBE_MAX_S)
            if running.failed or not asking.done() or asking.exception() is not None:  # exception: being stopped
                log.warning("an LLM did not answer its first prompt", model=running.served_model_name)
                return None
            return asking.result()
        finally:
            caller.hang_up()  # no effect on a complete answer
            if not asking.done():
                await asyncio.wait({asking}, timeout=_GRACE_S)
                asking.cancel()


class _Caller:
    """A client that waits until `hang_up` is called."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()

    @property
    def given_up(self) -> bool:
        return self._gone.is_set()

    def hang_up(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}
