"""Rewrites vLLM's messages for clients: replaces its command-line options with the names in an llmconfig."""

from __future__ import annotations

import re
from http import HTTPStatus

from starlette.types import Message, Send

from deployments.models.args.rules import Mapped
from deployments.models.args.table import DEPLOYMENT
from registry.errors import RegistryError

_OPTION = re.compile(r"`?(?<![\w-])--([a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)`?")
_SAME_AS = {"enable_auto_tool_choice": "tool_call_parser"}
"""Options that are set by an llmconfig argument of another name."""
_OPERATORS = frozenset(
    {"allowed_local_media_path", "enable_prompt_embeds", "trust_request_chat_template", "enable_log_requests"}
)
"""Options that vLLM's messages name and that no llmconfig has."""


def in_our_words(text: str) -> str:
    """Return a vLLM message with command-line options replaced: ``--max-model-len`` is args.deployment.max_model_len.

    An option that clients can't set becomes "vLLM's NAME, which is not for clients". Text that only
    looks like an option is kept.
    """
    said = _OPTION.sub(_word, text)
    return re.sub(r"(args\.deployment\.\w+) and \1", r"\1", said)


def _word(option: re.Match[str]) -> str:
    name = option[1].replace("-", "_")
    name = _SAME_AS.get(name, name)
    rule = DEPLOYMENT.get(name)
    if isinstance(rule, Mapped):
        return f"args.deployment.{name}"
    if rule is not None or name in _OPERATORS:
        return f"vLLM's {name}, which is not for clients,"
    return option[0]


_NO_SUCH_PATH = b'{"detail":"Not Found"}'
"""FastAPI's 404 for a path that vLLM's app does not have, as for embeddings if the LLM writes text."""


class ErrorsInOurWords:
    """Forwards an answer of vLLM's app; an error answer is buffered, and then sent with ``in_our_words``.

    ``no_such_path`` is raised in place of an answer that says that the app does not have the path.
    """

    def __init__(self, send: Send, no_such_path: RegistryError) -> None:
        self._send = send
        self._no_such_path = no_such_path
        self._held: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Forward one part of the answer. Raises ``no_such_path``."""
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._held = message
        elif self._held is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                if self._held["status"] == HTTPStatus.NOT_FOUND and self._body == _NO_SUCH_PATH:
                    raise self._no_such_path
                await self._send_error(self._held)

    async def _send_error(self, start: Message) -> None:
        body = in_our_words(self._body.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
