"""A lease in the Python client: it is waited for, prompted and given back."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import stamina

from greenprompt_client import calls as calls_module
from greenprompt_client import client as client_module
from greenprompt_client.answers import AnswerError, RequestEnded
from greenprompt_client.client import RegistryClient
from greenprompt_client.held_lease import HeldLease
from registry.errors import BadSettings
from registry.wire.schemas import PROMPT_HEADER, WARMUP_HEADER, RequestState
from tests.support.fake_counters import ManualClock
from tests.support.scripted_registry import BUSY, DEPLOYED, STATE, Make, Reply


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


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.Response(429, json={**BUSY, "code": "too_many_calls"}, headers={"retry-after": "60"}),
        httpx.Response(503, json=BUSY),
        httpx.ConnectError("refused"),
    ],
    ids=["429", "503", "refused"],
)
@pytest.mark.parametrize(
    "wait",
    [
        lambda client: client.wait_until_deployed("r1", timeout_s=1.0),
        lambda client: client.wait_until_drained("gpu 1", timeout_s=1.0),
    ],
    ids=["deployed", "drained"],
)
def test_pauses_end_with_the_wait(
    registry: Make, monkeypatch: pytest.MonkeyPatch, trouble: Reply, wait: Callable[[RegistryClient], object]
) -> None:
    """Before the deadline there is a last try; then it is a TimeoutError that names the last error."""
    clock = ManualClock(0.0)
    for module in (calls_module, client_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, sleep=None))

    def sleep(pause_s: float) -> None:
        clock.now_s += pause_s

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    client, script = registry(trouble, trouble)
    with stamina.set_testing(False), pytest.raises(TimeoutError, match=r"no answer in time; the last error: .+"):
        wait(client)
    assert clock.now_s == pytest.approx(1.0)
    assert len(script.requests) == 2


def test_an_error_that_stays_is_no_timeout(registry: Make) -> None:
    """Even after the deadline."""
    client, _ = registry(httpx.Response(404, json={**BUSY, "code": "unknown_request", "retryable": False}))
    with pytest.raises(AnswerError):
        client.wait_until_deployed("r1", timeout_s=0)


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
