"""The OpenAPI document of the ingress, and what every route with a body refuses."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path

import httpx
import pytest

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from tests.support.fake_registry import FakeRegistry

REGISTRY = FakeRegistry()
CONFIG = IngressConfig(ModelSources(True, (), Path("/")), (), hosts=("testserver",))
APP = build_app(CONFIG, REGISTRY.call)


def test_the_document_is_the_same_on_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 renamed four statuses; the document uses Python's words for none of them."""
    for status in (413, 414, 416, 422):
        monkeypatch.setitem(http.client.responses, status, "another Python's words")
    assert "another Python's words" not in json.dumps(build_app(CONFIG, REGISTRY.call).openapi())


def test_every_path_can_answer_429() -> None:
    """A caller can be above a limit of rates on each of them."""
    operations = [operation for path in APP.openapi()["paths"].values() for operation in path.values()]
    assert len(operations) > 15
    assert [operation["operationId"] for operation in operations if "429" not in operation["responses"]] == []


WITH_A_BODY = [
    (method, re.sub(r"\{[^}]+\}", "1", path))
    for path, item in APP.openapi()["paths"].items()
    for method, operation in item.items()
    if "requestBody" in operation
]
AMBIGUOUS = {
    "a key twice": (b'{"model": 1, "other": 2, "model": 3}', "the key 'model' occurs twice"),
    "a key twice, with the same value": (b'{"model": 1, "model": 1}', "the key 'model' occurs twice"),
    "a key twice, within": (b'{"llms": [{"args": {"top_k": 1, "top_k": 2}}]}', "the key 'top_k' occurs twice"),
    "a key twice, escaped": (b'{"model": 1, "m\\u006fdel": 2}', "the key 'model' occurs twice"),
    "no number": (b'{"measurementId": NaN}', "NaN is not a number in JSON"),
}


def test_there_are_routes_with_a_body() -> None:
    """The document says which routes take a body."""
    assert ("post", "/promptingservice/request") in WITH_A_BODY


@pytest.mark.parametrize(("method", "path"), WITH_A_BODY)
@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain"])
@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_what_can_be_read_in_two_ways_is_refused(
    method: str, path: str, content_type: str | None, name: str
) -> None:
    """Every route with a body refuses a key that occurs twice, at any depth, and names it; nothing is asked for."""
    body, told = AMBIGUOUS[name]
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=APP), base_url="http://127.0.0.1") as http:
        answer = await http.request(method, path, content=body, headers=headers)
    if content_type != "application/json" and not path.startswith("/promptingservice/"):
        assert answer.status_code == 415  # only the Prompting Service's client may name another type, or none
        return
    assert answer.status_code == 422
    assert (answer.json()["field"], answer.json()["message"]) == ("body", f"body: {told}")
    assert answer.json()["detail"][0]["loc"] == ["body"]
