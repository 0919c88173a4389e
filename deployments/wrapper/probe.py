"""One real prompt before an LLM is handed over: an LLM that refuses every prompt of a request can't serve it.

It goes the way of ``process_prompt``, with the request's own arguments, since those decide it: whether there is a chat
template, and what sampling the LLM's files ask for. It is asked once for each start of an LLM and set of arguments.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Final
from weakref import WeakKeyDictionary

import structlog
from starlette.types import Message

from deployments.engine.host import RunningLLM
from deployments.wrapper.native_call import call, native_prompt, problem_of
from registry.core.records import canonical_json

log = structlog.get_logger("deployments.wrapper.probe")

QUESTION: Final = "What does a prompt cost the climate?"

PROBE_MAX_S: Final = 30.0
"""Longest wait for the answer, seconds. An LLM that is slower is handed over all the same."""

_GRACE_S: Final = 1.0


class Probe:
    """Probes the LLMs of one wrapper, and remembers what they said."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[RunningLLM, dict[str, str | None]] = WeakKeyDictionary()

    async def refusal(self, running: RunningLLM, llmconfig: str) -> str | None:
        """Return why an LLM that writes text can't serve an llmconfig (JSON); None if it can, or that is not known."""
        path, body = native_prompt(running.served_model_name, json.loads(llmconfig), QUESTION)
        body["max_tokens"] = 1  # the longest that it may generate decides nothing
        body.pop("min_tokens", None)
        known, key = self._known.setdefault(running, {}), canonical_json({"path": path, **body})
        if key not in known:
            answer = await self._ask(running, path, body)
            if answer is None:
                return None
            status, content = answer
            refused = status != HTTPStatus.OK
            known[key] = f"it refuses every prompt of this request: {problem_of(content)}" if refused else None
        return known[key]

    async def _ask(self, running: RunningLLM, path: str, body: dict[str, object]) -> tuple[int, bytes] | None:
        """Return status and body of the answer; None if the LLM has died, is stopped, or does not answer in time."""
        caller = _Caller()
        asking = asyncio.create_task(call(running.asgi, path, body, caller))
        try:
            await asyncio.wait({asking}, timeout=PROBE_MAX_S)
            if running.failed or not asking.done() or asking.exception() is not None:  # the last: it is being stopped
                log.warning("an LLM has not answered its first prompt", model=running.served_model_name)
                return None
            return asking.result()
        finally:
            caller.hang_up()  # without effect on an answer that is there
            if not asking.done():
                await asyncio.wait({asking}, timeout=_GRACE_S)
                asking.cancel()


class _Caller:
    """Asks for as long as it has not hung up."""

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
