"""``greenprompt measure`` against a registry over real HTTP: every prompt once, whatever happens in between."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import stamina
import yaml
from rich.console import Console

from greenprompt_client.answers import AnswerError
from greenprompt_client.measure import run as measure_module
from greenprompt_client.measure.experiment import load_plan
from greenprompt_client.measure.prompting import PROMPT_TRIES
from greenprompt_client.measure.results import Results
from greenprompt_client.measure.run import MAX_BARREN_LEASES, run_measure, said
from registry.accounting.figures import figures_of
from registry.accounting.window_report import WindowReport
from registry.errors import BadSettings
from registry.wire.schemas import RequestState
from registry.wire.words import WindowKind
from tests.support.energy_windows import record
from tests.support.fake_registry_http import CREATED, HttpRegistry, Reply, error

LIMIT_S = 60
"""Longest wait for something that takes milliseconds."""

QUESTIONS = [f"Question {n}?" for n in range(1, 6)]


class Measure:
    """Measures two LLMs by the prompts, into the folder ``out``; ``shown`` is what the last run showed."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self.shown = ""

    def __call__(self, **fields: Any) -> bool:
        out = io.StringIO()
        try:
            return run_measure(load_plan(None, **self._fields | fields), Console(file=out, width=200))
        finally:
            self.shown = out.getvalue()


@pytest.fixture
def registry() -> Iterator[HttpRegistry]:
    with HttpRegistry() as server, stamina.set_testing(True, attempts=3):
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompts file with the questions."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": each}) + "\n" for each in QUESTIONS))
    return path


@pytest.fixture
def measure(registry: HttpRegistry, prompts: Path, tmp_path: Path) -> Measure:
    return Measure(llms=["org/a", "org/b"], prompts=prompts, output=tmp_path / "out", url=registry.url)


def lines(folder: Path, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def counted(folder: Path) -> Counter[tuple[str, int, str]]:
    """How many answers that count there are for each LLM, repetition and prompt."""
    return Counter((line["llm"], line["repetition"], line["prompt"]) for line in lines(folder) if not line["warmup"])


def every_prompt_once(folder: Path, llms: Sequence[str] = ("org/a", "org/b"), repetitions: int = 1) -> bool:
    wanted = {(llm, r, str(n + 1)) for llm in llms for r in range(1, repetitions + 1) for n in range(len(QUESTIONS))}
    return counted(folder) == Counter(wanted)


# --- when all goes well ------------------------------------------------------------------------------------


def test_everything_is_asked_once(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """Each LLM answers each prompt once in each repetition, on its own lease, and is given back."""
    assert measure(repetitions=2, concurrency=3)
    assert every_prompt_once(tmp_path / "out", repetitions=2)
    assert [state.status for state in registry.requests.values()] == ["released"] * 4
    assert [len(body["llms"]) for body in registry.posted] == [2, 2]
    assert len({body["measurementId"] for body in registry.posted}) == 1
    assert all(registry.keys)


def test_the_next_repetition_is_asked_for_before_the_last_llm_is_given_back(
    measure: Measure, registry: HttpRegistry, tmp_path: Path
) -> None:
    """A measurement that always holds or waits for something keeps its machine and its place in the queue."""
    statuses: list[list[str]] = []
    registry.on_post = lambda: statuses.append([state.status for state in registry.requests.values()])
    assert measure(repetitions=3)
    held = ["released", "deployed"]
    assert statuses == [[], held, ["released", "released", *held]]
    assert every_prompt_once(tmp_path / "out", repetitions=3)
    assert [state.status for state in registry.requests.values()] == ["released"] * 6


def test_a_repetition_that_is_refused_ahead_is_asked_for_later(
    measure: Measure, registry: HttpRegistry, tmp_path: Path
) -> None:
    """A full queue in the middle costs nothing that was answered: the next repetition is asked for once more."""
    refusals = iter([None, error(409, "not_now"), None])
    registry.on_post = lambda: next(refusals)
    assert measure(repetitions=2)
    assert "Repetition 2 is requested later" in measure.shown
    assert every_prompt_once(tmp_path / "out", repetitions=2)
    assert [state.status for state in registry.requests.values()] == ["released"] * 4


def test_line_has_all_that_is_known(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """A line tells what was asked of whom, when, by which lease and where, and all that the wrapper answered."""
    measure(llms=["org/a"])
    line = lines(tmp_path / "out")[-1]
    assert {
        "llm": "org/a",
        "repetition": 1,
        "warmup": False,
        "request_id": "r0",
        "machine": "gpu-1",
    }.items() <= line.items()
    assert (line["prompt"], line["question"], line["answer"]) == ("5", QUESTIONS[4], "because")
    assert (line["sci_score"], line["sci_method"], line["error"]) == (0.5, "measured", None)
    assert line["energy"] == {"total_j": 2.0}
    assert line["usage"]["completion_tokens"] == 10
    assert line["asked_at"] <= line["answered_at"]
    assert line["asked_at"].endswith("Z")
    assert line["duration_s"] > 0
    (lease,) = lines(tmp_path / "out", "leases.jsonl")
    assert (lease["requestId"], lease["llm"], lease["repetition"], lease["machine"]) == ("r0", "org/a", 1, "gpu-1")
    assert "address" not in lease


def test_warmup_is_marked_and_does_not_count(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """Each lease begins with prompts that begin like none of those that count, and that no figure is made of."""
    measure(llms=["org/a"], repetitions=2, warmup=2)
    warm = [line for line in lines(tmp_path / "out") if line["warmup"]]
    assert [line["repetition"] for line in warm] == [1, 1, 2, 2]
    assert [question for _, question in registry.prompted[:3]] == ["(1) Question 1?", "(2) Question 2?", "Question 1?"]
    (llm,) = json.loads((tmp_path / "out" / "summary.json").read_text())["llms"]
    (figures,) = llm["figures"]
    assert (llm["answers"], figures["warmups"], figures["joules_per_token"]["n"]) == (10, 4, 10)


def test_order_is_that_of_the_seed(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """LLMs are asked for in the order of experiment.yaml, which the seed alone makes, for each repetition anew."""
    llms = [f"org/{name}" for name in "abcdef"]
    measure(llms=llms, repetitions=3, warmup=0)
    order = yaml.safe_load((tmp_path / "out" / "experiment.yaml").read_text())["order"]
    asked = [[llm["model"] for llm in body["llms"]] for body in registry.posted]
    assert asked == [order[1], order[2], order[3]]
    assert len({tuple(each) for each in asked}) == 3
    assert all(sorted(each) == llms for each in asked)


def test_grade_and_gpu_type_are_sent_when_set(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """Both go along in the POST when the experiment says them, and are not there otherwise."""
    measure(llms=["org/a"])
    measure(llms=["org/a"], grade="measurement", gpu_type="H100", output=tmp_path / "other")
    assert not {"grade", "gpuType"} & registry.posted[0].keys()
    assert {"grade": "measurement", "gpuType": "H100"}.items() <= registry.posted[1].items()
    assert registry.posted[0]["measurementId"] != registry.posted[1]["measurementId"]


def test_prompts_are_in_flight_together(measure: Measure, registry: HttpRegistry) -> None:
    """As many prompts at once as the experiment says, and no more."""
    together = threading.Barrier(4)
    counts: list[int] = []
    now, lock = [0], threading.Lock()

    def count(_state: RequestState, _question: str) -> Reply | None:
        with lock:
            now[0] += 1
            counts.append(now[0])
        if len(counts) <= 4:
            together.wait(LIMIT_S)
        with lock:
            now[0] -= 1
        return None

    registry.on_prompt = count
    measure(llms=["org/a"], concurrency=4, warmup=0)
    assert max(counts) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"status": "queued", "position": 2}, "queued, place 2 in the queue"),
        ({"status": "deploying", "phase": "loading"}, "deploying, loading"),
        ({"status": "deploying", "phase": "downloading", "progress": 0.43}, "deploying, downloading 43%"),
        (
            {
                "status": "deploying",
                "phase": "downloading",
                "progress": 0.43,
                "bytesDone": 43,
                "bytesTotal": 5_240_000_000,
            },
            "deploying, downloading 43% of 5.24 GB",
        ),
    ],
)
def test_progress_says_what_is_waited_for(more: dict[str, Any], words: str) -> None:
    """The bar's line tells place and phase as the registry does."""
    plain = {"requestId": "r", "llmconfig": {}, "measurementId": 1, "address": None, "link": "", "createdAt": CREATED}
    assert said(RequestState.model_validate(plain | more)) == words


# --- final windows -----------------------------------------------------------------------------------------


def summary_of(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return told


@pytest.mark.parametrize("in_flight", [1, 4, 16])
def test_the_summary_is_that_of_the_final_windows(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, in_flight: int
) -> None:
    """Answers say 2 J each; the final windows have 20, 21 … J. The summary is theirs, and so is the report's figure."""
    registry.window = lambda each: replace(each, joules=20.0 + int(each.window.rpartition("-")[2].lstrip("p")))
    assert measure(llms=["org/a"], repetitions=2, concurrency=in_flight)
    counted = [each for each in registry.windows if each.kind == "prompt" and not each.warmup]
    assert len(counted) == 10
    (llm,) = summary_of(tmp_path / "out")["llms"]
    (figures,) = llm["figures"]
    found, (report,) = figures["joules_per_token"], figures_of(registry.windows)
    assert found["value"] == pytest.approx(sum(each.joules or 0 for each in counted) / 100, rel=1e-9)
    assert found == asdict(report.joules_per_token)
    assert figures["gco2eq_per_unit"] == asdict(report.gco2eq_per_unit)
    assert (found["leases"], found["prompts"], figures["warmups"], llm["provisional"]) == (2, 5, 4, 0)


def test_a_lease_that_a_dead_run_did_not_note_is_in_the_summary(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run dies between a hand-over and its note of it; the lease idles, 30 kJ. The next run ends it and counts it.

    The report has 30,100 J per 50 tokens with idle time: 5 prompts of 20 J and 10 tokens. So has the summary.
    """

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add_lease", dies)
        with pytest.raises(KeyboardInterrupt):
            measure(llms=["org/a"])
    registry._measured(record(1000, WindowKind.IDLE, request_id="r0", joules=30e3))
    assert measure(llms=["org/a"])
    (llm,) = summary_of(tmp_path / "out")["llms"]
    (figures,) = llm["figures"]
    (report,) = figures_of(registry.windows)
    assert figures["with_idle"] == asdict(report.with_idle)
    assert figures["with_idle"]["leases"] == 2
    assert [line["requestId"] for line in lines(tmp_path / "out", "leases.jsonl")] == ["r1", "r0"]


def test_windows_are_kept_once_with_the_name_of_their_prompt(
    measure: Measure, registry: HttpRegistry, tmp_path: Path
) -> None:
    """The folder has every final window, and a table that joins it with the client's prompt."""
    measure(llms=["org/a"])
    ids = [each["window"] for each in lines(tmp_path / "out", "windows.jsonl")]
    assert sorted(ids) == sorted(each.window for each in registry.windows)
    assert len(ids) == 8  # two warm-ups, five prompts, the lease
    with (tmp_path / "out" / "windows.csv").open(newline="") as file:
        table = {row["window"]: row["prompt"] for row in csv.DictReader(file)}
    named = {line["window"]: line["prompt"] for line in lines(tmp_path / "out")}
    assert {window: prompt for window, prompt in table.items() if prompt} == named


def test_late_windows_are_waited_for(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that come some looks later are in the summary."""
    looks = []

    def late(windows: list[WindowReport]) -> list[WindowReport]:
        looks.append(len(windows))
        return windows if len(looks) > 4 else windows[:2]

    registry.on_windows = late
    monkeypatch.setattr(measure_module, "WINDOWS_POLL_S", 0.0)
    assert measure(llms=["org/a"])
    assert summary_of(tmp_path / "out")["complete"]


def test_what_does_not_come_is_provisional_until_the_next_run(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the limit it is counted and named, and in no figure; the same command fetches it and asks nothing."""
    monkeypatch.setattr(measure_module, "WINDOWS_WAIT_S", 0.0)
    registry.on_windows = lambda windows: windows[:3]
    assert not measure(llms=["org/a"])
    summary = summary_of(tmp_path / "out")
    (llm,) = summary["llms"]
    assert (summary["complete"], llm["provisional"], llm["figures"][0]["prompts"]) == (False, 4, 1)
    assert "4 answers have no final window yet: repeat the command to fetch it." in measure.shown
    path = tmp_path / "out" / "windows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # as if it was killed while it wrote
    registry.on_windows = lambda windows: windows
    assert measure(llms=["org/a"])
    assert summary_of(tmp_path / "out")["llms"][0]["figures"][0]["prompts"] == 5
    assert len(registry.posted) == 1


def test_a_registry_that_has_forgotten_the_windows(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """What can't be fetched is provisional, with the reason; nothing is waited for in vain."""

    def forgotten(windows: list[WindowReport]) -> list[WindowReport]:
        registry.requests.clear()
        return windows

    registry.on_windows = forgotten
    assert not measure(llms=["org/a"], warmup=6)
    assert "Final windows can't be fetched: it says unknown_measurement" in measure.shown


def test_windows_of_another_kind_are_refused(measure: Measure, tmp_path: Path) -> None:
    """A windows.jsonl that no run has written is left as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "windows.jsonl").write_text("{}\n")
    with pytest.raises(BadSettings, match="has a line that is not an energy window"):
        measure()


# --- errors ------------------------------------------------------------------------------------------------


def test_refused_prompt_is_kept_as_such(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """A prompt that is refused for itself is an error in its place, asked once, and stops nothing."""
    registry.on_prompt = lambda _state, question: error(422, "invalid_field") if question == QUESTIONS[1] else None
    assert measure(llms=["org/a"], warmup=0)
    assert every_prompt_once(tmp_path / "out", ["org/a"])
    refused = next(line for line in lines(tmp_path / "out") if line["prompt"] == "2")
    assert refused["error"] == {"status": 422, "code": "invalid_field", "message": "it says invalid_field"}
    assert refused["answer"] is None
    (llm,) = json.loads((tmp_path / "out" / "summary.json").read_text())["llms"]
    assert (llm["answers"], llm["errors"], llm["missing"]) == (4, 1, 0)
    assert len(registry.prompted) == 5


@pytest.mark.parametrize("trouble", [error(503, "engine_not_ready", True), error(429, "too_many_prompts", True)])
def test_passing_trouble_is_waited_for(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, trouble: Reply
) -> None:
    """A prompt that can be answered in a moment is asked again, on the same lease."""
    troubles = [trouble, trouble]
    registry.on_prompt = lambda _state, _question: troubles.pop() if troubles else None
    assert measure(llms=["org/a"])
    assert every_prompt_once(tmp_path / "out", ["org/a"])
    assert len(registry.requests) == 1


def test_lost_lease_is_asked_for_again(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """An LLM whose lease ended is had by a new one, in the same order, and answers what is open, after a warm-up."""

    def expire(state: RequestState, question: str) -> Reply | None:
        if state.requestId == "r0" and question == QUESTIONS[2]:
            registry.end("r0", "expired")
            return error(410, "lease_ended")
        return None

    registry.on_prompt = expire
    assert measure(warmup=1)
    assert every_prompt_once(tmp_path / "out")
    first, again = registry.posted
    assert first["llms"] == again["llms"]
    assert registry.requests["r1"].status == "cancelled"
    leased = [line["request_id"] for line in lines(tmp_path / "out") if not line["warmup"]]
    assert leased == ["r0"] * 2 + ["r2"] * 3 + ["r3"] * 5


def test_llm_that_can_not_be_had_is_given_up(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """An LLM that fails again and again is left out, with the reason, until the next run; others are measured."""

    def fail(state: RequestState) -> RequestState:
        bad = state.llmconfig["model"] == "org/b" and state.status == "deployed"
        return registry.end(state.requestId, "failed", "no memory") if bad else state

    registry.on_poll = fail
    assert not measure(repetitions=2)
    assert every_prompt_once(tmp_path / "out", ["org/a"], repetitions=2)
    assert "no memory" in measure.shown
    assert "10 of 20 answers are missing" in measure.shown
    failed = [state for state in registry.requests.values() if state.status == "failed"]
    assert len(failed) == MAX_BARREN_LEASES
    registry.on_poll = lambda state: state
    assert measure(repetitions=2)
    assert every_prompt_once(tmp_path / "out", repetitions=2)


def test_refused_experiment_ends_at_once(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """What the registry refuses as a whole is told in its words, nothing is asked again, and the folder stays free."""
    registry.on_post = lambda: error(422, "llm_never_fits")
    with pytest.raises(AnswerError, match="it says llm_never_fits"):
        measure()
    assert len(registry.keys) == 1
    assert "repeat the command to continue" in measure.shown
    registry.on_post = lambda: None
    assert measure(llms=["org/a", "org/c"])  # corrected: the refused one does not bind the folder
    assert every_prompt_once(tmp_path / "out", ["org/a", "org/c"])


def test_no_answer_in_time_is_an_error(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """A prompt without an answer in its time is not asked for ever."""
    free = threading.Event()

    def slow(_state: RequestState, question: str) -> Reply | None:
        if question == QUESTIONS[0]:
            free.wait(LIMIT_S)
        return None

    registry.on_prompt = slow
    try:
        assert measure(llms=["org/a"], warmup=0, prompt_timeout_s=0.2)
    finally:
        free.set()
    late = next(line for line in lines(tmp_path / "out") if line["prompt"] == "1")
    assert late["error"] == {"status": None, "code": "no_answer", "message": "no answer within 0.2 s"}


@pytest.mark.parametrize("failure", [error(500, "engine_failed"), error(504, "gateway_timeout", True), (504, {})])
def test_failure_of_a_server_is_no_answer(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, failure: Reply
) -> None:
    """A 500, or a proxy's 504, is asked again up to PROMPT_TRIES times; what then has no answer is missing.

    Five prompts, of which the second fails twice and the fourth always: 1 + 3 + 1 + 3 + 1 = 9 are sent, four answers
    are there, and the next run asks the fourth alone.
    """
    left = {QUESTIONS[1]: 2, QUESTIONS[3]: 100}

    def fail(_state: RequestState, question: str) -> Reply | None:
        left[question] = left.get(question, 0) - 1
        return failure if left[question] >= 0 else None

    registry.on_prompt = fail
    assert not measure(llms=["org/a"], warmup=0)
    assert len(registry.prompted) == 9
    assert {prompt for _, _, prompt in counted(tmp_path / "out")} == {"1", "2", "3", "5"}
    assert "prompt 4 is not answered" in measure.shown
    (llm,) = summary_of(tmp_path / "out")["llms"]
    assert (llm["answers"], llm["errors"], llm["missing"]) == (4, 0, 1)
    left.clear()
    assert measure(llms=["org/a"], warmup=0)
    assert every_prompt_once(tmp_path / "out", ["org/a"])
    assert len(registry.prompted) == 10


def test_server_that_always_fails_is_given_up(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """A lease that leaves MAX_UNANSWERED prompts in a row without an answer is lost; the others are asked on another.

    Five prompts: three on the first lease, two on the second, each PROMPT_TRIES times.
    """
    registry.on_prompt = lambda _state, _question: error(500, "engine_failed")
    assert not measure(llms=["org/a"], warmup=0)
    assert Counter(registry.prompted).keys() == {("org/a", question) for question in QUESTIONS}
    assert min(Counter(registry.prompted).values()) >= PROMPT_TRIES  # one in flight is asked again by the next lease
    assert len(registry.requests) == 2
    assert counted(tmp_path / "out") == Counter()
    assert summary_of(tmp_path / "out")["llms"][0]["missing"] == 5


def test_prompt_that_took_too_long_keeps_its_error(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """The wrapper's own 504 says that the prompt takes longer than prompts may: it is not asked again."""
    registry.on_prompt = lambda _state, question: error(504, "prompt_too_long") if question == QUESTIONS[0] else None
    assert measure(llms=["org/a"], warmup=0)
    assert len(registry.prompted) == 5
    assert lines(tmp_path / "out")[0]["error"]["code"] == "prompt_too_long"


def test_llm_that_refuses_every_prompt(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """It is not complete, the reason is told, and the next run asks again: the LLM may have been mended."""

    def refuse(state: RequestState, _question: str) -> Reply | None:
        return error(400, "prompt_refused") if state.llmconfig["model"] == "org/b" else None

    registry.on_prompt = refuse
    assert not measure(warmup=0)
    assert not summary_of(tmp_path / "out")["complete"]
    assert "org/b: refused all 5 prompts; the reason of the first refusal: it says prompt_refused" in measure.shown
    registry.on_prompt = lambda _state, _question: None
    assert measure(warmup=0)
    assert [llm["errors"] for llm in summary_of(tmp_path / "out")["llms"]] == [0, 0]
    assert [llm["answers"] for llm in summary_of(tmp_path / "out")["llms"]] == [5, 5]
    assert len(registry.prompted) == 15


# --- going on ----------------------------------------------------------------------------------------------


AS_IN_A_TERMINAL = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from greenprompt_client.cli.main import main; main()"
)
"""The command, which hears Ctrl-C: what a shell starts in the background ignores it, and so would these tests' own."""


@pytest.fixture
def command(registry: HttpRegistry, prompts: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the command as a process of its own; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = ["measure", "--llm", "org/a", "--llm", "org/b", "--prompts", str(prompts), "--repetitions", "2"]
        words += ["--output", str(tmp_path / "out"), "--url", registry.url]
        process = subprocess.Popen(
            [sys.executable, "-c", AS_IN_A_TERMINAL, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "80"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


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


@pytest.mark.parametrize("prompt", [1, 5, 12])
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


def test_other_experiment_is_refused(measure: Measure, registry: HttpRegistry, prompts: Path, tmp_path: Path) -> None:
    """A folder goes on with its own experiment only, which may grow but not shrink; what differs is told by field."""
    measure(repetitions=2)
    prompts.write_text(json.dumps({"question": "Another?"}) + "\n")
    with pytest.raises(BadSettings) as caught:
        measure(repetitions=1, llms=["org/a"], concurrency=2)
    text = str(caught.value)
    assert "prompt '1' has changed; prompt '2' is missing now" in text
    assert "concurrency is 1 in the folder and 2 now" in text
    assert "repetitions is 2 in the folder and 1 now" in text
    assert "Only llms, prompts, repetitions may grow; for other changes use another folder" in text
    assert "llms.org/b is {" in text
    assert "in the folder and absent now" in text
    assert every_prompt_once(tmp_path / "out", repetitions=2)


def test_experiment_may_grow(measure: Measure, registry: HttpRegistry, prompts: Path, tmp_path: Path) -> None:
    """More prompts, LLMs and repetitions are asked alone; what is answered stays, and so does the order of before.

    2 LLMs x 5 prompts x 2 repetitions are 20; 3 x 6 x 3 are 54.
    """
    out = tmp_path / "out"
    assert measure(repetitions=2, warmup=0)
    first = (out / "answers.jsonl").read_text()
    order = yaml.safe_load((out / "experiment.yaml").read_text())["order"]
    with prompts.open("a") as file:
        file.write(json.dumps({"question": "One more?"}) + "\n")
    assert measure(repetitions=3, llms=["org/c", "org/b", "org/a"], warmup=0)
    assert "Continuing: 20 of 54 answers exist already." in measure.shown
    assert "Added: llms: 2 → 3, prompts: 5 → 6, repetitions: 2 → 3." in measure.shown
    assert (out / "answers.jsonl").read_text().startswith(first)
    assert set(counted(out).values()) == {1}
    assert len(counted(out)) == len(registry.prompted) == 54
    grown = yaml.safe_load((out / "experiment.yaml").read_text())
    assert grown["order"][1] == [*order[1], "org/c"]
    assert grown["order"][2] == [*order[2], "org/c"]
    assert sorted(grown["order"][3]) == ["org/a", "org/b", "org/c"]
    assert len({body["measurementId"] for body in registry.posted}) == 1
    with pytest.raises(BadSettings, match="repetitions is 3 in the folder and 2 now"):
        measure(repetitions=2, llms=["org/c", "org/b", "org/a"], warmup=0)


def test_refused_growth_leaves_the_folder_as_it_was(measure: Measure, registry: HttpRegistry) -> None:
    """An LLM that is added and refused does not bind the folder: the experiment of before is still complete."""
    assert measure(llms=["org/a"])
    registry.on_post = lambda: error(422, "llm_never_fits")
    with pytest.raises(AnswerError, match="it says llm_never_fits"):
        measure(llms=["org/a", "org/huge"])
    assert measure(llms=["org/a"])


def test_same_model_with_other_args_may_be_added(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """Names of LLMs stay when another of the same model is put before them."""
    hot = {"model": "org/a", "args": {"prompting": {"temperature": 1}, "deployment": {}}}
    assert measure(llms=["org/a"], warmup=0)
    assert measure(llms=[hot, "org/a"], warmup=0)
    assert every_prompt_once(tmp_path / "out", ["org/a", "org/a#2"])


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


def test_fields_of_a_data_set_are_carried_along(measure: Measure, prompts: Path, tmp_path: Path) -> None:
    """What else a prompt's line says is in the line of its answer; it is no part of the experiment."""
    prompts.write_text('{"question": "Why?", "topic": "water", "level": 3}\n')
    assert measure(llms=["org/a"])
    assert lines(tmp_path / "out")[-1]["fields"] == {"topic": "water", "level": 3}
    prompts.write_text('{"question": "Why?", "topic": "air"}\n')
    assert measure(llms=["org/a"])


def test_folder_is_for_one_process(measure: Measure, registry: HttpRegistry) -> None:
    """Two runs in one folder would ask twice: the second is refused."""
    refused: list[str] = []

    def meanwhile(_state: RequestState, _question: str) -> Reply | None:
        if not refused:
            refused.append("")
            with pytest.raises(BadSettings, match="another `greenprompt measure` uses it"):
                measure()
        return None

    registry.on_prompt = meanwhile
    assert measure()
    assert refused


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("answers.jsonl", '{"warmup": false}\n', "no experiment.yaml"),
        ("answers.jsonl", "what\n{}\n", "line 1 is not JSON"),
        ("experiment.yaml", "a: 1\n", "is not the folder of an experiment"),
        ("experiment.yaml", "- [", "is not the folder of an experiment"),
    ],
)
def test_folder_of_something_else_is_refused(
    measure: Measure, tmp_path: Path, name: str, text: str, problem: str
) -> None:
    """A folder with what no run has written is left as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(BadSettings, match=problem):
        measure()
    assert (tmp_path / "out" / name).read_text() == text


def test_figures_that_can_not_be_written(measure: Measure, tmp_path: Path) -> None:
    """A summary that can't be written is told; the answers are there, and the next run makes it of them."""
    (tmp_path / "out" / ".summary.json").mkdir(parents=True)
    with pytest.raises(BadSettings, match=r"summary\.json: can't be written: Is a directory"):
        measure()
    assert every_prompt_once(tmp_path / "out")
    (tmp_path / "out" / ".summary.json").rmdir()
    assert measure()


def test_folder_that_can_not_be_written(measure: Measure, tmp_path: Path) -> None:
    """A place where no folder can be is told with the system's words."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSettings, match="can't be written: Not a directory"):
        measure(output=tmp_path / "file" / "out")
