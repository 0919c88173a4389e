"""Prompts that are refused, leases that are lost, and servers that fail while ``greenprompt measure`` runs."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from greenprompt_client.answers import AnswerError
from greenprompt_client.measure.prompting import PROMPT_TRIES
from greenprompt_client.measure.run import MAX_BARREN_LEASES
from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import HttpRegistry, Reply, error
from tests.support.measure_runs import LIMIT_S, QUESTIONS, Measure, counted, every_prompt_once, lines, summary_of


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
    assert "10 of 10 answers are missing.\n" in measure.shown  # a repetition would be refused, too
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
