"""``greenprompt measure`` goes on where a run ended that was killed or interrupted: every prompt once all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from greenprompt_client.measure import run as measure_module
from greenprompt_client.measure.prompting import PROMPT_TRIES
from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import HttpRegistry, Reply, error
from tests.support.measure_runs import LIMIT_S, QUESTIONS, Measure, counted, every_prompt_once, summary_of
from tests.support.processes import ended_at_last

AS_IN_A_TERMINAL = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from greenprompt_client.cli.main import main; main()"
)
"""The command, which hears Ctrl-C: what a shell starts in the background ignores it, and so would these tests' own."""


@pytest.fixture
def command(registry: HttpRegistry, prompts: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the command as a process of its own; killed at the end."""
    words = ["measure", "--llm", "org/a", "--llm", "org/b", "--prompts", str(prompts), "--repetitions", "2"]
    words += ["--output", str(tmp_path / "out"), "--url", registry.url]
    environment = os.environ | {"COLUMNS": "80"}
    with ended_at_last() as start:
        yield lambda: start([sys.executable, "-c", AS_IN_A_TERMINAL, *words], stderr=subprocess.STDOUT, env=environment)


def hold_at(registry: HttpRegistry, prompt: int) -> tuple[threading.Event, threading.Event]:
    """The so-manieth prompt is not answered until the second event; the first is set when it has come."""
    come, go = threading.Event(), threading.Event()

    def hold(_state: RequestState, _question: str) -> Reply | None:
        if len(registry.prompted) == prompt:
            come.set()
            go.wait(LIMIT_S)
        return None

    registry.on_prompt = hold
    return come, go


@pytest.mark.parametrize("prompt", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 12))])
def test_killed_run_is_gone_on_with(
    command: Callable[[], subprocess.Popen[str]], registry: HttpRegistry, tmp_path: Path, prompt: int
) -> None:
    """After kill -9 in a warm-up, or between answers, the same command gives every prompt one answer that counts."""
    come, go = hold_at(registry, prompt)
    killed = command()
    assert come.wait(LIMIT_S)
    killed.send_signal(signal.SIGKILL)
    killed.wait(LIMIT_S)
    go.set()
    before = counted(tmp_path / "out")
    held = {state.requestId for state in registry.open}
    assert held

    shown, _ = (again := command()).communicate(timeout=LIMIT_S)
    assert again.returncode == 0, shown
    assert every_prompt_once(tmp_path / "out", repetitions=2)
    assert before.keys() <= counted(tmp_path / "out").keys()
    assert registry.open == []
    assert f"{sum(before.values())} of 20 answers exist already; " in shown
    assert f"{len(held)} requests of the last run were released" in shown
    assert len({body["measurementId"] for body in registry.posted}) == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["complete"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_gives_its_llms_back(
    command: Callable[[], subprocess.Popen[str]], registry: HttpRegistry, tmp_path: Path, by: signal.Signals
) -> None:
    """Ctrl-C, or a scheduler's end: LLMs are given back, figures so far written, and it says how to go on."""
    come, go = hold_at(registry, 5)
    process = command()
    assert come.wait(LIMIT_S)
    deadline_s = time.monotonic() + LIMIT_S
    while not counted(tmp_path / "out"):  # the second prompt is sent while the answer to the first is being stored
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(by)
    assert registry.given_back.wait(LIMIT_S)
    go.set()
    shown, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    missing = 20 - sum(counted(tmp_path / "out").values())
    assert missing in (18, 19)  # the second may be on its way
    assert f"{missing} of 20 answers are missing: repeat the command to continue" in shown
    assert not json.loads((tmp_path / "out" / "summary.json").read_text())["complete"]


def test_torn_line_is_dropped(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """A line that was being written when the machine died is no answer: that prompt is asked again."""
    measure(llms=["org/a"], warmup=0)
    path = tmp_path / "out" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert measure(llms=["org/a"], warmup=0)
    assert every_prompt_once(tmp_path / "out", ["org/a"])
    assert [question for _, question in registry.prompted[5:]] == [QUESTIONS[4]]


def test_finished_experiment_asks_nothing(measure: Measure, registry: HttpRegistry) -> None:
    """Again, when all is answered: the figures are shown, and no LLM is asked for."""
    measure()
    assert measure()
    assert len(registry.posted) == 1
    assert "org/a" in measure.shown


def test_registry_that_has_lost_its_state(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """The run goes on as another measurement, which is told; what has an answer and its window is not asked again."""
    registry.on_prompt = lambda _state, question: error(500, "x") if question in QUESTIONS[3:] else None
    assert not measure(llms=["org/a"], warmup=0)
    registry.forget()
    registry.on_prompt = lambda _state, _question: None
    assert measure(llms=["org/a"], warmup=0)
    first, second = (body["measurementId"] for body in registry.posted)
    assert first != second
    assert f"The registry has no measurement {first}; continuing as measurement {second}." in measure.shown
    told = yaml.safe_load((tmp_path / "out" / "experiment.yaml").read_text())
    assert (told["measurement_id"], told["earlier_measurement_ids"]) == (second, [first])
    assert every_prompt_once(tmp_path / "out", ["org/a"])
    assert len(registry.prompted) == 3 + 2 * PROMPT_TRIES + 2


def test_answers_whose_windows_were_lost_are_asked_again(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its final window an answer is in no figure: when that can't come any more, it is asked again."""
    monkeypatch.setattr(measure_module, "WINDOWS_WAIT_S", 0.0)
    registry.on_windows = lambda windows: windows[:2]
    assert not measure(llms=["org/a"], warmup=0)
    registry.forget()
    registry.on_windows = lambda windows: windows
    assert measure(llms=["org/a"], warmup=0)
    assert "3 prompts are asked again, because their final windows are lost" in measure.shown
    (llm,) = summary_of(tmp_path / "out")["llms"]
    assert (llm["answers"], llm["provisional"], llm["figures"][0]["prompts"]) == (5, 0, 5)
    assert measure(llms=["org/a"], warmup=0)
    assert len(registry.posted) == 2
