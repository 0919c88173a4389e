"""docs/reference/http.md: every path, field and answer, from the OpenAPI document of the ingress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from tests.docs.markdown import MADE, cell, code, table, text

_INTRODUCTION = f"""\
# HTTP API

{MADE}
A running registry serves this description as an OpenAPI document (`/openapi.json`).
Answers may have more fields in later releases. Errors are `ErrorAnswer`: [Errors](errors.md).

"""
_WRAPPER = """\
## At the `url` of a lease

These paths are served by the wrapper, below the `url` of a request that is `deployed`.

| path | meaning |
|---|---|
| `GET {url}/get_status` | `{"status", "message", "energy"}`; `message` is `idle`, `not ready`, `ready` or `failure` |
| `POST {url}/process_prompt` | `{"question": "…"}` → `{"answer", "sci_score", …}`, by the llmconfig's args |
| `{url}/v1/…`, `{url}/tokenize` … | vLLM's own API: [OpenAI API of a lease](../how-to/openai-api.md) |

Without the token at its end, `url` serves the same paths to requests with `Authorization: Bearer <token>`:
[Keep the token out of URLs](../how-to/openai-api.md#keep-the-token-out-of-urls).

| header of a prompt | meaning |
|---|---|
| `X-GreenPrompt-Warmup: true` | The prompt is a warm-up: it is left out of the counted stretch. |
| `X-GreenPrompt-Prompt` | The client's own name of the prompt, percent-encoded; the same in every lease. |

"""


async def _never(*_: object, **__: object) -> None:
    raise AssertionError("the document calls nothing")


def document() -> dict[str, Any]:
    """The OpenAPI document of the ingress."""
    config = IngressConfig(ModelSources(True, (), Path("/")), ())
    return build_app(config, _never).openapi()


def http_page() -> str:
    """Return the page."""
    found = document()
    page = _INTRODUCTION + "## Paths\n\n"
    for path, item in found["paths"].items():
        for method, operation in item.items():
            page += _operation(method.upper(), path, operation)
    page += _WRAPPER + "## Bodies\n\n"
    for name, schema in sorted(found["components"]["schemas"].items()):
        page += _schema(name, schema)
    return page.rstrip() + "\n"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    page = f"### `{method} {path}`\n\n{text(operation.get('description'))}\n\n"
    rows = [
        (
            code(each["name"]),
            each["in"],
            _type(each["schema"]),
            _default(each["schema"], each.get("required", False)),
            cell(each.get("description", each["schema"].get("description"))),
        )
        for each in operation.get("parameters", [])
        if each["name"] != "accept"
    ]
    page += table(("parameter", "in", "type", "default", "meaning"), rows) if rows else ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    page += f"Body: {_type(body)}\n\n" if body else ""
    answers = [
        (
            status,
            ", ".join(_type(each["schema"]) for each in answer.get("content", {}).values() if each.get("schema")),
            cell(_told(answer["description"])),
        )
        for status, answer in operation["responses"].items()
    ]
    return page + table(("answer", "body", "meaning"), answers)


def _told(description: str) -> str:
    """FastAPI's own names of a status say nothing."""
    return "" if description in ("Successful Response", "Validation Error") else description


def _schema(name: str, schema: dict[str, Any]) -> str:
    page = f"### {name}\n\n{text(schema.get('description'))}\n\n"
    if "enum" in schema:
        return page + f"One of {_type(schema)}.\n\n"
    required = schema.get("required", [])
    asked = schema.get("additionalProperties") is False
    rows = [
        (code(field), _type(of), _default(of, field in required, asked=asked), cell(of.get("description")))
        for field, of in schema.get("properties", {}).items()
    ]
    return page + (table(("field", "type", "default", "meaning"), rows) if rows else "")


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(code(each) for each in schema["enum"])
    if "const" in schema:
        return code(schema["const"])
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[word]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _default(schema: dict[str, Any], required: bool, *, asked: bool = True) -> str:
    """The default of what a client may send, or of what an answer may lack; "" for what is in every answer."""
    if required:
        return "required" if asked else ""
    return code(json.dumps(schema["default"])) if "default" in schema else "`null`"
