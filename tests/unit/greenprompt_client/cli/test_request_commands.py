"""The commands ``request``, ``prompt`` and ``release``, as processes that call a registry over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import HttpRegistry, answer

ROOT = Path(__file__).resolve().parents[4]
LIMIT_S = 30

Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def registry() -> Iterator[HttpRegistry]:
    with HttpRegistry() as registry:
        yield registry


@pytest.fixture
def command(registry: HttpRegistry, empty_folder: Path) -> Iterator[Command]:
    """Starts a command for the registry; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "greenprompt_client.cli.main", *words, "--url", registry.url],
            cwd=ROOT,
            env={**os.environ, "HOME": str(empty_folder), "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], given: str = "") -> tuple[int, str, str]:
    """Return the exit status of a command, its output and its errors."""
    out, err = process.communicate(given, timeout=LIMIT_S)
    return process.returncode, out, err


def test_a_request_is_made_with_everything_that_was_given(registry: HttpRegistry, command: Command) -> None:
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


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_held_llm_is_kept_alive_and_released(registry: HttpRegistry, command: Command, by: signal.Signals) -> None:
    """With --wait the address is printed and the lease kept alive; Ctrl-C and SIGTERM release it, with status 0."""
    process = command("request", "org/model", "--wait")
    assert process.stdout is not None
    assert process.stdout.readline() == f"{registry.url}/wrappers/gpu-1-0/lease_r0\n"
    assert process.stderr is not None
    while "Held on gpu-1 until Ctrl-C; request r0" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(by)
    assert ended(process)[0] == 0
    assert registry.requests["r0"].status == "released"
    assert set(registry.kept) <= {"r0"}


def test_a_lease_that_ends_ends_the_command(registry: HttpRegistry, command: Command) -> None:
    """The lease is kept alive until it ends by itself; then the exit status is 1, and the reason is told."""

    def expire(state: RequestState) -> RequestState:
        over = {"status": "expired", "url": None, "reason": "its lease reached its deadline"}
        return state.model_copy(update=over) if registry.kept else state

    registry.on_poll = expire
    status, out, err = ended(command("request", "org/model", "--wait", "--json"))
    assert status == 1
    assert json.loads(out)["url"].endswith("/lease_r0")
    assert err.endswith("greenprompt: request r0 is expired: its lease reached its deadline\n")
    assert registry.kept


def test_a_request_that_waits_is_cancelled(registry: HttpRegistry, command: Command) -> None:
    """Ctrl-C before the LLM is there cancels the request, with status 130; what it waits for was told."""
    waits = threading.Event()

    def wait(state: RequestState) -> RequestState:
        waits.set()
        return state.model_copy(update={"status": "queued", "url": None, "position": 2, "reason": "no free wrapper"})

    registry.on_poll = wait
    process = command("request", "org/model", "--wait")
    assert waits.wait(LIMIT_S)
    assert process.stderr is not None
    assert process.stderr.readline() == "queued, place 2: no free wrapper\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "")
    assert registry.requests["r0"].status == "cancelled"


def test_a_question_is_answered(registry: HttpRegistry, command: Command) -> None:
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


def test_a_question_to_a_waiting_request_is_refused(registry: HttpRegistry, command: Command) -> None:
    """A request that waits has no LLM: exit status 1, and what it waits for."""
    assert ended(command("request", "org/model"))[0] == 0
    assert ended(command("request", "org/model"))[0] == 0
    assert ended(command("prompt", "r1", "Why?")) == (1, "", "greenprompt: request r1 is queued\n")
    assert registry.prompted == []
