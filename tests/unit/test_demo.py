"""The demo's own part: what it asks for, and how it shows figures that are measured, estimated or not known."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console, RenderableType

from deployments import demo
from deployments.demo import Row
from deployments.llm_args import map_llmconfig
from registry.api import LLMConfig, RequestState
from registry.errors import StartFailed


def answer(joules: float | None = 2.0, score: float | None = 0.5, method: str = "measured") -> dict[str, Any]:
    """A wrapper's answer to a prompt."""
    low, high = (None, None) if method == "measured" or score is None else (score / 2, score * 2)
    return {
        "answer": "because",
        "usage": {"prompt_tokens": 5, "completion_tokens": 10},
        "energy": {"total_j": joules},
        "sci_score": score,
        "sci_method": method,
        "sci_low": low,
        "sci_high": high,
        "unit": "output_token",
        "flags": [],
    }


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


def served(*answers: dict[str, Any]) -> Row:
    """A row of an LLM that waited 1 s, started in 3 s and answered these in 2 s."""
    row = Row("org/tiny", asked_s=10.0, deploying_s=11.0, deployed_s=14.0, answers=list(answers), prompts_s=2.0)
    row.state = state("released", machine="node-1")
    return row


def shown(what: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


# --- figures -----------------------------------------------------------------------------------------------


def test_measured_figures_are_shown_plain() -> None:
    """Measured joules and scores are shown as they are, with the times and the tokens of the prompts."""
    text = shown(demo._results([served(answer(2.0, 0.5), answer(4.0, 0.25))]))
    line = next(line for line in text.splitlines() if "org/tiny" in line)
    assert line.split() == ["org/tiny", "node-1", "1.0", "3.0", "20", "10.0", "6.00", "0.38", "measured"]


def test_estimates_are_marked() -> None:
    """A figure that rests on an estimate carries its mark and its label, and the legend gives its range."""
    rows = [served(answer(2.0, 0.5), answer(2.0, 0.5, "modeled"))]
    line = next(line for line in shown(demo._results(rows)).splitlines() if "org/tiny" in line)
    assert "~4.00" in line
    assert "~0.5" in line
    assert "estimate" in line
    legend = shown(demo._legend(rows))
    assert "not a measurement" in legend
    assert "between 0.25 and 1" in legend


@pytest.mark.parametrize("missing", [answer(None, None, "unavailable"), answer(2.0, None)])
def test_one_unknown_makes_the_whole_unknown(missing: dict[str, Any]) -> None:
    """A sum or a mean with a hole in it is not known: never a zero, never the sum of the rest."""
    line = next(line for line in shown(demo._results([served(answer(), missing)])).splitlines() if "org/tiny" in line)
    assert "unknown" in line
    assert "0.00" not in line


def test_llm_that_did_not_come_has_no_figures() -> None:
    """A row without an answer says why, and shows no figure."""
    row = Row("org/tiny", asked_s=10.0, note="request r1 is failed: no memory")
    text = shown(demo._results([row]))
    assert "no memory" in text
    assert text.count("unknown") == 2
    assert shown(demo._legend([row])).strip() == ""


def test_flags_are_told() -> None:
    """What makes figures hard to compare is told below them; measured ones need no range."""
    flagged = {**answer(), "flags": ["contended", "cpu_not_covered"]}
    legend = shown(demo._legend([served(flagged)]))
    assert "Flags: contended, cpu_not_covered" in legend
    assert "estimate" not in legend


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


def test_pieces_of_a_stream_are_counted() -> None:
    """Each piece with text counts; the end of the stream and pieces without choices don't."""
    piece = 'data: {"choices": [{"delta": {"content": "x"}}]}'
    with stream_of(piece, piece, 'data: {"choices": []}', "data: [DONE]") as http:
        assert demo._stream(http, "http://x", "org/tiny") == 2


def test_refused_stream_is_told() -> None:
    """A completion that is refused is an error in the wrapper's words."""
    with stream_of("no such model", status=404) as http, pytest.raises(StartFailed, match="no such model"):
        demo._stream(http, "http://x", "org/tiny")


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
    assert demo._wait_ready(process, tmp_path / "up.log", record, 60, console()) == "http://x:1"


def test_registry_that_ends_tells_its_last_words(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """A registry that does not come up is an error in its own last words."""
    process = start(started, "")
    process.wait()
    (tmp_path / "up.log").write_text("first\ngreenprompt: port 1 is taken\n")
    with pytest.raises(StartFailed, match=r"^port 1 is taken$"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 60, console())
    (tmp_path / "up.log").write_text("")
    with pytest.raises(StartFailed, match="without a word"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 60, console())


def test_registry_that_is_never_ready(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """A registry that is not ready in its time is an error that names the time."""
    process = start(started, "import signal; signal.pause()")
    with pytest.raises(StartFailed, match=r"within 0 s"):
        demo._wait_ready(process, tmp_path / "up.log", tmp_path / "up.json", 0, console())


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
