"""The trial of a checkpoint's tokenizer and chat template: what is tried, how often, and what is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.engine import checkpoint_trial
from deployments.engine.checkpoint_trial import TEMPLATE_CHARS, CheckpointTrial, Tokenizer, TrialFailed, tokenizer_of


class Runs:
    """Stands in for the process of a trial; ``outcome`` is what comes of it."""

    def __init__(self) -> None:
        self.count = 0
        self.outcome: str | Exception | None = None

    def __call__(self, _function: Callable[[], str | None]) -> str | None:
        self.count += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("engine_args", "tokenizer"),
    [
        ({}, Tokenizer("org/llm", "main")),
        ({"tokenizer": "/t", "trust_remote_code": True}, Tokenizer("/t", "main", own_code=True)),
        ({"skip_tokenizer_init": True}, None),
        ({"tokenizer_mode": "mistral"}, None),
    ],
)
def test_the_tokenizer_is_the_one_that_vllm_takes(engine_args: dict[str, object], tokenizer: Tokenizer | None) -> None:
    """The LLM's own or another one; none where vLLM runs nothing of the checkpoint's. Own code only if allowed."""
    assert tokenizer_of("org/llm", "main", engine_args) == tokenizer


def test_what_has_passed_is_not_tried_again_until_it_changes(tmp_path: Path) -> None:
    """A start of an LLM that was started before costs a look at its files; weights are none of them."""
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }}")
    trial, runs, tokenizer = CheckpointTrial(), Runs(), Tokenizer(str(tmp_path))
    for _ in range(3):
        trial.passes(tokenizer, runs)
    (tmp_path / "model.safetensors").write_text("x")
    trial.passes(tokenizer, runs)
    assert runs.count == 1
    trial.passes(tokenizer._replace(revision="other"), runs)
    assert runs.count == 2
    os.utime(template, ns=(1, 1))
    trial.passes(tokenizer, runs)
    assert runs.count == 3


class Loaded:
    """A tokenizer whose template fails for every chat; ``seen`` has the roles, and the arguments' names."""

    def __init__(self, error: Exception, chat_template: object = "{{ messages }}") -> None:
        self.chat_template = chat_template
        self.seen: list[tuple[list[str], set[str]]] = []
        self.texts: list[str] = []
        self._error = error

    def apply_chat_template(self, messages: list[dict[str, str]], *, tools: object, **more: object) -> str:
        given = {name for name, value in {"tools": tools, **more}.items() if value}
        self.seen.append(([each["role"] for each in messages], given))
        raise self._error

    def encode(self, text: str) -> None:
        self.texts.append(text)


def tried(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> str | None:
    """What the trial of a tokenizer says."""
    tokenizers = SimpleNamespace(get_tokenizer=lambda *_, **__: loaded)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(tokenizers=tokenizers))
    monkeypatch.setitem(sys.modules, "vllm.tokenizers", tokenizers)
    monkeypatch.setattr(checkpoint_trial, "_limit", lambda *_: None)
    return checkpoint_trial.attempt(Tokenizer("org/llm"), 1, 2**30)


def test_each_kind_of_chat_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long ones, a system's word, tools and their answers: also where the template refuses those before."""
    loaded = Loaded(ValueError("no system role"))
    assert tried(monkeypatch, loaded) is None
    roles = [roles for roles, _ in loaded.seen]
    assert roles[:3] == [["user"], ["system", "user"], ["user", "assistant", "user"]]
    assert ["user", "assistant", "tool"] in roles
    assert max(map(len, roles)) > 30
    given = [given for _, given in loaded.seen]
    assert sum("tools" in each for each in given) == 2
    assert sum("add_generation_prompt" not in each for each in given) == 1
    assert {"enable_thinking", "documents", "reasoning_effort"} <= set().union(*given)
    assert max(map(len, loaded.texts)) == 2000
    assert tried(monkeypatch, Loaded(MemoryError())) == "take more than 1 GiB of memory"


@pytest.mark.parametrize(
    "template", ["x" * (TEMPLATE_CHARS + 1), {"default": "x", "tool_use": "x" * (TEMPLATE_CHARS + 1)}]
)
def test_a_very_long_template_is_not_rendered(monkeypatch: pytest.MonkeyPatch, template: object) -> None:
    """The wrapper's event loop would parse it; the longest one counts."""
    loaded = Loaded(ValueError(), template)
    problem = "can't be used: the template has 262,145 characters, and at most 262,144 are read"
    assert tried(monkeypatch, loaded) == problem
    assert loaded.seen == []


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (TimeoutError(), "its tokenizer and chat template do not end within 20 s"),
        (
            RuntimeError("exit code -24"),
            "end the process that tries them, or take more than 20 s of processor time: exit code -24",
        ),
        ("take more than 4 GiB of memory", "its tokenizer and chat template take more than 4 GiB of memory"),
    ],
)
def test_a_failure_tells_its_reason_and_is_tried_again(outcome: str | Exception, reason: str) -> None:
    """A checkpoint that is mended meanwhile has its chance."""
    trial, runs = CheckpointTrial(), Runs()
    runs.outcome = outcome
    with pytest.raises(TrialFailed) as caught:
        trial.passes(Tokenizer("org/llm"), runs)
    assert reason in str(caught.value)
    runs.outcome = None
    trial.passes(Tokenizer("org/llm"), runs)
    assert runs.count == 2


def test_a_timeout_names_the_limit_that_held() -> None:
    """A host that starts cold gives the trial time to import vLLM."""
    runs = Runs()
    runs.outcome = TimeoutError()
    with pytest.raises(TrialFailed, match="do not end within 140 s"):
        CheckpointTrial().passes(Tokenizer("org/llm"), runs, 140.0)
