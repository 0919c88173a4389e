"""vLLM's texts in the words of an llmconfig."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest

from deployments.engine.our_words import ErrorsInOurWords, in_our_words
from registry.errors import RegistryError


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            '"auto" tool choice requires args.deployment.tool_call_parser to be set',
        ),
        (
            "Error: --enable-auto-tool-choice requires tool_parser:'nope' which has not been registered",
            "Error: args.deployment.tool_call_parser requires tool_parser:'nope' which has not been registered",
        ),
        ("increase `--max-model-len`.", "increase args.deployment.max_model_len."),
        ("--max_model_len=7", "args.deployment.max_model_len=7"),
        (
            "You must set `--enable-prompt-embeds` to input `prompt_embeds`.",
            "You must set vLLM's enable_prompt_embeds, which is not for clients, to input `prompt_embeds`.",
        ),
        ("pass --swap-space", "pass --swap-space"),
        ("a--max-model-len ---max-model-len --no-such", "a--max-model-len ---max-model-len --no-such"),
        ("decrease `max_model_len`", "decrease `max_model_len`"),
    ],
)
def test_options_become_words_of_an_llmconfig(theirs: str, ours: str) -> None:
    """An option is named as a client can set it, or as none for clients; everything else stays."""
    assert in_our_words(theirs) == ours


@pytest.mark.parametrize(("status", "told"), [(400, "use args.deployment.max_model_len"), (200, "use --max-model-len")])
async def test_errors_alone_are_changed(status: int, told: str) -> None:
    """An error is passed on whole, with its new length; an answer as it comes, whatever it says."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    errors = ErrorsInOurWords(send, RegistryError())
    parts = [b'{"error": {"message": "use --max-', b'model-len"}}']
    headers = [(b"content-type", b"application/json"), (b"Content-Length", b"%d" % sum(map(len, parts)))]
    await errors.send({"type": "http.response.start", "status": status, "headers": headers})
    for number, part in enumerate(parts):
        await errors.send({"type": "http.response.body", "body": part, "more_body": number == 0})
    start, *rest = sent
    body = b"".join(message["body"] for message in rest)
    assert json.loads(body) == {"error": {"message": told}}
    assert {name.lower(): value for name, value in start["headers"]}[b"content-length"] == b"%d" % len(body)
    assert len(rest) == (1 if status == 400 else 2)


@pytest.mark.parametrize(
    ("status", "body", "is_ours"),
    [
        (404, b'{"detail":"Not Found"}', True),
        (404, b'{"error":{"message":"The model `x` does not exist."}}', False),
        (400, b'{"detail":"Not Found"}', False),
    ],
)
async def test_a_path_that_vllm_does_not_have_is_our_error(status: int, body: bytes, is_ours: bool) -> None:
    """Only FastAPI's own 404 is; nothing of it is sent."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    errors = ErrorsInOurWords(send, RegistryError())
    await errors.send({"type": "http.response.start", "status": status, "headers": []})
    with pytest.raises(RegistryError) if is_ours else nullcontext():
        await errors.send({"type": "http.response.body", "body": body})
    assert bool(sent) is not is_ours
