"""The contract's example of a request, and the ingress that it is sent to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig

COMMIT = "c" * 40
CONFIG = IngressConfig(ModelSources(True, (Path("/llms"),), Path("/")), allow_remote_code=(f"org/codes@{COMMIT}",))
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
REQUEST = "/promptingservice/request"


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
