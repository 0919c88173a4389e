"""A fake registry with one wrapper, over real HTTP: leases LLMs in order, answers prompts, and fails on command.

It serves the paths of the Prompting Service that a client needs. All bodies are made with `registry.wire.schemas`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

from pydantic import TypeAdapter

from greenprompt_client.client import ENDED
from registry.accounting.window_report import WindowReport, WindowsPage, window_report
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.records import LLMSpec, Request
from registry.wire.lease_token import LEASE_TOKEN
from registry.wire.schemas import (
    AcceptedRequest,
    ErrorAnswer,
    MeasurementState,
    PromptingAnswer,
    PromptingRequest,
    RequestState,
)
from registry.wire.words import WindowKind
from tests.support.energy_windows import iso, record

PAGE = 3
"""Number of windows in a page."""

CREATED = "2026-01-01T00:00:00.000Z"

Reply = tuple[int, dict[str, Any]]


def answer(score: float | None = 0.5, joules: float | None = 2.0, method: str = "measured") -> dict[str, Any]:
    """Return a wrapper's answer to a prompt."""
    return {
        "answer": "because",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15},
        "sci_score": score,
        "sci_method": method,
        "sci_low": None,
        "sci_high": None,
        "unit": "output_token",
        "units": 10,
        "energy": {"total_j": joules},
        "carbon": {"o_g": None, "m_g": None, "grid": None},
        "methods": {},
        "flags": [],
        "final": False,
    }


def error(status: int, code: str, retryable: bool = False) -> Reply:
    """Return an error in the format of registry and wrappers."""
    return status, ErrorAnswer(code=code, message=f"it says {code}", retryable=retryable).model_dump(exclude_none=True)


class HttpRegistry:
    """A context: while it is open, the registry listens on a free port of this machine.

    * ``posted``: bodies of all POSTs; ``kept``: ids of all keep-alives; ``prompted``: (model, question) of all prompts.
    * ``on_prompt`` may answer in place of the LLM, and name the answer's window; ``on_poll`` may change a request
      before its state is returned; ``on_post`` and ``on_release`` may refuse a POST and a release.
    * ``given_back`` is set once a release leaves no open request.
    * ``windows``: the final windows. A prompt's window exists from its answer on, a lease's from its end on.
    * ``on_windows`` may hide or replace windows; ``window`` may change a single one. A page has PAGE windows.
    """

    def __init__(self) -> None:
        self.requests: dict[str, RequestState] = {}
        self.posted: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.kept: list[str] = []
        self.prompted: list[tuple[str, str]] = []
        self.on_post: Callable[[], Reply | None] = lambda: None
        self.on_release: Callable[[], Reply | None] = lambda: None
        self.on_poll: Callable[[RequestState], RequestState] = lambda state: state
        self.on_prompt: Callable[[RequestState, str], Reply | None] = lambda _state, _question: None
        self.windows: list[WindowReport] = []
        self.on_windows: Callable[[list[WindowReport]], list[WindowReport]] = lambda windows: windows
        self.window: Callable[[WindowReport], WindowReport] = lambda window: window
        self.given_back = threading.Event()
        self._lock = threading.Lock()
        self._forgotten = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                self._answered(outer._windows(path, query) if path.endswith("/windows") else outer._get(path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self._answered(outer._post(self.path, body, dict(self.headers)))

            def do_DELETE(self) -> None:
                self._answered(outer._delete(self.path))

            def _answered(self, reply: Reply) -> None:
                status, body = reply
                content = b"" if status == 204 else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                if status != 204:
                    self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                """Ignore errors of a connection: a client may be killed during a call."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.01))
        thread.start()
        self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def open(self) -> list[RequestState]:
        """Return the requests that have not ended."""
        return [state for state in self.requests.values() if state.status not in ENDED]

    def forget(self) -> None:
        """Lose all state, like a registry whose database was lost. Ids are never used twice."""
        self._forgotten += 1000
        self.requests.clear()
        self.windows.clear()

    def end(self, request_id: str, status: str, reason: str | None = None) -> RequestState:
        """End a request, as the registry does by itself."""
        state = self.requests[request_id]
        if state.status == "deployed" and status != "failed":
            self._measured(
                record(self._forgotten + len(self.windows), WindowKind.LEASE, request_id=request_id, joules=90.0)
            )
        self.requests[request_id] = state.model_copy(update={"status": status, "url": None, "reason": reason})
        return self.requests[request_id]

    def _windows(self, path: str, query: str) -> Reply:
        asked = dict(parse_qsl(query))
        with self._lock:
            if not any(str(state.measurementId) == path.split("/")[-2] for state in self.requests.values()):
                return error(404, "unknown_measurement")
            found = self.on_windows([each for each in self.windows if each.requestId == asked.get("request")])
        begin = int(asked.get("after", 0))
        page = WindowsPage(tuple(found[begin : begin + PAGE]), str(begin + PAGE) if len(found) > begin + PAGE else None)
        return 200, TypeAdapter(WindowsPage).dump_python(page, mode="json")

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        if path == "/wrappers/gpu-1-0/process_prompt":
            return self._prompt(json.loads(body)["question"], headers)
        if path.endswith("/keepalive"):
            self.kept.append(path.split("/")[-2])
            return 200, self.requests[self.kept[-1]].model_dump()
        with self._lock:
            self.keys.append(headers.get("Idempotency-Key"))
            refused = self.on_post()
            if refused is not None:
                return refused
            wanted = json.loads(body)
            self.posted.append(wanted)
            wanted = PromptingRequest.model_validate({k: v for k, v in wanted.items() if k != "grade"})
            made = [
                RequestState(
                    requestId=f"r{self._forgotten + len(self.requests) + n}",
                    llmconfig=llm.model_dump(),
                    status="queued",
                    measurementId=wanted.measurementId,
                    address=None,
                    link="",
                    machine="gpu-1",
                    createdAt=CREATED,
                )
                for n, llm in enumerate(wanted.llms)
            ]
            self.requests |= {state.requestId: state for state in made}
            accepted = [
                AcceptedRequest(requestId=each.requestId, llmconfig={}, link="", status="queued") for each in made
            ]
            return 201, PromptingAnswer(requests=accepted).model_dump()

    def _get(self, path: str) -> Reply:
        what, last = path.split("/")[-2:]
        with self._lock:
            if what == "measurements":
                requests = [state for state in self.requests.values() if str(state.measurementId) == last]
                if not requests:
                    return error(404, "unknown_measurement")
                return 200, MeasurementState(
                    measurementId=int(last), machine="gpu-1", flags=[], createdAt=CREATED, requests=requests
                ).model_dump()
            if last not in self.requests:
                return error(404, "unknown_request")
            if self.requests[last].status == "queued" and self.open[0].requestId == last:
                update = {
                    "status": "deployed",
                    "url": f"{self.url}/wrappers/gpu-1-0/{LEASE_TOKEN}{last}",
                    "deployedAt": CREATED,
                }
                self.requests[last] = self.requests[last].model_copy(update=update)
            self.requests[last] = self.on_poll(self.requests[last])
            return 200, self.requests[last].model_dump()

    def _delete(self, path: str) -> Reply:
        with self._lock:
            request_id = path.rpartition("/")[2]
            refused = self.on_release()
            if refused is not None:
                return refused
            status = self.requests[request_id].status
            if status not in ENDED:
                self.end(request_id, "released" if status == "deployed" else "cancelled")
            if not self.open:
                self.given_back.set()
        return 204, {}

    def _measured(self, window: EnergyWindow) -> None:
        state = self.requests[window.request_id or ""]
        request = Request(state.requestId, 7, 1, LLMSpec(state.llmconfig["model"], "text-generation"), "{}")
        told = window_report(KeptWindow(window, state.machine, "default"), request, iso)
        self.windows.append(self.window(replace(told, detail=None)))

    def _prompt(self, question: str, headers: Mapping[str, str]) -> Reply:
        state = self.requests[headers["Authorization"].removeprefix(f"Bearer {LEASE_TOKEN}")]
        if state.status != "deployed":
            return error(410, "lease_ended")
        with self._lock:
            self.prompted.append((state.llmconfig["model"], question))
        reply = self.on_prompt(state, question) or (200, answer())
        with self._lock:
            refused, named = reply[0] != 200, headers.get("X-GreenPrompt-Prompt")
            window = record(
                self._forgotten + len(self.windows),
                request_id=state.requestId,
                joules=20.0,
                units=0 if refused else 10,
                warmup=headers.get("X-GreenPrompt-Warmup") == "true",
                status="refused" if refused else "answered",
                prompt_id=named and unquote(named),
            )
            self._measured(window)
        return reply if refused else (200, {"window": window.window_id} | reply[1])
