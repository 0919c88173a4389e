"""What checkpoints say of themselves, and how often they are asked."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.hf_api import RepoFile

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
from deployments.models.small_files import CONFIG_BYTES, INDEX_BYTES, MOST_SHARDS, FileTooLarge
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

    def model_info(self, model: str, *, revision: str | None, timeout: float, expand: list[str]) -> Any:
        assert expand == ["sha"], "the rest may be of any length"
        self.asked.append((model, revision))
        return type("Info", (), {"sha": "c0ffee"})

    def get_paths_info(self, model: str, paths: list[str], *, revision: str) -> list[RepoFile]:
        assert (model, revision) == ("org/llm", "c0ffee")
        files = [self.folder / path for path in paths]
        return [RepoFile(path=f.name, size=f.stat().st_size, oid="") for f in files if f.exists()]

    def hf_hub_download(self, model: str, name: str, *, revision: str, etag_timeout: float) -> str:
        self.asked.append((model, name, revision))
        return str(self.folder / name)

    def parse_safetensors_file_metadata(self, model: str, name: str, *, revision: str, timeout: float) -> Any:
        self.asked.append((model, name, revision))
        return parse_local_safetensors_file_metadata(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """A hub with one model, which is not on this machine."""
    Hub.asked, Hub.folder = [], tmp_path / "llm"
    monkeypatch.setattr(checkpoints_module, "HfApi", Hub)
    monkeypatch.setattr(checkpoints_module, "try_to_load_from_cache", lambda *_, **__: None)
    return Hub


async def test_the_hub_is_asked_for_what_is_not_here(hub: type[Hub]) -> None:
    """Config and headers are those of one commit, the one that the revision names now."""
    write_checkpoint(hub.folder, LLAMA, {"w": ("BF16", (1000,))})
    memory = await checkpoints_anywhere().memory("org/llm", LLMSpec("org/llm", "text-generation", revision="v1"))
    assert memory is not None
    assert memory.weights_bytes == 2000
    assert hub.asked == [
        ("org/llm", "v1"),
        ("org/llm", "config.json", "c0ffee"),
        ("org/llm", "model.safetensors", "c0ffee"),
    ]


def test_weights_in_many_files_on_the_hub(hub: type[Hub]) -> None:
    """The headers of all files of the index are read; of a tensor in two files, the one that the index names."""
    files = [{f"w{n}": ("BF16", (n + 1,)), "both": ("F32", (1,))} for n in range(10)]
    write_checkpoint(hub.folder, LLAMA, *files)
    found = read_hub("org/llm", None)
    assert found is not None
    assert found.body == {"BF16": 2 * sum(range(1, 11)), "F32": 4}
    assert len(hub.asked) == 2 + 1 + 10


def test_a_hub_model_without_safetensors_is_not_known(hub: type[Hub]) -> None:
    """Nothing of it is loaded."""
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    assert read_hub("org/llm", None) is None
    assert hub.asked == [("org/llm", None)]


# --- files that are too large ------------------------------------------------------------------------------


def grow(file: Path, size_bytes: int) -> None:
    """Make a file that large; it takes no room on the disk."""
    with file.open("ab") as opened:
        opened.truncate(size_bytes)


@pytest.mark.parametrize(
    ("name", "most_bytes"), [("config.json", CONFIG_BYTES), ("model.safetensors.index.json", INDEX_BYTES)]
)
async def test_a_huge_file_is_neither_loaded_nor_read(hub: type[Hub], name: str, most_bytes: int) -> None:
    """The head's memory does not depend on what a model's author writes; the error says which file and the limit."""
    folder = write_checkpoint(hub.folder, LLAMA, {"a": ("BF16", (1,))}, {"b": ("BF16", (1,))})
    grow(folder / name, most_bytes + 1)
    text = f"its {name} has {most_bytes + 1:,} bytes, and at most {most_bytes:,} are read"
    known = checkpoints_anywhere()
    for _ in range(2):
        with pytest.raises(FileTooLarge, match=text):
            await known.memory("org/llm", SPEC)
    assert ("org/llm", name, "c0ffee") not in hub.asked
    with pytest.raises(FileTooLarge, match=text):
        await checkpoints_here().memory(str(folder), SPEC)


async def test_a_file_that_is_mended_is_soon_read_again(tmp_path: Path) -> None:
    """A refusal is kept as long as an unreadable checkpoint."""
    clock, reads = ManualClock(), Reads(FileTooLarge("its config.json is too large"), KNOWN)
    known = Checkpoints(reads, clock)
    with pytest.raises(FileTooLarge):
        await known.memory("a", SPEC)
    clock.now_s += UNKNOWN_KEPT_S
    assert await known.memory("a", SPEC) is not None


async def test_a_refusal_keeps_nothing_that_was_read() -> None:
    """Neither the file nor what was made of it: the traceback of an error would."""

    class Parsed:
        pass

    parsed: list[weakref.ref[Parsed]] = []

    def read(model: str, revision: str | None) -> Checkpoint:
        content = Parsed()
        parsed.append(weakref.ref(content))
        raise FileTooLarge("its weights are in too many files")

    known = Checkpoints(read, ManualClock())
    with pytest.raises(FileTooLarge):
        await known.memory("a", SPEC)
    gc.collect()
    assert parsed[0]() is None


def test_only_the_needed_fields_are_kept(tmp_path: Path) -> None:
    """A configuration of megabytes leaves a few; if those are long themselves, the checkpoint is not known."""
    weights = {"w": ("BF16", (1000,))}
    labels = {"id2label": {str(n): "x" for n in range(100_000)}}
    found = read_local(str(write_checkpoint(tmp_path / "labels", {**LLAMA, **labels}, weights)), None)
    assert found is not None
    assert "id2label" not in found.config
    assert found.config["model_type"] == "llama"
    layers = {"layer_types": ["full_attention"] * 10_000}
    with pytest.raises(ValueError, match="too long to be kept"):
        read_local(str(write_checkpoint(tmp_path / "layers", {**LLAMA, **layers}, weights)), None)


def test_an_index_of_very_many_files_is_refused(hub: type[Hub]) -> None:
    """The header of each would be read, up to 25 MB."""
    folder = write_checkpoint(hub.folder, LLAMA, {"a": ("BF16", (1,))}, {"b": ("BF16", (1,))})
    weight_map = {f"w{n}": f"{n}.safetensors" for n in range(MOST_SHARDS + 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for read, model in ((read_hub, "org/llm"), (read_local, str(folder))):
        with pytest.raises(FileTooLarge, match="its weights are in 2049 files"):
            read(model, None)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", 7])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: object) -> None:
    """No other file of the machine is read."""
    folder = write_checkpoint(tmp_path / "llm", LLAMA, {"a": ("BF16", (1,))}, {"b": ("BF16", (1,))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not in its folder"):
        read_local(str(folder), None)


def test_an_index_that_names_missing_tensors_is_damaged(tmp_path: Path) -> None:
    """The sum of the others would be too small."""
    folder = write_checkpoint(tmp_path / "llm", LLAMA, {"a": ("BF16", (1,))}, {"b": ("BF16", (1,))})
    index = {"weight_map": {"a": "model-0.safetensors", "c": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(KeyError):
        read_local(str(folder), None)


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
