"""The commands ``status``, ``llms`` and ``events``: as tables, and as the JSON of the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import main as cli
from greenprompt_client.client import RegistryClient
from registry.wire.schemas import EventState, HealthState, LLMState, MachineState

HEALTH = HealthState(status="ok", wrappers=1, usable=1, queued=3, version="0.2.0")
MACHINE = MachineState(
    machine="gpu-1",
    address="10.0.0.1",
    alive=True,
    gpus=1,
    gpuType="H100",
    memoryBytes=None,
    healthy=True,
    lastHeardAt=None,
    wrappers=[],
)
LLM = LLMState(
    model="org/model",
    modeltyp="text-generation",
    fingerprint="f",
    revision=None,
    deployment={},
    machine="gpu-1",
    wrapper="gpu-1-0",
    status="ready",
)
EVENTS = [
    EventState(event=1, what="LeaseRequested", at="2026-11-30T09:00:00.123Z", status="queued"),
    EventState(event=4, what="LLMDeployed", at="2026-11-30T09:00:02.123Z", cause=1, status="deployed"),
]


class FakeClient(RegistryClient):
    """A client without a registry."""

    found: ClassVar[list[LLMState]] = [LLM]

    def health(self) -> HealthState:
        return HEALTH

    def machines(self) -> list[MachineState]:
        return [MACHINE]

    def llms(self) -> list[LLMState]:
        return self.found

    def events(self, request_id: str, *, after: int = 0) -> Iterator[EventState]:
        assert (request_id, after) == ("r1", 0)
        yield from EVENTS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> Any:
    """Runs a command in an empty folder, without a key."""
    monkeypatch.setattr(cli_app, "RegistryClient", FakeClient)
    monkeypatch.setattr(cli_app.console, "width", 160)

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli.app, words, catch_exceptions=False)

    return run


def test_status_has_both_answers(run: Any) -> None:
    """One JSON object has what GET /healthz and GET /machines say."""
    shown = json.loads(run("status", "--json").output)
    assert shown == {"health": HEALTH.model_dump(), "machines": [MACHINE.model_dump()]}


def test_llms(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM is a row, or a line of JSON; without any, people read so and programs read nothing."""
    assert "org/model text-generation ready gpu-1 gpu-1-0 -" in " ".join(run("llms").output.split())
    assert [json.loads(line) for line in run("llms", "--json").output.splitlines()] == [LLM.model_dump()]
    monkeypatch.setattr(FakeClient, "found", [])
    assert run("llms").output == "No LLM runs.\n"
    assert run("llms", "--json").output == ""


def test_events(run: Any) -> None:
    """An event is a row, or a line of JSON."""
    rows = [" ".join(line.split()) for line in run("events", "r1").output.splitlines()]
    assert "1 2026-11-30 09:00:00 LeaseRequested queued" in rows
    assert "4 2026-11-30 09:00:02 LLMDeployed deployed 1" in rows
    assert [json.loads(line) for line in run("events", "r1", "--json").output.splitlines()] == [
        each.model_dump() for each in EVENTS
    ]


def test_the_version_is_that_of_the_package(run: Any) -> None:
    """``--version`` prints the installed version, and nothing else."""
    shown = run("--version")
    assert (shown.exit_code, shown.output) == (0, f"{version('greenprompt-llm-registry')}\n")


@pytest.mark.parametrize("words", [["-h"], ["status", "-h"]])
def test_help_has_a_short_name(run: Any, words: list[str]) -> None:
    """``-h`` is ``--help``, for every command."""
    assert run(*words).exit_code == 0
