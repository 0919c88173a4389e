"""The Python client against a registry that is a script."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import stamina
from pydantic import TypeAdapter

from greenprompt_client import client as client_module
from greenprompt_client.answers import AnswerError, RequestEnded, checked, when_to_call_again
from greenprompt_client.client import RegistryClient
from greenprompt_client.held_lease import RETRY_FOR_S, HeldLease
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport
from registry.errors import BadSettings
from registry.wire.schemas import MAX_WAIT_S, PROMPT_HEADER, WARMUP_HEADER, RequestState
from tests.support.energy_windows import an_experiment
from tests.support.fake_counters import ManualClock

STATE: dict[str, Any] = {
    "requestId": "r1",
    "llmconfig": {"model": "m"},
    "status": "queued",
    "measurementId": 1,
    "address": None,
    "link": "http://x/r1",
    "createdAt": "2026-01-01T00:00:00.000Z",
}
DEPLOYED = {
    **STATE,
    "status": "deployed",
    "url": "http://x/wrappers/a-0/token",
    "address": "lease:token@x",
}
BUSY = {"code": "registry_unavailable", "message": "try again", "retryable": True}

Reply = dict[str, Any] | httpx.Response | BaseException


class Script:
    """Answers each request with the next of its replies: a JSON body, a response, or an exception."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply if isinstance(reply, httpx.Response) else httpx.Response(200, json=reply)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]


@pytest.fixture
def registry() -> Iterator[Callable[..., tuple[RegistryClient, Script]]]:
    """Makes a client and the script that answers it; at the end every reply must have been asked for."""
    made: list[tuple[RegistryClient, Script]] = []

    def make(
        *replies: Reply, base_url: str = "http://registry:8000", connect_for_s: float = RETRY_FOR_S
    ) -> tuple[RegistryClient, Script]:
        script, client = Script(*replies), RegistryClient(base_url, connect_for_s=connect_for_s)
        client._http.close()
        client._prompts.close()
        client._http = httpx.Client(base_url=client._http.base_url, transport=httpx.MockTransport(script))
        client._prompts = client._http
        made.append((client, script))
        return client, script

    with stamina.set_testing(True, attempts=4):
        yield make
    for client, script in made:
        client.close()
        assert script.replies == []


Make = Callable[..., tuple[RegistryClient, Script]]


# --- request -----------------------------------------------------------------------------------------------


def test_request_gives_ids_in_order(registry: Make) -> None:
    """A request sends the contract's body and gives the ids in the order of the LLMs."""
    accepted = [{"requestId": f"r{n}", "llmconfig": {}, "link": "", "status": "queued"} for n in (2, 1)]
    client, script = registry(httpx.Response(201, json={"requests": accepted}))
    assert client.request(7, [{"model": "a"}, {"model": "b"}]) == ["r2", "r1"]
    assert script.asked == ["POST /promptingservice/request"]
    assert json.loads(script.requests[0].content) == {"measurementId": 7, "llms": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize("odd", ["a/b", "a?b=c", "a#b", "ä b"])
def test_odd_ids_stay_one_part_of_the_path(registry: Make, odd: str) -> None:
    """Whatever is given for an id, no other path than that of a request with this id is called."""
    client, script = registry(httpx.Response(204))
    client.release(odd)
    (request,) = script.requests
    assert request.url.raw_path.decode() == f"/promptingservice/request/{quote(odd, safe='')}"


def test_each_request_has_a_key_of_its_own(registry: Make) -> None:
    """Every POST has an Idempotency-Key, the same when it is repeated and another one for another request."""
    accepted = httpx.Response(201, json={"requests": []})
    client, script = registry(httpx.Response(503, json=BUSY), accepted, accepted)
    client.request(7, [{}])
    client.request(7, [{}])
    first, again, second = (request.headers["idempotency-key"] for request in script.requests)
    assert first == again != second


def test_idempotency_key_is_sent(registry: Make) -> None:
    """A key goes along as the header."""
    client, script = registry(httpx.Response(201, json={"requests": []}))
    client.request(7, [{}], idempotency_key="key-1")
    assert script.requests[0].headers["idempotency-key"] == "key-1"


def test_budgets_are_sent_if_there_are_any(registry: Make) -> None:
    """What each lease may use goes along in the contract's words; without it the fields are left out."""
    answer = httpx.Response(201, json={"requests": []})
    client, script = registry(answer, answer)
    client.request(7, [{}], max_joules=5.0, max_gco2eq=0.5)
    client.request(7, [{}])
    with_budgets, without = (json.loads(request.content) for request in script.requests)
    assert (with_budgets["maxJoules"], with_budgets["maxGco2eq"]) == (5.0, 0.5)
    assert without == {"measurementId": 7, "llms": [{}]}


def test_windows_are_read_page_by_page(registry: Make) -> None:
    """All pages, one after another; each is asked again while the registry restarts."""
    told = [TypeAdapter(WindowReport).dump_python(each, mode="json") for each in an_experiment().windows[:3]]
    busy = httpx.Response(503, json=BUSY)
    pages = {"windows": told[:2], "next": "2.5_p-1"}, {"windows": told[2:], "next": None}
    client, script = registry(pages[0], busy, pages[1])
    assert [each.window for each in client.windows(7, request_id="r-1")] == [each["window"] for each in told]
    first, _, second = script.asked
    assert first == "GET /measurements/7/windows?limit=1000&request=r-1"
    assert second == "GET /measurements/7/windows?limit=1000&request=r-1&after=2.5_p-1"


def test_a_prompt_says_its_name_and_whether_it_is_a_warm_up(registry: Make) -> None:
    """Both go along as headers, the name in any script; neither does where nothing is said."""
    client, script = registry({"answer": "x"}, {"answer": "x"})
    lease = HeldLease(RequestState.model_validate(DEPLOYED), "http://x/wrappers/a-0/token", client._http)
    lease.prompt("Why?", prompt_id="ä 1", warmup=True)
    lease.prompt("Why?")
    headers = [(each.headers.get(WARMUP_HEADER), each.headers.get(PROMPT_HEADER)) for each in script.requests]
    assert headers == [("true", "%C3%A4%201"), (None, None)]


TOKEN = "lease_0123456789"


def test_the_bytes_of_a_prompt_have_the_token_in_one_header() -> None:
    """The first line of a request, which proxies log, has no token; the key of the registry is nowhere."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"answer": "x"}'
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        base_url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> bytes:
            taken, _ = server.accept()
            with taken:
                sent = taken.recv(65536)
                while b'"Why?"' not in sent:
                    sent += taken.recv(65536)
                taken.sendall(answer)
            return sent

        served = pool.submit(serve)
        with RegistryClient(base_url, api_key="gp_0a1b2c3d_secret") as client:
            url = f"{base_url}/wrappers/a-0/{TOKEN}"
            lease = HeldLease(RequestState.model_validate(DEPLOYED), url, client._prompts)
            assert lease.prompt("Why?") == {"answer": "x"}
        head, _, body = served.result(10).partition(b"\r\n\r\n")
    first, *headers = head.decode().split("\r\n")
    assert first == "POST /wrappers/a-0/process_prompt HTTP/1.1"
    assert [each for each in headers if "lease_" in each] == [f"Authorization: Bearer {TOKEN}"]
    assert b"secret" not in head + body
    assert b"lease_" not in body


@pytest.mark.parametrize(
    ("url", "base_url", "token"),
    [
        (f"https://x/p/wrappers/a-0/{TOKEN}", "https://x/p/wrappers/a-0", TOKEN),
        ("http://x/wrappers/a-0/token", "http://x/wrappers/a-0/token", None),
    ],
    ids=["today", "older registry"],
)
def test_a_lease_has_its_base_url_and_token(registry: Make, url: str, base_url: str, token: str | None) -> None:
    """The token is split from the url where the wrapper knows the header, and the prompt goes to what is left."""
    client, script = registry({"answer": "x"})
    lease = HeldLease(RequestState.model_validate(DEPLOYED), url, client._prompts)
    assert (lease.base_url, lease.token, lease.url) == (base_url, token, url)
    lease.prompt("Why?")
    (request,) = script.requests
    assert str(request.url) == f"{base_url}/process_prompt"
    assert request.headers.get("authorization") == (None if token is None else f"Bearer {token}")


def test_report(registry: Make) -> None:
    """A report comes as the registry made it, without windows; of an unknown measurement the registry's error."""
    body = TypeAdapter(MeasurementReport).dump_python(an_experiment(), mode="json", exclude={"windows"})
    client, script = registry(body, httpx.Response(404, json={**BUSY, "code": "unknown_measurement"}))
    assert client.report(7) == replace(an_experiment(), windows=())
    assert script.asked == ["GET /measurements/7/report"]
    with pytest.raises(AnswerError, match="unknown_measurement"):
        client.report(8)


def test_gpu_type_is_sent_when_it_matters(registry: Make) -> None:
    """A measurement that needs certain GPUs says so; one that does not sends no such field."""
    client, script = registry(*[httpx.Response(201, json={"requests": []})] * 2)
    client.request(7, [{}], gpu_type="H100")
    client.request(8, [{}])
    assert json.loads(script.requests[0].content)["gpuType"] == "H100"
    assert "gpuType" not in json.loads(script.requests[1].content)


def test_grade_and_like_are_sent_when_wanted(registry: Make) -> None:
    """Who repeats a measurement says which; who does not care sends nothing of it."""
    client, script = registry(*[httpx.Response(201, json={"requests": []})] * 2)
    client.request(7, [{}], grade="measurement", like="r1")
    client.request(8, [{}])
    sent, plain = (json.loads(request.content) for request in script.requests)
    assert (sent["grade"], sent["like"]) == ("measurement", "r1")
    assert plain.keys() == {"measurementId", "llms"}


def test_request_that_is_refused_is_not_repeated(registry: Make) -> None:
    """A POST that can't succeed later is sent once; its error is the registry's."""
    refused = {"code": "llm_never_fits", "message": "too large", "retryable": False}
    client, script = registry(httpx.Response(422, json=refused))
    with pytest.raises(AnswerError, match="too large"):
        client.request(7, [{}])
    assert len(script.requests) == 1


def test_what_was_interrupted_is_repeated(registry: Make) -> None:
    """A call whose server ended in the middle (502) is sent again, with the same key; one that took too long is not."""
    cut = httpx.Response(502, json={"code": "interrupted", "message": "it ended", "retryable": True})
    late = httpx.Response(504, json={"code": "gateway_timeout", "message": "too long", "retryable": True})
    accepted = httpx.Response(201, json={"requests": []})
    client, script = registry(cut, accepted, cut, STATE, late)
    client.request(7, [{}])
    assert client.status("r1").status == "queued"
    with pytest.raises(AnswerError, match="too long"):
        client.status("r1")
    assert len({request.headers["idempotency-key"] for request in script.requests[:2]}) == 1


def test_request_with_a_key_is_repeated(registry: Make) -> None:
    """With a key the registry knows a POST that it has seen: it is sent again, the very same, until it is answered."""
    full = {"code": "queue_full", "message": "later", "retryable": True}
    accepted = {"requests": [{"requestId": "r1", "llmconfig": {}, "link": "", "status": "queued"}]}
    client, script = registry(
        httpx.ConnectError("refused"), httpx.Response(429, json=full), httpx.Response(201, json=accepted)
    )
    assert client.request(7, [{"model": "a"}], grade="measurement", idempotency_key="key-1") == ["r1"]
    assert len({(request.content, request.headers["idempotency-key"]) for request in script.requests}) == 1
    assert json.loads(script.requests[0].content)["grade"] == "measurement"


def test_refusal_tells_what_is_wrong(registry: Make) -> None:
    """An error of the registry comes with its status, code and sentence."""
    error = {"code": "invalid_field", "message": "llms[0].model: no", "retryable": False, "field": "llms[0].model"}
    client, _ = registry(httpx.Response(422, json=error))
    with pytest.raises(AnswerError) as caught:
        client.request(7, [{}])
    assert (caught.value.status, caught.value.answer_code) == (422, "invalid_field")
    assert str(caught.value) == "llms[0].model: no (HTTP 422, invalid_field)"


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (httpx.Response(502, text="<html>Bad\nGateway"), "<html>Bad"),
        (httpx.Response(502, text=""), "Bad Gateway"),
        (httpx.Response(404, json={"detail": "x"}), '{"detail":"x"}'),
    ],
)
def test_strangers_errors_are_told_too(registry: Make, response: httpx.Response, text: str) -> None:
    """An error that is not the registry's (a proxy's page) is told by its status and first line."""
    client, _ = registry(response)
    with pytest.raises(AnswerError) as caught:
        client.get("/machines")
    assert (caught.value.answer_code, caught.value.message) == ("unexpected_answer", text)


# --- status and release ------------------------------------------------------------------------------------


def test_status(registry: Make) -> None:
    """A status is asked for once, without a wait unless there is one; a wait is never longer than is allowed."""
    client, script = registry(STATE, STATE, STATE)
    assert client.status("r1").status == "queued"
    client.status("r1", wait_s=2.5)
    client.status("r1", wait_s=1000, seen="deployed")
    path = "GET /promptingservice/request/r1"
    assert script.asked == [path, f"{path}?wait=2.5", f"{path}?wait={MAX_WAIT_S}&seen=deployed"]


def test_waiting_is_no_timeout(registry: Make) -> None:
    """The connection is given as long as the registry may wait, and more."""
    client, script = registry(STATE)
    client.status("r1", wait_s=50)
    assert script.requests[0].extensions["timeout"]["read"] > 100


@pytest.mark.parametrize(
    "trouble",
    [httpx.Response(503, json=BUSY), httpx.Response(503, text="proxy"), httpx.ConnectError("refused")],
    ids=["503 of the registry", "503 of the proxy", "refused"],
)
def test_restart_is_waited_for(registry: Make, trouble: Reply) -> None:
    """While the registry restarts, a status and a release are asked for again."""
    client, script = registry(trouble, trouble, STATE, trouble, httpx.Response(204))
    assert client.status("r1").requestId == "r1"
    client.release("r1")
    assert len(script.requests) == 5


CHANGES: dict[str, tuple[int, Callable[[RegistryClient], object]]] = {
    "release": (204, lambda client: client.release("r1")),
    "revoke": (204, lambda client: client.revoke_key("0a1b2c3d")),
    "request": (201, lambda client: client.request(7, [{}])),
    "create key": (201, lambda client: client.create_key("viewer")),
    "undrain": (200, lambda client: client.undrain("a")),
    "get": (200, lambda client: client.get("/machines")),
}


@pytest.mark.parametrize(("expected", "call"), CHANGES.values(), ids=CHANGES)
def test_only_the_right_status_is_a_success(
    registry: Make, expected: int, call: Callable[[RegistryClient], object]
) -> None:
    """A server that answers everything with some 2xx is no registry: nothing was released, made or revoked."""
    for status in {200, 201, 202, 204} - {expected}:
        client, _ = registry(httpx.Response(status))
        with pytest.raises(AnswerError, match="is not a registry") as caught:
            call(client)
        assert (caught.value.status, caught.value.answer_code) == (status, "unexpected_answer")
        assert not caught.value.passing


def test_patience_ends(registry: Make) -> None:
    """A registry that stays away is the caller's problem in the end."""
    client, _ = registry(*[httpx.ConnectError("refused")] * 4)
    with pytest.raises(httpx.ConnectError):
        client.status("r1")


CALLS: dict[str, Callable[[RegistryClient], object]] = {
    "status": lambda client: client.status("r1"),
    "release": lambda client: client.release("r1"),
    "drain": lambda client: client.drain("a"),
    "undrain": lambda client: client.undrain("a"),
    "measurement": lambda client: client.measurement(7),
    "request": lambda client: client.request(7, [{"model": "a"}]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("trouble", [httpx.ConnectError("refused"), httpx.ConnectTimeout("no answer")], ids=repr)
def test_time_to_connect_ends_first(registry: Make, call: Callable[[RegistryClient], object], trouble: Reply) -> None:
    """Where nothing listens a call ends after ``connect_for_s``; neither one connection nor all of them take longer."""
    client, script = registry(trouble, connect_for_s=0)
    with pytest.raises(httpx.TransportError):
        call(client)
    assert [request.extensions["timeout"]["connect"] for request in script.requests] == [0]


def test_a_registry_that_has_answered_is_waited_for(registry: Make) -> None:
    """A command that has been answered once, as a long ``drain --wait``, outlasts a restart as any client does."""
    client, script = registry(STATE, httpx.ConnectError("refused"), STATE, connect_for_s=0)
    client.status("r1")
    client.status("r1")
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [404, 410, 422, 429, 500])
def test_other_errors_are_not_asked_again(registry: Make, status: int) -> None:
    """What another try can't change is told at once: a budget that is used up is a 429, too."""
    client, script = registry(httpx.Response(status, json={**BUSY, "code": "x", "retryable": False}))
    with pytest.raises(AnswerError):
        client.status("r1")
    assert len(script.requests) == 1


def limited(wait: str | None, *, retryable: bool = True) -> AnswerError:
    """The error of a 429 with this ``Retry-After``."""
    headers = {} if wait is None else {"retry-after": wait}
    body = {"code": "too_many_calls", "message": "call less often", "retryable": retryable}
    with pytest.raises(AnswerError) as caught:
        checked(httpx.Response(429, json=body, headers=headers))
    return caught.value


@pytest.mark.parametrize(
    ("wait", "pause"),
    [("1", 1.0), ("60", 60.0), ("61", True), (None, True), ("Wed, 21 Oct 2026 07:28:00 GMT", True), ("-1", True)],
)
def test_the_registry_says_how_long_to_pause(wait: str | None, pause: float) -> None:
    """A pause of up to a minute is kept; a longer one is an estimate, and other texts say nothing."""
    found = when_to_call_again(limited(wait))
    assert (found, type(found)) == (pause, type(pause))


def test_a_limit_that_time_does_not_help_is_no_pause() -> None:
    """Neither is an error that is no 429: a restart is looked for more often than once a second."""
    assert when_to_call_again(limited("5", retryable=False)) is False
    assert when_to_call_again(AnswerError(503, "x", "x", passing=True, retry_after_s=1.0)) is True
    assert when_to_call_again(httpx.ConnectError("refused")) is True


def test_a_call_above_the_limit_is_repeated_later(registry: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, the client pauses as long as the registry says, though that is longer than its patience."""
    paused: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", paused.append)
    busy = httpx.Response(429, json={**BUSY, "code": "too_many_calls"}, headers={"retry-after": "60"})
    client, script = registry(busy, STATE)
    with stamina.set_testing(False):
        assert client.status("r1").requestId == "r1"
    assert paused == [60.0]
    assert len(script.requests) == 2


# --- waiting -----------------------------------------------------------------------------------------------


def test_wait_until_deployed(registry: Make) -> None:
    """The client polls with waits, says what it has seen, until the LLM is its own, and tells of every answer."""
    deploying = {**STATE, "status": "deploying", "phase": "loading"}
    client, script = registry(STATE, STATE, deploying, DEPLOYED)
    heard: list[str] = []
    state = client.wait_until_deployed("r1", on_change=lambda state: heard.append(state.status), poll_s=3.0)
    assert state.url == "http://x/wrappers/a-0/token"
    assert heard == ["queued", "queued", "deploying", "deployed"]
    polls = [(request.url.params.get("wait"), request.url.params.get("seen")) for request in script.requests]
    assert polls == [(None, None), ("3.0", "queued"), ("3.0", "queued"), ("3.0", "deploying")]


@pytest.mark.parametrize("status", ["failed", "cancelled", "expired", "released"])
def test_request_that_ended_is_not_waited_for(registry: Make, status: str) -> None:
    """A request that ended without its LLM is an error with the registry's reason."""
    client, _ = registry({**STATE, "status": status, "reason": "no memory"})
    with pytest.raises(RequestEnded) as caught:
        client.wait_until_deployed("r1")
    assert (caught.value.request_id, caught.value.status, caught.value.reason) == ("r1", status, "no memory")
    assert str(caught.value) == f"request r1 is {status}: no memory"


def test_wait_has_an_end(registry: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time the wait ends with a TimeoutError, and no poll is longer than what is left."""
    clock, answered_s = ManualClock(0.0), iter([1.0, 4.5, 5.0])
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=clock))
    client, script = registry(STATE, STATE, STATE)

    def move_clock(_: RequestState) -> None:
        clock.now_s = next(answered_s)

    with pytest.raises(TimeoutError, match=r"still queued after 5\.0 s"):
        client.wait_until_deployed("r1", timeout_s=5.0, poll_s=2.0, on_change=move_clock)
    assert [request.url.params.get("wait") for request in script.requests] == [None, "2.0", "0.5"]


# --- leases ------------------------------------------------------------------------------------------------


def test_lease_is_held_and_given_back(registry: Make) -> None:
    """A lease is waited for, prompted at its address, and given back at the end of the block."""
    client, script = registry(STATE, DEPLOYED, {"answer": "because", "sci_score": None}, httpx.Response(204))
    with client.lease("r1") as lease:
        assert lease.prompt("Why?") == {"answer": "because", "sci_score": None}
        assert lease.state.status == "deployed"
    assert str(script.requests[2].url) == "http://x/wrappers/a-0/token/process_prompt"
    assert json.loads(script.requests[2].content) == {"question": "Why?"}
    assert script.asked[-1] == "DELETE /promptingservice/request/r1"


def test_lease_is_given_back_on_an_error(registry: Make) -> None:
    """Whatever goes wrong in the block, the LLM is given back, and the error comes through."""
    client, script = registry(DEPLOYED, httpx.Response(204))

    def use() -> None:
        with client.lease("r1"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert script.asked[-1] == "DELETE /promptingservice/request/r1"


@pytest.mark.parametrize(
    ("reply", "error"),
    [({**STATE, "status": "failed"}, RequestEnded), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["failed", "Ctrl-C"],
)
def test_request_is_given_back_when_the_wait_fails(registry: Make, reply: Reply, error: type[BaseException]) -> None:
    """A request whose wait failed or was given up does not stay in the queue."""
    client, script = registry(STATE, reply, httpx.Response(204))
    with pytest.raises(error), client.lease("r1"):
        pytest.fail("there is no lease")
    assert script.asked[-1] == "DELETE /promptingservice/request/r1"


def test_prompt_waits_for_an_llm_that_is_restarted(registry: Make) -> None:
    """A prompt is asked again while its LLM is restarted or has too many of them; the waits log no address."""
    busy = [httpx.Response(status, json=BUSY) for status in (503, 429)]
    client, _ = registry(DEPLOYED, *busy, httpx.ReadError("reset"), {"answer": "because"}, httpx.Response(204))
    with client.lease("r1") as lease:
        assert lease.prompt("Why?") == {"answer": "because"}


def test_prompt_without_an_answer_is_not_asked_again(registry: Make) -> None:
    """Who got no answer in all the time that there was is told so, and does not wait as long again."""
    client, _ = registry(DEPLOYED, httpx.ReadTimeout("slow"), httpx.Response(204))
    with client.lease("r1") as lease, pytest.raises(httpx.ReadTimeout):
        lease.prompt("Why?")


def test_prompt_after_the_lease_tells_so(registry: Make) -> None:
    """A prompt at an address that is over is an error with the wrapper's own words."""
    gone = {"code": "lease_ended", "message": "this lease has ended (expired)", "retryable": False}
    client, _ = registry(DEPLOYED, httpx.Response(410, json=gone), httpx.Response(204))
    with client.lease("r1") as lease, pytest.raises(AnswerError, match="expired") as caught:
        lease.prompt("Why?")
    assert (caught.value.status, caught.value.answer_code) == (410, "lease_ended")


@pytest.mark.parametrize(
    ("base_url", "refused"),
    [("https://registry", True), ("https://localhost", True), ("http://127.0.0.1:8000", False), ("http://r", False)],
)
def test_a_lease_is_not_prompted_in_clear(registry: Make, base_url: str, refused: bool) -> None:
    """Behind https the http URL of a lease is refused before anything is sent there, and the lease is released."""
    replies: list[Reply] = [] if refused else [{"answer": "because"}]
    client, script = registry(DEPLOYED, *replies, httpx.Response(204), base_url=base_url)
    if refused:
        with pytest.raises(BadSettings, match=r"^http\.public_url: .* http://x; set it") as caught, client.lease("r1"):
            pytest.fail("there is no lease")
        assert "token" not in str(caught.value)
    else:
        with client.lease("r1") as lease:
            assert lease.prompt("Why?") == {"answer": "because"}
    assert script.asked[-1] == "DELETE /promptingservice/request/r1"


# --- the rest ----------------------------------------------------------------------------------------------


def test_pages(registry: Make) -> None:
    """The information pages come as their JSON."""
    client, script = registry(httpx.Response(200, json=[{"machine": "a"}]))
    assert client.get("/machines") == [{"machine": "a"}]
    assert script.asked == ["GET /machines"]


MACHINE: dict[str, Any] = {
    "machine": "gpu 1",
    "address": "10.0.0.1",
    "alive": True,
    "gpus": 0,
    "gpuType": None,
    "memoryBytes": None,
    "drain": "draining",
    "leases": 1,
    "wrappers": [],
}
HEALTH = {"status": "degraded", "wrappers": 1, "usable": 0, "queued": 3, "version": "0"}


def test_drain_and_undrain(registry: Make) -> None:
    """Both are asked again while the registry restarts, and give the machine as it is then."""
    client, script = registry(httpx.Response(503, json=BUSY), MACHINE, {**MACHINE, "drain": None})
    assert client.drain("gpu 1").drain == "draining"
    assert client.undrain("gpu 1").drain is None
    path = "/machines/gpu%201/drain"
    assert script.asked == [f"POST {path}", f"POST {path}", f"DELETE {path}"]


@pytest.mark.parametrize("last", ["drained", None])
def test_drain_is_waited_for(registry: Make, last: str | None) -> None:
    """Until the machine is drained, or somebody has undrained it; each look is told."""
    client, script = registry(MACHINE, {**MACHINE, "leases": 0}, {**MACHINE, "drain": last})
    looks: list[int] = []
    pauses: list[float] = []
    state = client.wait_until_drained("gpu 1", on_look=lambda seen: looks.append(seen.leases), sleep=pauses.append)
    assert state.drain == last
    assert looks == [1, 0, 1]
    assert len(pauses) == 2
    assert set(script.asked) == {"GET /machines/gpu%201"}


def test_wait_for_a_drain_has_an_end(registry: Make) -> None:
    """When the time is up the machine is still being drained, and that is said."""
    client, _ = registry(MACHINE)
    with pytest.raises(TimeoutError, match="gpu 1 is still being drained after 0 s"):
        client.wait_until_drained("gpu 1", timeout_s=0)


def test_measurement(registry: Make) -> None:
    """A measurement comes with the requests of all its pages."""
    measurement = {
        "measurementId": 7,
        "machine": "a",
        "flags": [],
        "createdAt": STATE["createdAt"],
    }
    pages = measurement | {"requests": [STATE], "next": 4}, measurement | {"requests": [STATE], "next": None}
    client, script = registry(httpx.Response(503, json=BUSY), *pages)
    found = client.measurement(7)
    assert ([state.requestId for state in found.requests], found.next) == (["r1", "r1"], None)
    assert script.asked == ["GET /measurements/7?after=0"] * 2 + ["GET /measurements/7?after=4"]


def test_health_is_told_when_it_is_bad(registry: Make) -> None:
    """A registry that can serve nobody answers 503 and says how it is; an error in its place is an error."""
    client, _ = registry(httpx.Response(503, json=HEALTH), HEALTH, httpx.Response(503, json=BUSY))
    assert client.health().queued == client.health().queued == 3
    with pytest.raises(AnswerError, match="try again"):
        client.health()


@pytest.mark.parametrize("base_url", ["http://r/prefix", "http://r/prefix/"])
def test_base_url_may_have_a_path(registry: Make, base_url: str) -> None:
    """A registry behind a path is reached, with or without a slash at the end."""
    client, script = registry(STATE, base_url=base_url)
    client.status("r1")
    assert script.asked == ["GET /prefix/promptingservice/request/r1"]


def test_client_closes_its_connections() -> None:
    """At the end of the block the connections are closed."""
    with RegistryClient("http://registry") as client:
        pass
    assert client._http.is_closed
    assert client._prompts.is_closed


def test_the_key_goes_to_the_registry_alone() -> None:
    """An LLM, whose code somebody else may have written, never gets the API key."""
    with RegistryClient("http://registry", api_key=" gp_0a1b2c3d_secret\n") as client:
        assert client._http.headers["Authorization"] == "Bearer gp_0a1b2c3d_secret"
        assert "Authorization" not in client._prompts.headers


@pytest.mark.parametrize("key", ["", " ", "gp_ü", "gp_1\nX-Tenant: other", "two words"])
def test_what_can_be_no_key_is_refused(key: str) -> None:
    """A text that no header can have is refused before anything is sent, and is not repeated in the error."""
    with pytest.raises(BadSettings, match=r"^API key: is empty, or has characters that no key has$"):
        RegistryClient("http://registry", api_key=key)
