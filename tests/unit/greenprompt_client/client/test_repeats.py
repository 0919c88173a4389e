"""Which calls the Python client repeats, for how long, and the errors that it tells."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
import stamina

from greenprompt_client.answers import AnswerError, checked, when_to_call_again
from greenprompt_client.client import RegistryClient
from registry.wire.schemas import MAX_WAIT_S
from tests.support.scripted_registry import BUSY, STATE, Make, Reply


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


def limited(wait: str | None, code: str = "too_many_calls", *, retryable: bool = True) -> AnswerError:
    """The error of a 429 with this ``Retry-After``."""
    headers = {} if wait is None else {"retry-after": wait}
    body = {"code": code, "message": "call less often", "retryable": retryable}
    with pytest.raises(AnswerError) as caught:
        checked(httpx.Response(429, json=body, headers=headers))
    return caught.value


@pytest.mark.parametrize("code", ["too_many_calls", "too_many_wrong_keys"])
@pytest.mark.parametrize(("wait", "pause_s"), [("0", 1.0), ("1", 1.0), ("60", 60.0)])
def test_the_registry_says_how_long_to_pause(code: str, wait: str, pause_s: float) -> None:
    """A pause of up to a minute is kept, but never none; callers that were refused at once come back one by one."""
    found = {when_to_call_again(limited(wait, code)) for _ in range(50)}
    assert len(found) > 10
    assert all(pause_s <= pause < pause_s + 1.01 for pause in found)


@pytest.mark.parametrize("wait", ["61", None, "Wed, 21 Oct 2026 07:28:00 GMT", "-1"])
def test_other_texts_say_nothing(wait: str | None) -> None:
    """Neither does a time that no limit of rates has."""
    assert when_to_call_again(limited(wait)) is True


def test_other_limits_only_estimate_the_time() -> None:
    """A full queue, or too many polls, are tried again as after any other passing error."""
    assert when_to_call_again(limited("5", "too_many_polls")) is True
    assert when_to_call_again(limited("0", "queue_full")) is True


def test_a_limit_that_time_does_not_help_is_no_pause() -> None:
    """Neither is an error that is no 429: a restart is looked for more often than once a second."""
    assert when_to_call_again(limited("5", retryable=False)) is False
    assert when_to_call_again(AnswerError(503, "x", "x", passing=True, retry_after_s=1.0)) is True
    assert when_to_call_again(httpx.ConnectError("refused")) is True


def test_a_call_above_the_limit_is_repeated_later(registry: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, the client pauses as long as the registry says, though that is longer than its patience."""
    paused: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", paused.append)
    monkeypatch.setattr("greenprompt_client.answers.random.uniform", lambda _, most: most)
    busy = httpx.Response(429, json={**BUSY, "code": "too_many_calls"}, headers={"retry-after": "60"})
    client, script = registry(busy, STATE)
    with stamina.set_testing(False):
        assert client.status("r1").requestId == "r1"
    assert paused == [61.0]
    assert len(script.requests) == 2
