"""The demo's own part: what it asks for, and how it shows figures that are measured, estimated or not known."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console, RenderableType

from deployments.models.args.mapping import map_llmconfig
from greenprompt_client.client import RegistryClient
from greenprompt_client.demo import demo
from greenprompt_client.demo.demo import Row
from greenprompt_client.held_lease import HeldLease
from greenprompt_client.signals import one_signal
from registry.accounting.window_report import WindowReport, window_report
from registry.errors import StartFailed
from registry.wire.schemas import LLMConfig, RequestState
from registry.wire.words import WindowKind
from tests.support.energy_windows import iso, kept, record


def answer() -> dict[str, Any]:
    """A wrapper's answer to a prompt; what it says of energy is provisional."""
    return {"answer": "because", "usage": {"prompt_tokens": 5, "completion_tokens": 10}, "energy": {"total_j": 99.0}}


def final(number: int, joules: float | None = 2.0, **more: Any) -> WindowReport:
    """The final window of a prompt of 10 tokens."""
    (row,) = kept(record(number, joules=joules, resolution_j=0.02, units=10, request_id="r1", **more))
    return window_report(row, None, iso)


def state(status: str, **more: Any) -> RequestState:
    return RequestState(
        requestId="r1",
        llmconfig={},
        status=status,
        measurementId=1,
        address=None,
        link="",
        createdAt="2026-01-01T00:00:00.000Z",
        **more,
    )


def served(*windows: WindowReport, answers: int = 2) -> Row:
    """A row of an LLM that waited 1 s, started in 3 s and answered in 2 s; these are its final windows."""
    row = Row("org/tiny", "r1", asked_s=10.0, deploying_s=11.0, deployed_s=14.0, prompts_s=2.0)
    row.answers, row.windows = [answer()] * answers, list(windows)
    row.state = state("released", machine="node-1")
    return row


def shown(what: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


# --- figures -----------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_final_windows() -> None:
    """2 and 4 J for 20 tokens are 0.3 J per token, whatever the answers said; the score has its mark."""
    text = shown(demo._results([served(final(1), final(2, 4.0))]))
    line = next(line for line in text.splitlines() if "org/tiny" in line)
    assert line.split()[:7] == ["org/tiny", "node-1", "1.0", "3.0", "20", "10.0", "0.3"]
    assert line.split()[7].startswith("~0.002")
    assert line.split()[-1] == "measured"


def test_estimates_are_marked() -> None:
    """A figure that rests on an estimate carries its mark and its label, and the legend gives its bounds."""
    rows = [served(final(1, label="modeled"), final(2))]
    line = next(line for line in shown(demo._results(rows)).splitlines() if "org/tiny" in line)
    assert "~0.2" in line
    assert "estimate" in line
    legend = shown(demo._legend(rows))
    assert "~: not measured" in legend
    assert "score with its bounds: ~0.002" in legend


def test_what_is_not_known_is_left_out_and_said() -> None:
    """A window without joules is in no figure, and the legend counts it."""
    rows = [served(final(1), final(2, None, flags=("too_short",)))]
    line = next(line for line in shown(demo._results(rows)).splitlines() if "org/tiny" in line)
    assert line.split()[6] == "0.2"
    legend = shown(demo._legend(rows))
    assert "Not known, or left out: 1 of 2 windows have no known amount (too_short)." in legend
    assert "Flags: too_short" in legend
    assert "bounds" not in shown(demo._legend([served(final(1, None))]))


def test_llm_that_did_not_come_has_no_figures() -> None:
    """A row without an answer says why, and shows no figure; answers without final windows have none either."""
    row = Row("org/tiny", asked_s=10.0, note="request r1 is failed: no memory")
    assert "no memory" in shown(demo._results([row]))
    assert shown(demo._legend([row])).strip() == ""
    assert "No final energy window has arrived." in shown(demo._legend([served()]))


class StandIn:
    """A registry whose final windows come one look after another."""

    def __init__(self, *looks: list[WindowReport]) -> None:
        self.looks = list(looks)

    def windows(self, _measurement_id: int) -> list[WindowReport]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def test_final_windows_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the lease's own window is there, or the limit has passed."""
    monkeypatch.setattr(demo, "POLL_S", 0.0)
    (lease,) = (window_report(row, None, iso) for row in kept(record(9, WindowKind.LEASE, request_id="r1")))
    row, none = served(), Row("org/other", "r2")
    demo._await_windows(StandIn([], [final(1)], [final(1), lease]), [row, none])  # type: ignore[arg-type] # a stand-in
    assert [each.kind for each in row.windows] == ["prompt", "lease"]
    assert none.windows == []
    monkeypatch.setattr(demo, "WINDOWS_WAIT_S", 0.0)
    demo._await_windows(StandIn([final(1)]), [row])  # type: ignore[arg-type] # a stand-in
    assert [each.kind for each in row.windows] == ["prompt"]


# --- progress ----------------------------------------------------------------------------------------------


def test_times_are_those_of_the_first_news() -> None:
    """The start of the deployment and the hand-over are noted when they are first heard of."""
    row = Row("m")
    row.heard(state("queued", position=2))
    assert (row.deploying_s, row.deployed_s) == (None, None)
    row.heard(state("deploying"))
    first = row.deploying_s
    row.heard(state("deploying", phase="loading"))
    assert first is not None
    assert row.deploying_s == first
    row.heard(state("deployed"))
    assert row.deployed_s is not None
    assert row.deployed_s >= first


def test_llm_that_was_warm_has_both_times() -> None:
    """An LLM that is deployed at the first look started in no time."""
    row = Row("m")
    row.heard(state("deployed"))
    assert row.deploying_s == row.deployed_s


def test_progress_shows_where_each_request_stands() -> None:
    """Status, place, phase and reason are shown as the registry tells them."""
    waiting, loading = Row("org/a", state=state("queued", position=2, reason="in use")), Row("org/b")
    loading.heard(state("deploying", phase="loading"))
    text = shown(demo._progress([waiting, loading, Row("org/c")]))
    for word in ("queued", "2", "in use", "deploying", "loading", "org/c"):
        assert word in text


@pytest.mark.parametrize(
    ("model", "expected"), [("org/tiny", "org/tiny"), ("gpt2", "gpt2"), ("/somewhere/build/llms/a", "llms/a")]
)
def test_long_paths_are_shortened(model: str, expected: str) -> None:
    """A path is shown by its end, an id in full."""
    assert demo._short(model) == expected


# --- what it does ------------------------------------------------------------------------------------------


def test_demo_asks_as_the_contract_says() -> None:
    """The llmconfig of the demo is one of the contract, in Hugging Face's words, and maps to the engine."""
    config = demo._llmconfig("org/tiny")
    assert LLMConfig.model_validate(config).model_dump() == config
    mapped = map_llmconfig(config)
    assert mapped.spec.model == "org/tiny"
    assert any("device_map" in note for note in mapped.notes)


def stream_of(*lines: str, status: int = 200) -> httpx.Client:
    content = "".join(f"{line}\n\n" for line in lines)
    return httpx.Client(transport=httpx.MockTransport(lambda _request: httpx.Response(status, text=content)))


def held_lease(http: httpx.Client) -> HeldLease:
    state = RequestState(
        requestId="r", llmconfig={}, status="deployed", measurementId=1, address=None, link="", createdAt=""
    )
    return HeldLease(state, "http://x/wrappers/a-0/lease_1", http)


def test_pieces_of_a_stream_are_counted() -> None:
    """Each piece with text counts; the end of the stream and pieces without choices don't."""
    piece = 'data: {"choices": [{"delta": {"content": "x"}}]}'
    with stream_of(piece, piece, 'data: {"choices": []}', "data: [DONE]") as http:
        assert demo._stream(http, held_lease(http), "org/tiny") == 2


def test_refused_stream_is_told() -> None:
    """A completion that is refused is an error in the wrapper's words."""
    with stream_of("no such model", status=404) as http, pytest.raises(StartFailed, match="no such model"):
        demo._stream(http, held_lease(http), "org/tiny")


# --- its own registry --------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts; ended and waited for."""
    monkeypatch.setattr(demo, "POLL_S", 0.005)
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[bytes]], code: str) -> subprocess.Popen[bytes]:
    started.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.DEVNULL))
    return started[-1]


def console() -> Console:
    return Console(file=io.StringIO())


def test_ready_registry_is_found(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """The registry's address is taken from its record, once it is there."""
    process = start(started, "import signal; signal.pause()")
    record = tmp_path / "up.json"
    record.write_text(json.dumps({"pid": 1, "url": "http://x:1", "dashboard": "http://d"}))
    assert demo._wait_ready(process, tmp_path / "up.log", record, 60, console(), lacks=str) == "http://x:1"


def test_registry_that_ends_tells_its_last_words(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """A registry that does not come up is an error in its own last words."""
    process = start(started, "")
    process.wait()
    (tmp_path / "up.log").write_text("first\ngreenprompt: port 1 is taken\n")
    with pytest.raises(StartFailed, match=r"^port 1 is taken$"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 60, console(), lacks=str)
    (tmp_path / "up.log").write_text("")
    with pytest.raises(StartFailed, match="without a message"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 60, console(), lacks=str)


def test_registry_that_is_never_ready(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """A registry that is not ready in its time is an error that names the time."""
    process = start(started, "import signal; signal.pause()")
    with pytest.raises(StartFailed, match=r"within 0 s"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 0, console(), lacks=str)


def test_a_slow_start_says_what_it_waits_for(
    started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo is not silent while its registry can't start: it prints what is lacking, again and again."""
    monkeypatch.setattr(demo, "TELL_EVERY_S", 0.02)
    process = start(started, "import signal; signal.pause()")
    said = console()
    with pytest.raises(StartFailed):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 0.2, said, lacks=lambda: "m: [no] engine")
    assert isinstance(said.file, io.StringIO)
    lines = said.file.getvalue().splitlines()
    assert len(lines) >= 2
    assert lines[0] == "Waiting for the registry, 0 of at most 0.2 s: m: [no] engine"


def test_what_a_registry_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is what its wrappers say; while it doesn't answer, the last line of its output."""
    log = tmp_path / "up.log"
    log.write_text("")
    answers: list[httpx.Response | Exception] = []

    def answered(_request: httpx.Request) -> httpx.Response:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Client(RegistryClient):
        def __init__(self, url: str, **options: Any) -> None:
            super().__init__(url, **options)
            self._http = httpx.Client(base_url=url, transport=httpx.MockTransport(answered))

    monkeypatch.setattr(demo, "RegistryClient", Client)
    url = "http://127.0.0.1:1"
    answers.append(httpx.ConnectError("refused"))
    assert demo._lacks(url, log) == "it says nothing yet"
    log.write_text("first\nStarting Ray …\n")
    answers.append(httpx.Response(503, text="no"))
    assert demo._lacks(url, log) == "Starting Ray …"
    answers.append(httpx.Response(200, json=[]))
    assert demo._lacks(url, log) == "no wrapper answers yet"
    wrapper = {"wrapper": "m-0", "status": "starting", "gpus": 0, "llm": None, "leased": False, "reason": "no memory"}
    machine = {"machine": "m", "address": "10.0.0.1", "alive": True, "gpus": 0, "gpuType": None, "memoryBytes": None}
    answers.append(httpx.Response(200, json=[{**machine, "wrappers": [wrapper, {**wrapper, "reason": None}]}]))
    assert demo._lacks(url, log) == "m: starting; no memory, m: starting"


# Stands for `greenprompt up`: it takes a moment to end, and leaves a file when it has ended in order.
UP = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["GREENPROMPT_STATE_DIR"])
def end(*_):
    time.sleep(0.5)
    pathlib.Path(os.environ["ENDED"]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
(folder / "up.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "dashboard": "d"}))
while True:
    signal.pause()
"""
DEMO = """
import subprocess, sys, time
from pathlib import Path
from rich.console import Console
from greenprompt_client.client import RegistryClient
from greenprompt_client.demo.demo import _registry
from greenprompt_client.signals import one_signal
started = subprocess.Popen
subprocess.Popen = lambda command, **how: started([sys.executable, "-S", "-c", sys.argv[2]], **how)
with one_signal(), _registry(Path(sys.argv[1]), Console()):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_the_demo_started(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM ends the registry like Ctrl-C, and further signals don't break its end."""
    ended = tmp_path / "ended"
    command = [sys.executable, "-c", DEMO, str(Path("configs/local.yaml").absolute()), UP]
    environment = os.environ | {"ENDED": str(ended)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline().strip() != "ready":
                assert process.poll() is None
            for _ in range(3):
                process.send_signal(number)
                time.sleep(0.1)
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert ended.exists()
    assert "Everything that was started has ended." in said


def test_signals_are_as_before_after_the_demo() -> None:
    """The first signal is an interrupt, the second nothing; afterwards the handlers are those of before."""
    before = signal.getsignal(signal.SIGTERM)
    with one_signal():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lost_terminal_is_ignored_under_nohup() -> None:
    """If SIGHUP is ignored at the start, it does not end the command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_signal():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_registry_is_ended(started: list[subprocess.Popen[bytes]]) -> None:
    """The registry is told to end, waited for, and a second end is no error."""
    process = start(started, "import signal; signal.pause()")
    demo._end(process)
    assert process.returncode is not None
    demo._end(process)


def test_registry_that_does_not_end_is_killed(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that does not end in its time is killed, and that is said."""
    monkeypatch.setattr(demo, "END_LIMIT_S", 0.01)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); [*iter(signal.pause, 1)]"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as process:
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()  # it is deaf from now on
        with pytest.raises(StartFailed, match="was killed"):
            demo._end(process)
    assert process.returncode == -9
