"""Limits the text of a prompt: the tokenizer reads it in a thread that nothing can stop."""

# D138: texts of prompts have a limit

from __future__ import annotations

from typing import Any, Final

from registry.errors import InvalidField

CHARS_PER_TOKEN: Final = 16
"""Characters per token of the context. Of usual texts a token has 3 to 5, of long runs of spaces more."""

LEAST_CHARS: Final = 1_000_000
"""Limit of an LLM with a short context, characters. A tokenizer reads them in about a second."""

_CONTENT: Final = frozenset(
    {"url", "data", "image_url", "audio_url", "video_url", "input_audio", "image_embeds", "audio_embeds", "file_data"}
)  # fmt: skip
"""Keys whose values are media, which no tokenizer reads; ``models.media_max_mib`` limits them."""


def require_short_text(body: Any, max_model_len: int) -> None:
    """Raise InvalidField if a field of a prompt's body has more text than any prompt for this LLM needs.

    ``max_model_len``: context of the LLM, tokens. vLLM's own limit applies neither to ``/tokenize`` nor to
    ``truncate_prompt_tokens``, and is several times as high for tokenizers that have a token for many spaces.
    """
    limit = max(LEAST_CHARS, CHARS_PER_TOKEN * max_model_len)
    for field, value in body.items() if isinstance(body, dict) else ():
        chars = _chars(value)
        if chars > limit:
            raise InvalidField(field, f"has {chars} characters; at most {limit} are read for this LLM")


def _chars(value: Any) -> int:
    """Count the characters of all texts in a value, without media. Its depth is limited where it was parsed."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_chars(inner) for key, inner in value.items() if key not in _CONTENT)
    if isinstance(value, list):
        return sum(map(_chars, value))
    return 0
