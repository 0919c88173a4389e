"""Reads request bodies as strict JSON, for the ingress and the wrappers."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Message, Receive

from registry.errors import InvalidField
from registry.strict_yaml import STRICT_JSON


def read_json(body: bytes) -> Any:
    """Return the value of a body, in any Unicode encoding that JSON allows.

    Raises:
        InvalidField: ``body`` is not JSON (NaN is not JSON either), is nested too deeply, or has a
            key twice in one object. Other parsers silently take the last of the two.
    """
    try:
        return STRICT_JSON.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except UnicodeDecodeError:
        raise InvalidField("body", "is not JSON: it is not text") from None
    except json.JSONDecodeError as error:
        raise InvalidField("body", f"is not JSON: {error}") from None
    except RecursionError:
        raise InvalidField("body", "is nested too deeply") from None
    except ValueError as error:
        raise InvalidField("body", str(error)) from None


def with_body(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that returns this body, already read, at its first call, and then calls ``receive``."""
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return request.pop() if request else await receive()

    return again
