"""The contract's example of a request."""

from __future__ import annotations

import copy
from typing import Any

LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "uses_chat_template": True,
    "args": {
        "prompting": {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
        "deployment": {"torch_dtype": "torch.bfloat16", "device_map": "auto"},
    },
}
BODY: dict[str, Any] = {"measurementId": 1234, "llms": [LLM]}


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The contract's example with another value at one place; Ellipsis takes the place out."""
    body = copy.deepcopy(BODY)
    at: Any = body
    for step in path[:-1]:
        at = at[step]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return body
