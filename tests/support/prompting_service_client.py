"""A copy of the behaviour of the Prompting Service's own client, written from its public repository.

It sends JSON as text, without a Content-Type, and builds the URL of a prompt only from ``address``.
"""

from __future__ import annotations

import json
from typing import Any

import requests

TIMEOUT_S = 60


def prompt_url(address: str, path: str = "process_prompt", port: int = 8000) -> str:
    """Return the URL that the client builds. The real client always uses port 8000; tests may need another port."""
    return "http://" + address + f":{port}/{path}"


class PromptingServiceClient:
    """The client of one registry."""

    def __init__(self, url: str, *, port: int = 8000) -> None:
        self._url = url
        self._port = port

    def request(self, measurement_id: int, llms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        text = json.dumps({"measurementId": measurement_id, "llms": llms})
        answer = requests.post(f"{self._url}/promptingservice/request", data=text, timeout=TIMEOUT_S)
        assert answer.status_code == 201, answer.text
        accepted: list[dict[str, Any]] = answer.json()["requests"]
        return accepted

    def status(self, request_id: str) -> dict[str, Any]:
        answer = requests.get(f"{self._url}/promptingservice/request/{request_id}", timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        state: dict[str, Any] = answer.json()
        return state

    def wrapper_status(self, address: str) -> requests.Response:
        return requests.get(prompt_url(address, "get_status", self._port), timeout=TIMEOUT_S)

    def prompt(self, address: str, question: str) -> requests.Response:
        text = json.dumps({"question": question})
        return requests.post(prompt_url(address, port=self._port), data=text, timeout=TIMEOUT_S)

    def release(self, request_id: str) -> int:
        return requests.delete(f"{self._url}/promptingservice/request/{request_id}", timeout=TIMEOUT_S).status_code
