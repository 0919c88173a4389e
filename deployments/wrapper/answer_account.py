"""Forwards vLLM's answers to the client, reads their token counts, and adds the prompt's energy.

A JSON answer gets a header; so the start of the answer is held back until its body is there. A
stream that reports its usage at the end gets one more field in that chunk. Nothing else is changed
or held back. Only those chunks of a stream that report usage are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import TypeAdapter
from starlette.types import Message, Send

from deployments.energy.prompt_meter import MeteredPrompt, tokens_of
from deployments.tokens import Tokens
from registry.errors import InvalidField
from registry.wire.schemas import PROMPT_HEADER, WARMUP_HEADER
from registry.wire.words import MAX_PROMPT_ID

ENERGY_HEADER = b"x-greenprompt-energy"
ENERGY_FIELD = b"greenprompt"
EVENT_STREAM = b"text/event-stream"

_PROMPT, _WARMUP = PROMPT_HEADER.lower().encode(), WARMUP_HEADER.lower().encode()

_USAGE = b'"usage":{'
"""Matches keys only: inside a JSON string the quotes would be escaped."""
_ID = re.compile(rb'"id":"([\w.-]+)"')
_WHERE_IDS_ARE = 200
_LONGEST_USAGE = 1000
_LAST_CHUNK = b'"choices":[]'
_STREAMED_ERROR = (b'data: {"error":', b"event: error", b"event: response.failed")
"""How vLLM's APIs end a stream when the engine fails; the HTTP status has been sent by then."""
REFUSED = range(400, 500)
_DECODER = json.JSONDecoder()
_BRIEF = TypeAdapter(dict[str, Any])


class AccountedAnswer:
    """Forwards the answer to one prompt and accounts it. Call ``close`` when the app has returned or raised."""

    def __init__(self, prompt: MeteredPrompt, send: Send, *, counts_words: bool, given_up: Callable[[], bool]) -> None:
        """Do nothing yet.

        Args:
            prompt: The prompt's record.
            send: Sends a message to the client.
            counts_words: Whether the words of a JSON answer are counted, for energy per word.
            given_up: Whether the client has hung up or was cut; then the answer is incomplete.
        """
        self._prompt = prompt
        self._counts_words = counts_words
        self._given_up = given_up
        self._send = send
        self._held: Message | None = None
        self._streams = False
        self._usage_piece: bytes | None = None
        self._status: Literal["answered", "failed"] = "failed"
        self._complete = False

    async def send(self, message: Message) -> None:
        """Forward a part of the answer."""
        if message["type"] == "http.response.start":
            content_type = content_type_of(message["headers"])
            if message["status"] in REFUSED:
                self._prompt.refused()
            elif message["status"] == HTTPStatus.OK:
                self._status = "answered"
                if content_type.startswith(b"application/json"):
                    self._held = message  # the energy header needs the token counts in the body
                    return
            self._streams = content_type.startswith(EVENT_STREAM)
            await self._send(message)
            return
        whole = not message.get("more_body", False)
        self._complete = whole and not self._given_up()
        if self._held is not None:
            start, self._held = self._held, None
            await self._send(self._with_header(start, message.get("body", b"")) if whole else start)
        elif self._streams:
            body = message.get("body", b"")
            if body.startswith(_STREAMED_ERROR):
                self._status = "failed"
            elif _USAGE in body:
                message = self._with_field(message)
        await self._send(message)

    def close(self, counted: Tokens | None = None) -> None:
        """Record how the prompt ended, and its tokens unless they are recorded already.

        ``counted``: the tokens counted at the engine's output, for an answer that reports none.
        """
        flight = self._prompt.flight
        if flight.status != "refused":
            flight.status = self._status if self._complete else "cut" if self._given_up() else "failed"
        tokens = None if self._usage_piece is None else _tokens(_usage_in(self._usage_piece))
        tokens = tokens or counted
        if flight.tokens is None and tokens is not None:
            self._prompt.counted(tokens)

    def _with_header(self, start: Message, body: bytes) -> Message:
        usage = _usage_in(body)
        if _tokens(usage) is None:
            return start
        text = None
        if self._counts_words:
            text = _text_of(json.loads(body))
        account = self._account(body, usage, text)
        return {**start, "headers": [*start["headers"], (ENERGY_HEADER, account)]}

    def _with_field(self, message: Message) -> Message:
        body: bytes = message["body"]
        self._usage_piece = body
        end = body.rstrip()
        usage = _usage_in(body)
        if _LAST_CHUNK not in body or not end.endswith(b"}") or _tokens(usage) is None:
            return message
        told = b',"%b":%b}\n\n' % (ENERGY_FIELD, self._account(body, usage, None))
        return {**message, "body": end[:-1] + told}

    def _account(self, body: bytes, usage: Mapping[str, Any], text: str | None) -> bytes:
        named = _ID.search(body, 0, _WHERE_IDS_ARE)
        self._prompt.flight.answer_id = None if named is None else named[1].decode()
        self._prompt.end()
        return _BRIEF.dump_json(self._prompt.brief(usage=usage, answer=text))


def is_warmup(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a prompt's headers (as in ASGI) mark it as a warm-up.

    Raises:
        InvalidField: the header is neither true nor false, or occurs twice with different values.
    """
    values = [value for name, value in headers if name == _WARMUP]
    if any(value not in {b"true", b"false"} for value in values) or len(set(values)) > 1:
        raise InvalidField(WARMUP_HEADER, "needs true or false")
    return b"true" in values


def prompt_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the client's own id of a prompt from its headers (as in ASGI); None without one.

    The header is percent-encoded; the result is decoded.

    Raises:
        InvalidField: the header, as sent, has more than MAX_PROMPT_ID characters.
    """
    value = next((value for name, value in headers if name == _PROMPT), b"")
    if len(value) > MAX_PROMPT_ID:
        raise InvalidField(PROMPT_HEADER, f"needs at most {MAX_PROMPT_ID} characters")
    return unquote(value.decode("ascii", errors="replace")) or None


def content_type_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the content type from an answer's headers (as in ASGI, names in lower case); empty if there is none."""
    return next((value for name, value in headers if name == b"content-type"), b"")


# D37: an answer is read, not rewritten
def _usage_in(body: bytes) -> Mapping[str, Any]:
    """Return the last usage object in a piece of JSON without parsing the rest; empty if there is none."""
    at = body.rfind(_USAGE)
    if at < 0:
        return {}
    begin = at + len(_USAGE) - 1
    try:
        usage, _ = _DECODER.raw_decode(body[begin : begin + _LONGEST_USAGE].decode(errors="replace"))
    except ValueError:
        return {}
    return usage if isinstance(usage, dict) else {}


def _tokens(usage: Mapping[str, Any]) -> Tokens | None:
    try:
        return tokens_of(usage)
    except KeyError:
        return None


def _text_of(answer: Mapping[str, Any]) -> str:
    """Return the text of all choices of a chat or completion, separated by spaces."""
    choices = answer.get("choices", ())
    return " ".join(choice.get("text") or choice.get("message", {}).get("content") or "" for choice in choices)
