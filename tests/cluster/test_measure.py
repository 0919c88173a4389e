"""``greenprompt measure`` as its users run it: against a real registry, killed in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.conftest import Registry

pytestmark = pytest.mark.cluster

PROMPTS = 50
KILLED_AFTER = 20
LIMIT_S = 120


def counted(answers: Path) -> Counter[tuple[str, str]]:
    """How many answers that count there are by LLM and prompt; a torn last line is none."""
    whole = answers.read_bytes().split(b"\n")[:-1] if answers.exists() else []
    lines: list[dict[str, Any]] = [json.loads(line) for line in whole]
    return Counter((line["llm"], line["prompt"]) for line in lines if not line["warmup"])


def test_killed_and_resumed_experiment_has_every_prompt_once(
    registry: Registry, llm: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Two LLMs, 50 prompts, kill -9 in the middle: the same command gives every prompt one answer, and figures."""
    prompts, experiment, folder = tmp_path / "prompts.jsonl", tmp_path / "experiment.yaml", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(PROMPTS)))
    llms = [llm("a"), llm("b")]
    experiment.write_text(yaml.safe_dump({"llms": llms, "prompts": str(prompts), "output": str(folder)}))

    command = [sys.executable, "-m", "greenprompt_client.cli.main", "measure", str(experiment), "--url", registry.url]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while counted(folder / "answers.jsonl").total() < KILLED_AFTER:
        with suppress(subprocess.TimeoutExpired):
            killed.wait(0.05)
            pytest.fail(f"it ended by itself:\n{killed.communicate()[0]}")
    killed.kill()
    killed.communicate()
    before = counted(folder / "answers.jsonl")
    assert before.total() < 2 * PROMPTS

    wide = os.environ | {"COLUMNS": "200"}
    again = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_S, env=wide)
    assert again.returncode == 0, again.stdout + again.stderr
    after = counted(folder / "answers.jsonl")
    assert after == Counter((each["model"], str(n + 1)) for each in llms for n in range(PROMPTS))
    assert before.keys() <= after.keys()
    assert f"{before.total()} of 100 answers exist already; 2 requests of the last run were released" in again.stdout
    assert "~" in again.stdout
    assert "estimate" in again.stdout

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"]
    report = httpx.get(f"{registry.url}/measurements/{summary['measurement_id']}/report", timeout=60).json()
    in_report = {each["llm"]: each for each in report["llms"]}
    for told in summary["llms"]:
        assert (told["answers"], told["missing"], told["errors"], told["provisional"]) == (PROMPTS, 0, 0, 0)
        (figures,) = told["figures"]
        joules = figures["joules_per_token"]
        assert joules["n"] >= PROMPTS
        assert joules["bound_low"] <= joules["value"] <= joules["bound_high"]
        assert figures["warmups"] >= 2
        assert figures["batch"]["in_flight_max"] >= 1
        (same,) = in_report[told["llm"]]["figures"]
        assert {**same, "flags": None} == {**figures, "flags": None}
    windows = (folder / "windows.jsonl").read_text().splitlines()
    assert len({json.loads(line)["window"] for line in windows}) == len(windows)
    measurement = httpx.get(f"{registry.url}/measurements/{summary['measurement_id']}", timeout=30).json()
    assert all(request["endedAt"] for request in measurement["requests"])


def test_experiment_grows(registry: Registry, llm: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Two LLMs, two repetitions; then one more prompt and one more LLM: only these are asked, on the same machine.

    2 x 3 x 2 = 12 answers; 3 x 4 x 2 = 24 with the new ones.
    """
    prompts, folder = tmp_path / "prompts.json", tmp_path / "out"
    questions = [{"instruction": f"What is {n}?", "topic": "numbers"} for n in range(3)]

    def measure(*llms: dict[str, Any]) -> str:
        prompts.write_bytes(b"\xef\xbb\xbf" + json.dumps(questions, indent=2).replace("\n", "\r\n").encode())
        experiment = tmp_path / "experiment.yaml"
        experiment.write_text(yaml.safe_dump({"llms": list(llms), "prompts": str(prompts), "output": str(folder)}))
        command = [
            sys.executable,
            "-m",
            "greenprompt_client.cli.main",
            "measure",
            str(experiment),
            "--url",
            registry.url,
        ]
        command += ["--repetitions", "2", "--question-field", "instruction", "--warmup", "1"]
        command += ["--arg", "max_new_tokens=8", "--tenant", "growing", "--priority", "high"]
        wide = os.environ | {"COLUMNS": "200"}
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_S, env=wide)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    measure(llm("a"), llm("b"))
    before = (folder / "answers.jsonl").read_bytes()
    assert set(counted(folder / "answers.jsonl").values()) == {2}
    assert counted(folder / "answers.jsonl").total() == 12
    questions.append({"instruction": "And one more?", "topic": "growth"})
    shown = measure(llm("a", temperature=0.5), llm("a"), llm("b"))
    assert "Continuing: 12 of 24 answers exist already." in shown
    assert "Added: llms: 2 → 3, prompts: 3 → 4." in shown
    after = (folder / "answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert set(counted(folder / "answers.jsonl").values()) == {2}
    assert counted(folder / "answers.jsonl").total() == 24
    last = json.loads(after.splitlines()[-1])
    assert last["fields"]["topic"] in {"numbers", "growth"}
    assert last["usage"]["completion_tokens"] <= 8
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"]
    assert [(each["answers"], len(each["figures"])) for each in summary["llms"]] == [(8, 1)] * 3
