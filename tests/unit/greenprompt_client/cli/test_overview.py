"""What `greenprompt status`, `drain` and `undrain` show."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar, Self

import pytest
from rich.console import Console
from typer.testing import CliRunner

from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import app as shared
from greenprompt_client.cli import main as cli
from greenprompt_client.cli import status as status_command
from greenprompt_client.cli.status import overview
from registry.wire.schemas import HealthState, MachineState, WrapperState

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
HEALTH = HealthState(status="ok", wrappers=1, usable=1, queued=0, version="0.1.0")


def wrapper(name: str = "gpu-1-0", **more: Any) -> WrapperState:
    return WrapperState.model_validate(
        {"wrapper": name, "status": "idle", "gpus": 0, "llm": None, "leased": False, **more}
    )


def machine(name: str = "gpu-1", *wrappers: WrapperState, **more: Any) -> MachineState:
    state = {"machine": name, "address": "10.0.0.1", "alive": True, "gpus": 0, "gpuType": None, "memoryBytes": None}
    return MachineState.model_validate(
        {**state, "healthy": True, "lastHeardAt": "2026-01-01T11:59:59.000Z", "wrappers": wrappers, **more}
    )


def shown(*machines: MachineState, health: HealthState = HEALTH, width: int = 80) -> list[str]:
    """The lines on a terminal of this width."""
    out = io.StringIO()
    Console(file=out, width=width).print(overview(health, machines, NOW))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines)
    return lines


def test_no_machine() -> None:
    """A registry to which no machine has come says so, and who waits already."""
    health = HealthState(status="starting", wrappers=0, usable=0, queued=2, version="0.1.0")
    assert shown(health=health) == [
        "Registry 0.1.0 is starting: 0 LLMs in use, 2 requests waiting",
        "No LLM Machine has joined yet.",
    ]


def test_one_machine() -> None:
    """Its wrapper, what it runs, and nothing to note when all is well."""
    lines = shown(
        machine("gpu-1", wrapper(status="leased", gpus=8, llm="org/tiny", leased=True), gpuType="H100", leases=1)
    )
    assert lines == [
        "Registry 0.1.0 is ok: 1 LLM in use, 0 requests waiting",
        "1 machine: 1 healthy",
        "",
        "machine  GPUs    status  LLM       note",
        "gpu-1    8 H100  leased  org/tiny",
    ]


def test_what_is_being_deployed_counts() -> None:
    """A request whose LLM is being started neither uses one yet nor waits in the queue: it has a figure of its own."""
    health = HEALTH.model_copy(update={"deploying": 1, "queued": 2})
    assert shown(health=health)[0] == "Registry 0.1.0 is ok: 0 LLMs in use, 1 being deployed, 2 requests waiting"


def test_thirty_machines() -> None:
    """One line each, and how they are in one."""
    machines = [machine(f"gpu-{n:02}", wrapper(f"gpu-{n:02}-0")) for n in range(27)]
    machines.append(machine("gpu-27", wrapper("gpu-27-0", status="starting"), healthy=None))
    machines.append(machine("gpu-28", wrapper("gpu-28-0", status="off"), healthy=None, drain="drained"))
    machines.append(machine("gpu-29", wrapper("gpu-29-0", status="lost"), alive=False, healthy=False))
    lines = shown(*machines)
    assert lines[1] == "30 machines: 27 healthy, 1 starting, 1 lost, 1 drained"
    assert len(lines) == 4 + 30


@pytest.mark.parametrize(
    ("state", "note"),
    [
        (machine(alive=False, healthy=False), "it left the cluster; last heard of 1 s ago"),
        (machine(healthy=False, lastHeardAt="2026-01-01T09:00:00.000Z"), "last heard of 3 h ago"),
        (machine(healthy=False, lastHeardAt="2026-01-01T11:55:00.000Z"), "last heard of 5 min ago"),
        (machine(healthy=False, lastHeardAt=None, gpus=0), ""),
        (machine(healthy=True, gpus=1), "no wrapper yet; none is created if it has fewer GPUs than gpus_per_wrapper"),
        (machine(drain="draining", leases=1), "draining: 1 LLM still in use"),
        (machine(drain="draining"), "draining: its wrappers are being removed"),
        (machine("gpu-1", wrapper(status="off"), drain="drained"), "drained"),
        (machine(differs=["vllm 1, elsewhere 2", "ray 3, elsewhere 4"]), "vllm 1, elsewhere 2; ray 3, elsewhere 4"),
        (machine("gpu-1", wrapper(phase="downloading", progress=0.434)), "downloading 43%"),
        (machine("gpu-1", wrapper(phase="loading")), "loading"),
        (machine("gpu-1", wrapper(status="failed", reason="no answer")), "no answer"),
        (machine("gpu-1", wrapper(warm=False)), "LLMs start cold"),
        (machine("gpu-1", wrapper(warm=False, coldReason="[red]")), "LLMs start cold: [red]"),
    ],
)
def test_what_is_not_as_usual_is_noted(state: MachineState, note: str) -> None:
    """A note says what an operator should know, in words; there is none where there is nothing to say."""
    header, row = shown(state, width=200)[3:]
    assert row[header.index("note") :] == note


def test_long_names_are_folded_not_cut() -> None:
    """In 80 columns everything can be read: names and notes go on in the next line."""
    name, model, why = "a-machine-with-a-name-of-its-own", "organisation/" + "x" * 50, "no answer to report within 5 s"
    lines = shown(machine(name, wrapper(f"{name}-0", llm=model, status="restarting", reason=why)))
    text = "".join(lines).replace(" ", "")
    assert name in text
    assert sum(line.count("x") for line in lines[4:]) == 50
    assert len(lines) < 14


def test_wrappers_of_one_machine() -> None:
    """Several wrappers have a line each, below their machine's name, which stands there once."""
    lines = shown(machine("gpu-1", wrapper("gpu-1-0", llm="a"), wrapper("gpu-1-1", llm="b"), differs=["vllm 1"]))
    assert [line.split() for line in lines[4:]] == [["gpu-1", "0", "idle", "a", "vllm", "1"], ["0", "idle", "b"]]


# --- the commands ------------------------------------------------------------------------------------------


class FakeClient:
    """The client of a registry with one machine, whose states come one after the other."""

    drains: ClassVar[list[tuple[str | None, int]]] = []
    asked: ClassVar[list[str]] = []

    def __init__(self, _url: str, *, tenant: str | None, connect_for_s: float, **_: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def health(self) -> HealthState:
        return HEALTH

    def machines(self) -> list[MachineState]:
        return [machine()]

    def drain(self, machine_id: str) -> MachineState:
        self.asked.append(f"drain {machine_id}")
        return machine(drain="draining", leases=2)

    def undrain(self, machine_id: str) -> MachineState:
        self.asked.append(f"undrain {machine_id}")
        return machine()

    def wait_until_drained(
        self, machine_id: str, *, timeout_s: float | None, on_look: Callable[[MachineState], None]
    ) -> MachineState:
        self.asked.append(f"wait {machine_id} {timeout_s}")
        states = [machine(drain=drain, leases=leases) for drain, leases in self.drains]
        for state in states:
            on_look(state)
        if states[-1].drain == "draining":
            raise TimeoutError(f"machine {machine_id} is still being drained after {timeout_s:g} s")
        return states[-1]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    """The client that the commands use."""
    monkeypatch.setattr(cli_app, "RegistryClient", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [])
    return FakeClient


@pytest.mark.parametrize(
    ("command", "drains", "asked", "status", "said"),
    [
        (["drain", "a"], [], ["drain a"], 0, "a: draining: 2 LLMs still in use"),
        (["drain", "a", "--wait"], [("draining", 1), ("drained", 0)], ["drain a", "wait a None"], 0, "a: drained"),
        (
            ["drain", "a", "--wait", "--timeout", "5"],
            [("draining", 1)],
            ["drain a", "wait a 5.0"],
            1,
            "machine a is still being drained after 5 s; the draining continues",
        ),
        (["drain", "a", "--wait"], [(None, 0)], ["drain a", "wait a None"], 1, "a was undrained meanwhile"),
        (["undrain", "a"], [], ["undrain a"], 0, "a is used again"),
        (["status"], [], [], 0, "1 machine: 1 healthy"),
    ],
)
def test_commands(
    client: type[FakeClient],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    drains: list[tuple[str | None, int]],
    asked: list[str],
    status: int,
    said: str,
) -> None:
    """Each command asks the registry, says what came of it, and has the exit status of that."""
    out = io.StringIO()
    for module in (cli, shared, status_command):
        monkeypatch.setattr(module, "console", Console(file=out, width=80))
    monkeypatch.setattr(shared, "problems", Console(file=out, width=200))
    monkeypatch.setattr(client, "drains", drains)
    result = CliRunner().invoke(cli.app, command)
    assert (result.exit_code, client.asked) == (status, asked)
    assert said in out.getvalue()
