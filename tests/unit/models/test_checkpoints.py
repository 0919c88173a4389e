"""What checkpoints say of themselves, and how often they are asked."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import get_local_safetensors_metadata

from deployments.models import checkpoints as checkpoints_module
from deployments.models.checkpoints import (
    KEPT_S,
    READ_LIMIT_S,
    UNKNOWN_KEPT_S,
    Checkpoints,
    checkpoints_anywhere,
    checkpoints_here,
    read_hub,
    read_local,
)
from deployments.models.memory_need import Checkpoint
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from registry.core.records import LLMSpec
from tests.support.checkpoint_files import LLAMA, write_checkpoint
from tests.support.fake_counters import ManualClock

SPEC = LLMSpec("org/llm", "text-generation")
KNOWN = Checkpoint(LLAMA, {"BF16": 2000})


class Reads:
    """Counts the readings, and says each time what it is told to."""

    def __init__(self, *outcomes: Checkpoint | Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, model: str, revision: str | None) -> Checkpoint | None:
        self.asked.append((model, revision))
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


# --- folders -----------------------------------------------------------------------------------------------


def test_a_real_checkpoint_is_read(tmp_path: Path) -> None:
    """The sizes are those of the tensors in the file, the head for itself."""
    found = read_local(str(make_tiny_llm(tmp_path / "a")), None)
    assert found is not None
    assert found.config["model_type"] == "llama"
    assert found.head == {"F32": 512 * 64 * 4}
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert 0 < size - sum(found.body.values()) - sum(found.head.values()) < 10_000


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A checkpoint in several files of terabytes is known as fast as a small one: nothing but the headers is there."""
    layer = {"model.layers.0.w": ("BF16", (2**20, 2**20)), "model.layers.2.w": ("BF16", (2**20,))}
    head = {"lm_head.weight": ("F32", (2**20,)), "model.scale": ("I32", ())}
    found = read_local(str(write_checkpoint(tmp_path / "llm", LLAMA, layer, head)), None)
    assert found is not None
    assert found.body == {"BF16": 2**41, "I32": 4}
    assert found.head == {"F32": 2**22}


def test_what_is_not_there_is_not_known(tmp_path: Path) -> None:
    """A folder of another machine, one without safetensors, and a hub id that was never loaded here."""
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    for model in (tmp_path / "elsewhere", tmp_path / "pickled"):
        assert read_local(str(model), None) is None
        assert read_hub(str(model), None) is None
    assert read_local("org/never-loaded-here", None) is None


def test_what_the_hub_left_on_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM that was loaded once is known without the hub."""
    llm = write_checkpoint(tmp_path / "snapshot", LLAMA, {"w": ("BF16", (1000,))})
    monkeypatch.setattr(
        checkpoints_module, "try_to_load_from_cache", lambda model, name, revision: str(llm / name) if model else None
    )
    found = read_local("org/llm", "main")
    assert found is not None
    assert found.body == {"BF16": 2000}


async def test_nonsense_is_not_known(tmp_path: Path) -> None:
    """Whatever is wrong with a checkpoint, asking for its memory is no error: the engine will say what is wrong."""
    llm = write_checkpoint(tmp_path / "llm", LLAMA, {"w": ("BF16", (1000,))})
    known = checkpoints_here()
    memory = await known.memory(str(llm), SPEC)
    assert memory is not None
    assert memory.weights_bytes == 2000
    for name, text in (("config.json", "[]"), ("config.json", "{"), ("model.safetensors", "\0")):
        other = write_checkpoint(tmp_path / f"{name}{len(text)}{text[0] == '['}", LLAMA, {"w": ("BF16", (1,))})
        (other / name).write_text(text)
        assert await checkpoints_here().memory(str(other), SPEC) is None


# --- the hub -----------------------------------------------------------------------------------------------


class Hub:
    """The part of the hub's client that is used; ``asked`` are the calls."""

    asked: list[tuple[Any, ...]]
    folder: Path

    def model_info(self, model: str, *, revision: str | None, timeout: float) -> Any:
        self.asked.append((model, revision))
        return type("Info", (), {"sha": "c0ffee"})

    def hf_hub_download(self, model: str, name: str, *, revision: str, etag_timeout: float) -> str:
        self.asked.append((model, name, revision))
        return str(self.folder / name)

    def get_safetensors_metadata(self, model: str, *, revision: str, timeout: float) -> Any:
        self.asked.append((model, "safetensors", revision))
        return get_local_safetensors_metadata(self.folder)


async def test_the_hub_is_asked_for_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and headers are those of one commit, the one that the revision names now."""
    Hub.asked, Hub.folder = [], write_checkpoint(tmp_path / "llm", LLAMA, {"w": ("BF16", (1000,))})
    monkeypatch.setattr(checkpoints_module, "HfApi", Hub)
    monkeypatch.setattr(checkpoints_module, "try_to_load_from_cache", lambda *_, **__: None)
    memory = await checkpoints_anywhere().memory("org/llm", LLMSpec("org/llm", "text-generation", revision="v1"))
    assert memory is not None
    assert memory.weights_bytes == 2000
    assert Hub.asked == [
        ("org/llm", "v1"),
        ("org/llm", "config.json", "c0ffee"),
        ("org/llm", "safetensors", "c0ffee"),
    ]


# --- how often ---------------------------------------------------------------------------------------------


async def test_a_checkpoint_is_read_once_in_a_while() -> None:
    """Each revision for itself, and again when what it says may have changed."""
    clock, reads = ManualClock(), Reads(KNOWN, KNOWN, KNOWN)
    known = Checkpoints(reads, clock)
    for revision in (None, None, "v1", "v1"):
        assert await known.memory("a", LLMSpec("a", "text-generation", revision=revision)) is not None
    assert reads.asked == [("a", None), ("a", "v1")]
    clock.now_s += KEPT_S
    await known.memory("a", SPEC)
    assert reads.asked[2:] == [("a", None)]


@pytest.mark.parametrize("problem", [None, OSError("no route to host")])
async def test_what_is_not_known_is_soon_asked_again(problem: Exception | None) -> None:
    """A hub that could not be reached may be there a little later, and a folder may be filled."""
    clock, reads = ManualClock(), Reads(problem, KNOWN)
    known = Checkpoints(reads, clock)
    assert await known.memory("a", SPEC) is None
    clock.now_s += UNKNOWN_KEPT_S - 1
    assert await known.memory("a", SPEC) is None
    assert len(reads.asked) == 1
    clock.now_s += 1
    assert await known.memory("a", SPEC) is not None


async def test_nobody_waits_long_for_a_hub_that_hangs() -> None:
    """Whoever comes after the limit is told at once that it is not known; the answer serves those who ask later."""
    clock, go = ManualClock(), threading.Event()

    def read(model: str, revision: str | None) -> Checkpoint:
        go.wait()
        return KNOWN

    known = Checkpoints(read, clock)
    first = asyncio.create_task(known.memory("a", SPEC))
    await asyncio.sleep(0)
    clock.now_s += READ_LIMIT_S
    assert await known.memory("a", SPEC) is None
    go.set()
    assert await first is not None
    assert await known.memory("a", SPEC) is not None


async def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were asked for last."""
    monkeypatch.setattr(checkpoints_module, "_KEPT", 2)
    reads = Reads(*[KNOWN] * 5)
    known = Checkpoints(reads, ManualClock())
    for model in "abacabc":
        await known.memory(model, SPEC)
    assert [model for model, _ in reads.asked] == ["a", "b", "c", "b", "c"]
