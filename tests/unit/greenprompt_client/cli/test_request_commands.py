"""The commands ``request``, ``prompt`` and ``release``, as processes that call a registry over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenprompt_client.cli.leasing import LONGEST_PAUSE_S, keep_alive_pause_s
from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import HttpRegistry, answer, error
from tests.support.processes import Start, ended_at_last

pytestmark = pytest.mark.slow  # each test starts processes

ROOT = Path(__file__).resolve().parents[4]
LIMIT_S = 30


@pytest.fixture
def registry() -> Iterator[HttpRegistry]:
    with HttpRegistry() as registry:
        yield registry


@pytest.fixture
def command(registry: HttpRegistry, empty_folder: Path) -> Iterator[Start]:
    """Starts a command for the registry; none outlives the test."""
    how: dict[str, Any] = {
        "cwd": ROOT,
        "env": {**os.environ, "HOME": str(empty_folder), "COLUMNS": "200"},
        "stdin": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    with ended_at_last() as start:
        yield lambda *words: start(
            [sys.executable, "-m", "greenprompt_client.cli.main", *words, "--url", registry.url], **how
        )


def ended(process: subprocess.Popen[str], given: str = "") -> tuple[int, str, str]:
    """Return the exit status of a command, its output and its errors."""
    out, err = process.communicate(given, timeout=LIMIT_S)
    return process.returncode, out, err


def test_a_request_is_made_with_everything_that_was_given(registry: HttpRegistry, command: Start) -> None:
    """The id is all that is printed; arguments, conditions and budgets reach the registry under their own names."""
    options = ["--arg", "max_new_tokens=4", "--deployment-arg", "max_model_len=64", "--measurement-id", "7"]
    options += ["--priority", "high", "--gpu-type", "H100", "--max-joules", "5.5", "--no-chat-template"]
    assert ended(command("request", "org/model", *options)) == (0, "r0\n", "")
    assert registry.posted == [
        {
            "measurementId": 7,
            "llms": [
                {
                    "modeltyp": "text-generation",
                    "model": "org/model",
                    "uses_chat_template": False,
                    "args": {"prompting": {"max_new_tokens": 4}, "deployment": {"max_model_len": 64}},
                }
            ],
            "priority": "high",
            "gpuType": "H100",
            "maxJoules": 5.5,
        }
    ]


def briefly(state: RequestState) -> RequestState:
    """Give a lease an idle time of 0.3 s, so that it is kept alive every 0.1 s."""
    return state.model_copy(update={"idleAfter": "2026-01-01T00:00:00.300Z"})


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_held_llm_is_kept_alive_and_released(registry: HttpRegistry, command: Start, by: signal.Signals) -> None:
    """With --wait the address is printed and the lease kept alive; each signal that ends it releases the LLM."""
    registry.on_poll = briefly
    process = command("request", "org/model", "--wait")
    assert process.stdout is not None
    assert process.stdout.readline() == f"{registry.url}/wrappers/gpu-1-0/lease_r0\n"
    deadline_s = time.monotonic() + LIMIT_S
    while not registry.kept:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(by)
    status, _, err = ended(process)
    assert (status, err) == (0, "deployed\nHeld on gpu-1 until Ctrl-C; request r0\n")
    assert registry.requests["r0"].status == "released"


def test_a_lease_outlives_its_engine(registry: HttpRegistry, command: Start) -> None:
    """While the engine is started again, the lease stays; the command ends when the lease does."""
    seen: list[str] = []

    def restart(state: RequestState) -> RequestState:
        seen.append(state.status)
        if len(seen) == 2:
            return state.model_copy(update={"status": "deploying", "url": None, "reason": "the engine died"})
        if len(seen) == 5:
            return state.model_copy(update={"status": "expired", "url": None, "reason": "its deadline"})
        return briefly(state.model_copy(update={"status": "deployed", "url": f"{registry.url}/wrappers/a-0/lease_r0"}))

    registry.on_poll = restart
    status, _, err = ended(command("request", "org/model", "--wait"))
    assert (status, len(seen)) == (1, 5)
    assert err.endswith("greenprompt: request r0 is expired: its deadline\n")


def test_a_lease_that_ends_ends_the_command(registry: HttpRegistry, command: Start) -> None:
    """The lease is kept alive until it ends by itself; then the command ends with status 1 and names the reason."""

    def expire(state: RequestState) -> RequestState:
        over = {"status": "expired", "url": None, "reason": "its lease reached its deadline"}
        return state.model_copy(update=over) if registry.kept else state

    registry.on_poll = lambda state: briefly(expire(state))
    status, out, err = ended(command("request", "org/model", "--wait", "--json"))
    assert status == 1
    assert json.loads(out)["url"].endswith("/lease_r0")
    assert err.endswith("greenprompt: request r0 is expired: its lease reached its deadline\n")
    assert registry.kept


def test_a_request_that_waits_is_cancelled(registry: HttpRegistry, command: Start) -> None:
    """Ctrl-C before the LLM is there cancels the request, with status 130. Before, it said what it waits for."""
    waits = threading.Event()

    def wait(state: RequestState) -> RequestState:
        waits.set()
        return state.model_copy(update={"status": "queued", "url": None, "position": 2, "reason": "no free wrapper"})

    registry.on_poll = wait
    process = command("request", "org/model", "--wait")
    assert waits.wait(LIMIT_S)
    assert process.stderr is not None
    assert process.stderr.readline() == "queued, place 2 in the queue: no free wrapper\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "")
    assert registry.requests["r0"].status == "cancelled"


def test_a_question_is_answered(registry: HttpRegistry, command: Start) -> None:
    """The answer is all that is on standard output; what it used is on standard error, with its label."""
    energy = {"total_j": 3.21, "low_j": 3.0, "high_j": 3.4}
    registry.on_prompt = lambda _state, _question: (200, answer() | {"energy": energy, "methods": {"E": "modeled"}})
    assert ended(command("request", "org/model"))[0] == 0
    told = "10 output tokens, ~3.21 (3 to 3.4) J, modeled; provisional\n"
    assert ended(command("prompt", "r0", "Why?")) == (0, "because\n", told)
    status, out, err = ended(command("prompt", "r0", "--json"), "From\nstandard input")
    assert (status, json.loads(out)["answer"], err) == (0, "because", "")
    assert registry.prompted == [("org/model", "Why?"), ("org/model", "From\nstandard input")]
    assert ended(command("release", "r0")) == (0, "", "")
    assert ended(command("prompt", "r0", "Why?")) == (1, "", "greenprompt: request r0 is released\n")


def test_a_question_to_a_waiting_request_is_refused(registry: HttpRegistry, command: Start) -> None:
    """A request that waits has no LLM: exit status 1, and what it waits for."""
    assert ended(command("request", "org/model"))[0] == 0
    assert ended(command("request", "org/model"))[0] == 0
    assert ended(command("prompt", "r1", "Why?")) == (1, "", "greenprompt: request r1 is queued\n")
    assert registry.prompted == []


def test_text_is_printed_as_it_is(registry: HttpRegistry, command: Start) -> None:
    """Nothing of an answer is taken for markup, an emoji or a tab stop."""
    text = "ratio 1:100:2\n\tx = a[:o:] [bold]ä[/bold]"
    registry.on_prompt = lambda _state, _question: (200, answer() | {"answer": text})
    assert ended(command("request", "org/model"))[0] == 0
    assert ended(command("prompt", "r0", "Why?"))[1] == f"{text}\n"
    out = ended(command("prompt", "r0", "Why?", "--json"))[1]
    assert out.isascii()
    assert json.loads(out)["answer"] == text


def test_an_answer_that_takes_too_long(registry: HttpRegistry, command: Start) -> None:
    """If --timeout is over, the error says so, and not that there is no registry."""

    def wait(_state: RequestState, _question: str) -> None:
        registry.given_back.wait(LIMIT_S)

    registry.on_prompt = wait
    assert ended(command("request", "org/model"))[0] == 0
    told = (1, "", "greenprompt: no answer within 0.2 s (--timeout)\n")
    assert ended(command("prompt", "r0", "Why?", "--timeout", "0.2")) == told
    assert ended(command("release", "r0"))[0] == 0


def test_a_release_that_fails_is_told(registry: HttpRegistry, command: Start) -> None:
    """If the LLM can't be released, the command says how to release it; a second signal changes nothing."""
    registry.on_poll = briefly
    registry.on_release = lambda: error(403, "not_yours")
    process = command("request", "org/model", "--wait")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process)
    assert (status, registry.requests["r0"].status) == (5, "deployed")
    assert "greenprompt: request r0 was not released: greenprompt release r0\n" in err


def test_an_address_that_is_not_shown(registry: HttpRegistry, command: Start) -> None:
    """A key that may not see the address of a lease can't prompt: the error says why."""
    registry.on_poll = lambda state: state.model_copy(update={"url": None})
    told = "greenprompt: request r0 is deployed: its address is shown to its own tenant only\n"
    status, out, err = ended(command("request", "org/model", "--wait"))
    assert (status, out, err.endswith(told)) == (1, "", True)
    assert registry.requests["r0"].status == "released"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["request", "org/model", "--max-joules", "nan"], "max_joules"),
        (["request", "org/model", "--arg", "a=.inf"], "args"),
        (["request", "org/\udcff"], "model"),
        (["request", "org/model", "--tenant", "ä"], "tenant"),
        (["prompt", "r0", "\udcff"], "question"),
    ],
)
def test_what_can_not_be_sent_is_one_line(registry: HttpRegistry, command: Start, words: list[str], field: str) -> None:
    """Text and numbers that HTTP or JSON can't have end in one line that names the field; nothing is sent."""
    status, out, err = ended(command(*words))
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith(f"greenprompt: {field}")
    assert registry.posted == []


def test_a_question_that_is_no_text(registry: HttpRegistry, command: Start) -> None:
    """Standard input must be UTF-8."""
    process = command("prompt", "r0")
    assert process.stdin is not None
    os.write(process.stdin.fileno(), b"\xff")
    status, _, err = ended(process)
    assert (status, len(err.splitlines()), "standard input is not UTF-8" in err) == (2, 1, True), err


@pytest.mark.parametrize(
    ("deployed", "idle", "pause_s"),
    [
        ("2026-01-01T00:00:00.000Z", "2026-01-01T00:10:00.000Z", LONGEST_PAUSE_S),
        ("2026-01-01T00:00:00.000Z", "2026-01-01T00:00:30.000Z", 10.0),
        ("2026-01-01T00:00:00.000Z", None, LONGEST_PAUSE_S),
    ],
)
def test_keep_alives_come_in_time(deployed: str, idle: str | None, pause_s: float) -> None:
    """There are at least three in the idle time of a lease, and one every 20 s."""
    state = RequestState(
        requestId="r", llmconfig={}, status="deployed", measurementId=1, address=None, link="", createdAt=deployed
    )
    assert keep_alive_pause_s(state.model_copy(update={"deployedAt": deployed, "idleAfter": idle})) == pause_s
