"""lm_eval, as its users run it, over the address of a lease; in an environment of its own (make eval-check)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.cluster.conftest import REPOSITORY, Registry

pytestmark = [pytest.mark.cluster, pytest.mark.long]

LM_EVAL = REPOSITORY / ".venv-eval" / "bin" / "lm_eval"
QUESTIONS = ("What does a prompt cost?", "Which grid is green?", "Who waits in the queue?", "How warm is an LLM?")


def make_task(folder: Path, answers: dict[str, str]) -> str:
    """A task of lm_eval's, of these questions and the answers that count as right; its name."""
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in answers.items()), encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(samples)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["</s>"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return "tiny"


def test_lm_eval_over_a_lease(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int, tmp_path: Path
) -> None:
    """lm_eval gets from the address what the LLM answers: where its own answers count as right, all are."""
    config = llm("a")
    (request_id,) = registry.post(measurement_id, config)
    address = registry.until(request_id, "deployed")["url"]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
        answers = {
            question: client.completions.create(
                model=config["model"], prompt=question, max_tokens=8, temperature=0, stop=["</s>"]
            ).choices[0].text
            for question in QUESTIONS
        }  # fmt: skip
    arguments = {
        "model": config["model"],
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": None,
        "tokenized_requests": False,
        "num_concurrent": 2,
    }
    subprocess.run(
        [
            LM_EVAL, "run", "--model", "local-completions",
            "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
            "--include_path", tmp_path, "--tasks", make_task(tmp_path, answers), "--output_path", tmp_path / "results",
        ],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    registry.delete(request_id)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["n-samples"]["tiny"]["effective"] == len(QUESTIONS)
    assert found["results"]["tiny"]["exact_match,none"] == 1.0
