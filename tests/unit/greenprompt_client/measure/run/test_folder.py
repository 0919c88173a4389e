"""The folder of an experiment: what may be added to it, what it refuses, and that one process has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from greenprompt_client.answers import AnswerError
from registry.errors import BadSettings
from registry.wire.schemas import RequestState
from tests.support.fake_registry_http import HttpRegistry, Reply, error
from tests.support.measure_runs import Measure, counted, every_prompt_once, lines


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
