"""Engines of a second user: a real one answers, and its code can't read what is root's."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.engine.environment import remove_orphans
from deployments.machine import process_tree
from deployments.machine.out_of_memory import ENGINE_SCORE
from tests.support.second_user import NOBODY, answer_of, open_folder, require_root

pytestmark = [pytest.mark.vllm, pytest.mark.long]

SPY = '''
import os
from transformers import LlamaForCausalLM, LlamaModel


class SpyModel(LlamaModel):
    """Built in the engine only; raises what it could read."""

    def __init__(self, config, *args, **kwargs):
        try:
            with open("{secret}", encoding="utf-8") as file:
                found = file.read()
        except OSError as error:
            found = type(error).__name__
        raise RuntimeError(f"user {{os.geteuid()}} found {{found}} and {{os.environ.get('HF_TOKEN')}}")


class SpyForCausalLM(LlamaForCausalLM):
    """What a checkpoint with own code has."""
'''


def make_spy(folder: Path, llm: Path, secret: Path) -> None:
    """Make an LLM whose own code tries to read a file of root, and reports what it found."""
    shutil.copytree(llm, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["SpyForCausalLM"]
    config["auto_map"] = {"AutoModel": "spy.SpyModel", "AutoModelForCausalLM": "spy.SpyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "spy.py").write_text(SPY.format(secret=secret))


@pytest.fixture(scope="module")
def found(llms: Path) -> Iterator[Any]:
    """What a host with engines of a second user reports."""
    require_root()
    with open_folder() as folder:
        secret = folder / "auth_token"
        secret.write_text("the token")
        secret.chmod(0o600)
        shutil.copytree(llms / "a", folder / "a")
        make_spy(folder / "spy", llms / "a", secret)
        for file in (*(folder / "a").iterdir(), *(folder / "spy").iterdir()):
            file.chmod(0o644)
        shutil.copytree(folder / "a", folder / "closed")
        (folder / "closed" / "model.safetensors").chmod(0o600)
        yield answer_of("tests.engine.as_second_user", str(folder), variables={"HF_TOKEN": "a secret"}, timeout_s=280)


def test_an_engine_of_the_second_user_answers(found: Any) -> None:
    """All its processes are that user's, without a secret in their environment, and it answers a prompt."""
    assert found["uids"] == [NOBODY]
    assert "HF_TOKEN" not in found["variables"]
    assert {*found["scores"]} == {ENGINE_SCORE}
    assert found["tokens"] == 12


def test_nothing_is_left_of_it(found: Any) -> None:
    """After a stop its processes are gone."""
    assert (found["killed"], found["problem"], found["still running"]) == ([], None, [])


def test_nothing_is_left_of_a_killed_wrapper(found: Any) -> None:
    """The kernel ends its engines, although they are another user's. The next wrapper removes their files."""
    ending = {psutil.Process(pid) for pid in found["pids"] if psutil.pid_exists(pid)}
    assert asyncio.run(process_tree.ended(ending, 30)) == set()
    remove_orphans()
    assert len(found["files"]) > 1
    assert [file for file in found["files"] if Path(file).exists()] == []


def test_the_code_of_a_model_can_not_read_what_is_roots(found: Any) -> None:
    """Code that is allowed, and that the engine runs, does not get at a file of root or at a token."""
    assert f"user {NOBODY} found PermissionError and None" in found["spy"]


def test_a_model_that_the_second_user_can_not_read_is_refused(found: Any) -> None:
    """The reason names the file, the setting and the remedy; vLLM is not asked."""
    assert "user 'nobody' (wrappers.run_as) can't read " in found["closed"]
    assert "closed/model.safetensors: let this user read it" in found["closed"]
