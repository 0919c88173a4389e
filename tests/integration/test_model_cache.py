"""Downloads from a hub over real HTTP, by real processes; the cache that they fill, and what is removed from it."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import psutil
import pytest

from deployments.models import cache as model_cache
from deployments.models.cache import LocalModel, ModelCache
from registry.contract.messages import Download
from registry.errors import EngineStartFailed
from tests.support import fake_hub
from tests.support.fake_hub import FILES, WEIGHTS, FakeHub

MIB = 2**20
Cache = Callable[..., ModelCache]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Makes what the wrappers of one machine have: caches over the same directory."""

    def make(max_mib: float | None = None) -> ModelCache:
        directory = tmp_path / "cache"
        return ModelCache(directory, directory / ".greenprompt", None if max_mib is None else max_mib / 1024)

    return make


def downloads() -> list[psutil.Process]:
    """The processes that download for this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "deployments.models.download" in child.cmdline()]


def holds(model: LocalModel) -> dict[str, bytes]:
    folder = Path(model.path)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


async def test_what_an_engine_loads_is_downloaded(hub: FakeHub, cache: Cache) -> None:
    """Weights in one format, configuration and tokenizer come, and no more; progress is told, and the commit."""
    hub.add("org/tiny", FILES, commit="c" * 40)
    told: list[Download] = []
    model = await cache().fetch("org/tiny", on_progress=told.append)
    assert holds(model) == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert model.revision == "c" * 40
    assert [download.share for download in told] == sorted(download.share for download in told)
    assert 0 <= told[0].share < 0.01
    assert told[-1].share == 1.0
    assert {download.total_bytes for download in told} == {sum(map(len, holds(model).values()))}
    assert downloads() == []
    model.release()


async def test_what_is_there_is_not_downloaded_again(hub: FakeHub, cache: Cache) -> None:
    """A model on the machine costs one question, which commit its branch is at; a commit costs none."""
    hub.add("org/tiny", FILES)
    first = await cache().fetch("org/tiny")
    hub.asked.clear()
    second = await cache().fetch("org/tiny")
    assert hub.asked == ["GET /api/models/org/tiny"]
    hub.asked.clear()
    pinned = await cache().fetch("org/tiny", revision=first.revision)
    assert hub.asked == []
    assert first.path == second.path == pinned.path
    for model in (first, second, pinned):
        model.release()


async def test_a_branch_that_moves_is_another_revision(hub: FakeHub, cache: Cache) -> None:
    """A new commit is downloaded under its own name; the old one can still be had by its hash, without the hub."""
    hub.add("org/tiny", FILES, commit="1" * 40)
    old = await cache().fetch("org/tiny", revision="main")
    hub.add("org/tiny", FILES | {"config.json": b'{"new": 1}'}, commit="2" * 40)
    new = await cache().fetch("org/tiny", revision="main")
    assert (old.revision, new.revision) == ("1" * 40, "2" * 40)
    hub.status = 500
    again = await cache().fetch("org/tiny", revision="1" * 40)
    assert (holds(again)["config.json"], holds(new)["config.json"]) == (b"{}", b'{"new": 1}')
    for model in (old, new, again):
        model.release()


async def test_a_broken_connection_is_taken_up_again(hub: FakeHub, cache: Cache) -> None:
    """A download whose connection breaks is no failure, and what comes of it is whole."""
    repository = hub.add("org/tiny", FILES)
    repository.cut_after = [MIB]
    model = await cache().fetch("org/tiny")
    assert repository.cut_after == []
    assert holds(model)["model.safetensors"] == WEIGHTS
    model.release()


async def test_a_download_that_hangs_can_be_ended(hub: FakeHub, cache: Cache, tmp_path: Path) -> None:
    """Cancelling ends the process at once; the next attempt loads the rest, and says how much was there already."""
    small = WEIGHTS[: fake_hub.PIECE]
    repository = hub.add("org/tiny", FILES | {"model-1.safetensors": small, "model-2.safetensors": WEIGHTS})
    repository.hold.clear()
    stuck = asyncio.create_task(cache().fetch("org/tiny"))
    await repository.until_held()
    while not list((tmp_path / "cache").rglob("model-1.safetensors")):
        await asyncio.wait({stuck}, timeout=0.01)
    assert len(downloads()) == 1
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    assert downloads() == []
    repository.hold.set()
    hub.asked.clear()
    resumed: list[Download] = []
    model = await cache().fetch("org/tiny", on_progress=resumed.append)
    assert holds(model)["model-2.safetensors"] == WEIGHTS
    assert "model-1.safetensors" not in hub.loaded()
    assert resumed[0].share > 0.01
    assert list((tmp_path / "cache").rglob("*.incomplete")) == []
    model.release()


OWNER = """
import asyncio, sys
from pathlib import Path
from deployments.models.cache import ModelCache
asyncio.run(ModelCache(Path(sys.argv[1]), Path(sys.argv[1]) / ".greenprompt").fetch("org/tiny"))
"""


async def test_a_download_dies_with_its_wrapper(hub: FakeHub, cache: Cache, tmp_path: Path) -> None:
    """When its owner is killed a download ends with it, and the model is not in use any more."""
    repository = hub.add("org/tiny", FILES)
    repository.hold.clear()
    owner = subprocess.Popen(  # noqa: ASYNC220 - it is killed
        [sys.executable, "-c", OWNER, str(tmp_path / "cache")]
    )
    await repository.until_held()
    (download,) = downloads()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, [download], 10)
    assert alive == []
    repository.hold.set()
    (await cache().fetch("org/tiny")).release()


async def test_a_download_that_is_killed_says_so(hub: FakeHub, cache: Cache) -> None:
    """Whatever ends the process of a download, the start fails with words, and can be tried again."""
    repository = hub.add("org/tiny", FILES)
    repository.hold.clear()
    fetching = asyncio.create_task(cache().fetch("org/tiny"))
    await repository.until_held()
    downloads()[0].kill()
    with pytest.raises(EngineStartFailed, match="ended unexpectedly") as failed:
        await fetching
    assert not failed.value.permanent


# --- what can't be had ----------------------------------------------------------------------------------------


async def test_what_the_hub_does_not_have(hub: FakeHub, cache: Cache) -> None:
    """No such model, no such revision: refused for good, by name."""
    hub.add("org/tiny", FILES)
    with pytest.raises(EngineStartFailed, match=r"'org/other': there is no such model.* HF_TOKEN") as nowhere:
        await cache().fetch("org/other")
    with pytest.raises(EngineStartFailed, match="no revision v9") as no_revision:
        await cache().fetch("org/tiny", revision="v9")
    assert nowhere.value.permanent
    assert no_revision.value.permanent


async def test_a_gated_model_names_the_token(hub: FakeHub, cache: Cache) -> None:
    """For a model that one has to ask for, the reason says to ask, and to set HF_TOKEN."""
    hub.add("org/tiny", FILES).gated = True
    with pytest.raises(EngineStartFailed, match=r"gated.* HF_TOKEN") as failed:
        await cache().fetch("org/tiny")
    assert failed.value.permanent


async def test_an_unreachable_hub(hub: FakeHub, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub what is on the machine can be had, and for the rest the reason says so; it may pass by."""
    hub.add("org/tiny", FILES)
    there = await cache().fetch("org/tiny")
    nobody = "http://127.0.0.1:9"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    again = await cache().fetch("org/tiny")
    assert again.revision == there.revision
    with pytest.raises(EngineStartFailed, match="not on this machine, and the Hugging Face hub can't be reached") as no:
        await cache().fetch("org/other")
    assert not no.value.permanent
    there.release()
    again.release()


async def test_offline(hub: FakeHub, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE nothing is asked; a partial download is told with what is missing."""
    repository = hub.add("org/tiny", FILES)
    hub.add("org/whole", FILES)
    (await cache().fetch("org/whole")).release()
    repository.hold.clear()
    stuck = asyncio.create_task(cache().fetch("org/tiny"))
    await repository.until_held()
    stuck.cancel()
    await asyncio.wait({stuck})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    with pytest.raises(EngineStartFailed, match=r"\(model\.safetensors.* can't be found.* HF_HUB_OFFLINE"):
        await cache().fetch("org/tiny")
    with pytest.raises(EngineStartFailed, match="HF_HUB_OFFLINE"):
        await cache().fetch("org/other")
    (await cache().fetch("org/whole")).release()
    assert hub.asked == []


async def test_a_cache_filled_by_others_serves(
    hub: FakeHub, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that somebody has copied here is taken as it is where the hub must not be asked."""
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("d" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = await cache().fetch("org/tiny")
    assert (model.path, model.revision) == (str(snapshot), "d" * 40)
    model.release()
    assert [await cache().here(name) for name in ("org/tiny", "org/other")] == [str(snapshot), None]
    assert await cache().here("org/tiny", revision="d" * 40) == str(snapshot)


async def test_a_folder_is_itself(cache: Cache, tmp_path: Path) -> None:
    """A local model is neither copied nor locked, and has no commit; one that is not there is told plainly."""
    model = await cache().fetch(str(tmp_path))
    assert (model.path, model.revision) == (str(tmp_path), None)
    model.release()
    with pytest.raises(EngineStartFailed, match="there is no folder"):
        await cache().fetch(str(tmp_path / "gone"))
    assert await cache().here(str(tmp_path)) == str(tmp_path)


# --- room -----------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_goes(hub: FakeHub, cache: Cache, tmp_path: Path) -> None:
    """When a download would exceed the limit the model that was used longest ago is removed, and only that."""
    for name in "abc":
        hub.add(f"org/{name}", FILES, commit=name * 40)
    wrapper = cache(max_mib=7)
    for name in "ab":
        (await wrapper.fetch(f"org/{name}")).release()
    used_last = await wrapper.fetch("org/a")
    used_last.release()
    (await wrapper.fetch("org/c")).release()
    left = sorted(model.name for model in (tmp_path / "cache").glob("models--*"))
    assert left == ["models--org--a", "models--org--c"]


async def test_what_is_in_use_stays(hub: FakeHub, cache: Cache, tmp_path: Path) -> None:
    """Models that another wrapper of the machine runs are never removed; if nothing else can go the reason says so."""
    for name in "abc":
        hub.add(f"org/{name}", FILES, commit=name * 40)
    mine, other = cache(max_mib=7), cache(max_mib=7)
    runs = [await other.fetch(f"org/{name}") for name in "ab"]
    with pytest.raises(EngineStartFailed, match=r"limit of the cache .* in use") as failed:
        await mine.fetch("org/c")
    assert not failed.value.permanent
    runs[0].release()
    model = await mine.fetch("org/c")
    assert sorted(model.name for model in (tmp_path / "cache").glob("models--*")) == [
        "models--org--b",
        "models--org--c",
    ]
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": bytes(8 * MIB)}, commit="e" * 40)
    with pytest.raises(EngineStartFailed, match="limit of the cache") as never:
        await mine.fetch("org/large")
    assert never.value.permanent
    for used in (*runs, model):
        used.release()


async def test_room_for_two_downloads_at_once(hub: FakeHub, cache: Cache) -> None:
    """What another download of the machine has been promised counts as taken, although it is not there yet."""
    first, _ = (hub.add(f"org/{name}", FILES, commit=name * 40) for name in "ab")
    first.hold.clear()
    loading = asyncio.create_task(cache(max_mib=5).fetch("org/a"))
    await first.until_held()
    with pytest.raises(EngineStartFailed, match="limit of the cache"):
        await cache(max_mib=5).fetch("org/b")
    first.hold.set()
    (await loading).release()
    (await cache(max_mib=5).fetch("org/b")).release()


async def test_leftovers_of_downloads_go_too(hub: FakeHub, cache: Cache, tmp_path: Path) -> None:
    """A download that was given up is room, when room is needed."""
    blobs = tmp_path / "cache" / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(WEIGHTS)
    hub.add("org/b", FILES, commit="b" * 40)
    (await cache(max_mib=4).fetch("org/b")).release()
    assert sorted(model.name for model in (tmp_path / "cache").glob("models--*")) == ["models--org--b"]


async def test_a_model_that_is_being_removed_is_waited_for(
    hub: FakeHub, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wants a model in the moment in which it is removed gets it all the same, a moment later."""
    import fcntl

    hub.add("org/tiny", FILES)
    locks = tmp_path / "cache" / ".greenprompt"
    locks.mkdir(parents=True)
    monkeypatch.setattr(model_cache, "LOCK_POLL_S", 0.001)
    with (locks / "models--org--tiny").open("w") as remover:
        fcntl.flock(remover, fcntl.LOCK_EX)
        fetching = asyncio.create_task(cache().fetch("org/tiny"))
        await asyncio.wait({fetching}, timeout=0.02)
        assert hub.asked == []
    (await fetching).release()


async def test_releasing_again_changes_nothing(hub: FakeHub, cache: Cache) -> None:
    """A model can be released twice."""
    hub.add("org/tiny", FILES)
    model = await cache().fetch("org/tiny")
    model.release()
    model.release()
    assert holds(model)
