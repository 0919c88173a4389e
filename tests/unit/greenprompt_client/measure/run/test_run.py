"""``greenprompt measure`` when all goes well: every prompt once, in order, with all that is known of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from greenprompt_client.notation import state_words
from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import CREATED, HttpRegistry, Reply, error
from tests.support.measure_runs import LIMIT_S, QUESTIONS, Measure, every_prompt_once, lines


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
    assert state_words(RequestState.model_validate(plain | more)) == words
