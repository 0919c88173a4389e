"""Downloads a model from the Hugging Face hub in a separate program, so that a hanging download can be killed.

``python -m deployments.models.download '{…}'`` takes a ``DownloadOrder`` and prints lines of JSON: the bytes present so
far, and at the end the folder or the problem. Files that were complete before an interruption stay, and the next
download resumes from there. The folder is a snapshot in the hub's own cache format, so a cache that was filled by other
tools works as well.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from deployments.machine.child_processes import die_with_parent
from deployments.models.small_files import CONFIG_BYTES, CONFIGS, INDEX_BYTES, FileTooLarge, require_small

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import HFCacheInfo

TELL_EVERY_S = 0.2
"""Longest time between two progress messages while bytes arrive, seconds; each percent is also reported."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".py", ".yaml", ".yml")
_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
INDICES = ("model.safetensors.index.json", "consolidated.safetensors.index.json")
"""Indices: they say which file has which weights. One is for safetensors, one for Mistral's own copy of the weights."""
_SENTENCE_TRANSFORMERS_PART = re.compile(r"\d+_\w+")
_SMALL = 50 * 2**20  # text files (_TEXTS) above this size are not needed by an LLM


class DownloadFailed(Exception):
    """A download failed; the text says why. ``permanent``: it would also fail on another machine."""

    def __init__(self, problem: str, permanent: bool = False) -> None:
        super().__init__(problem, permanent)
        self.problem, self.permanent = problem, permanent


@dataclass(frozen=True, slots=True)
class DownloadOrder:
    """The ``commit`` of a model to download.

    ``cache_dir``: a cache in the hub's layout, None for the one that the environment names.
    ``locks_dir``: folder of the lock files of models in use (``lock_of``). ``max_bytes``: size
    limit of the cache, None for no limit. ``load_format``: vLLM's engine argument. ``weights``:
    False leaves them out. ``owner_pid``: the download process ends with this parent process; None:
    it does not.
    """

    model: str
    commit: str
    cache_dir: str | None
    locks_dir: str
    max_bytes: int | None = None
    load_format: str = "auto"
    weights: bool = True
    owner_pid: int | None = None


def wanted_files(sizes: Mapping[str, int], *, load_format: str = "auto", weights: bool = True) -> list[str]:
    """Return the files of a repository that vLLM reads, sorted by name.

    Weights are taken in the one format that vLLM would choose (its ``DefaultModelLoader._prepare_weights``), and only
    from the top folder and the parts of a sentence-transformers model; copies elsewhere are left out.

    Args:
        sizes: Bytes of each file, by its path in the repository.
        load_format: ``auto``, ``safetensors`` or ``mistral``.
        weights: False: only configuration and tokenizer.
    """
    chosen = {file for file, size in sizes.items() if file.endswith(_TEXTS) and size <= _SMALL and _in_place(file)}
    if weights:
        folders: dict[str, list[str]] = {}
        for file in sizes:
            if file.endswith(_WEIGHTS) and _in_place(file):
                folders.setdefault(str(PurePosixPath(file).parent), []).append(file)
        for files in folders.values():
            chosen.update(weight_files(files, load_format))
    return sorted(chosen)


def _in_place(file: str) -> bool:
    parents = PurePosixPath(file).parts[:-1]
    return not parents or (len(parents) == 1 and _SENTENCE_TRANSFORMERS_PART.fullmatch(parents[0]) is not None)


def weight_files(files: Iterable[str], load_format: str = "auto") -> list[str]:
    """Return the weight files of one folder in the one format that vLLM would choose; empty if there are none.

    Each format has a pattern; the first pattern that matches any file decides. With ``auto`` and
    ``mistral``, Mistral's own copy comes first. Source: vLLM 0.32, ``DefaultModelLoader._prepare_weights``.
    """
    files = [file for file in files if (name := PurePosixPath(file).name) not in _TRAINING and name[0] != "."]
    mistral = load_format in ("auto", "mistral")
    for pattern in (*(["consolidated*.safetensors"] if mistral else []), "*.safetensors", "*.bin", "*.pt"):
        if found := [file for file in files if fnmatch(PurePosixPath(file).name, pattern)]:
            return found
    return []


# D27: a process that uses a model holds its lock
def lock_of(model: str, locks_dir: Path) -> Path:
    """Return a model's lock file: shared by all its users; its modification time is the time of the last use."""
    return locks_dir / _folder_of(model)


def _folder_of(model: str) -> str:
    return f"models--{model.replace('/', '--')}"


def commit_of(model: str, revision: str | None, cache_dir: str | None) -> str:
    """Return the commit of a branch or tag (None: the default branch); a commit is returned unchanged.

    Asks the hub; uses the cache if the hub can't be reached or HF_HUB_OFFLINE is set. Blocks for one short request.

    Raises:
        DownloadFailed: Neither knows the commit; the text says why.
    """
    from huggingface_hub import HfApi, constants

    try:
        resolved = HfApi().resolve_revision(
            model, revision=revision, cache_dir=cache_dir, local_files_only=constants.HF_HUB_OFFLINE
        )
    except Exception as problem:
        raise _in_words(revision, problem) from problem
    return resolved.resolved


def cached(model: str, revision: str | None, cache_dir: str | None) -> str | None:
    """Return this machine's folder of a branch, tag or commit (None: the default branch); None if there is none.

    Does not ask the hub: a branch may have moved since the last request, and files may be missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(
            model, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        return None


def find(order: DownloadOrder) -> str | None:
    """Return the folder of this commit if all its files are certainly on this machine; else None. Uses no network.

    With HF_HUB_OFFLINE, a folder without the hub's list of files is taken as complete.

    Raises:
        DownloadFailed: Files are missing, and HF_HUB_OFFLINE forbids to download them.
    """
    from huggingface_hub import constants

    folder = cached(order.model, order.commit, order.cache_dir)
    listed = _listed(order)
    if folder is not None and listed is None and constants.HF_HUB_OFFLINE:
        return folder  # filled by other tools: take its files as complete
    missing = _missing(folder, _plan(order, folder, listed)) if folder is not None and listed is not None else None
    if missing == []:
        return folder
    if constants.HF_HUB_OFFLINE:
        what = f"files of it ({_some(missing)})" if missing else f"commit {order.commit} of it"
        raise DownloadFailed(f"{what} can't be found on this machine, and HF_HUB_OFFLINE forbids downloads")
    return None


# D25: a process of its own downloads, so it can be ended
def download(order: DownloadOrder, tell: Callable[[int, int], None]) -> str:
    """Download the files of the commit that are missing on this machine; return its folder.

    Blocks until done; ``tell`` is called with the bytes present and the bytes needed. Unused models are removed to make
    room.

    Raises:
        DownloadFailed: The hub can't be reached or refuses, or there is no room; the text says why.
    """
    try:
        with _locked(Path(order.locks_dir) / f"download-{_folder_of(order.model)}"):  # one at a time
            return _download(order, tell)
    except DownloadFailed:
        raise
    except Exception as problem:
        raise _in_words(order.commit, problem) from problem


def _download(order: DownloadOrder, tell: Callable[[int, int], None]) -> str:
    from huggingface_hub import snapshot_download

    if order.cache_dir is not None:
        for leftover in (Path(order.cache_dir) / _folder_of(order.model) / "blobs").glob("*.incomplete"):
            leftover.unlink()  # a killed download left it, and the next one uses another name

    def load(*names: str) -> str:
        return snapshot_download(
            order.model,
            revision=order.commit,
            cache_dir=order.cache_dir,
            allow_patterns=list(names),
            tqdm_class=_progress_bar(lambda _bytes: None),
        )

    folder = load()  # lists the files, and downloads none
    listed = _listed(order)
    if listed is None:
        return folder  # no hub, and other tools filled the cache: take its files as complete
    load("config.json", "params.json", *INDICES)
    wanted = _plan(order, folder, listed)
    missing = _missing(folder, wanted)
    to_load, total = (sum(listed[file] for file in files) for files in (missing, wanted))
    _make_room(order, to_load)
    tell(total - to_load, total)
    if missing:
        snapshot_download(
            order.model,
            revision=order.commit,
            cache_dir=order.cache_dir,
            allow_patterns=[glob.escape(file) for file in missing],
            tqdm_class=_progress_bar(lambda loaded: tell(total - to_load + min(loaded, to_load), total)),
        )
    tell(total, total)
    return folder


def _listed(order: DownloadOrder) -> Mapping[str, int] | None:
    """Return all files of the commit with their sizes, as listed by the hub; None if it was never listed.

    Raises:
        DownloadFailed: A configuration or an index is too large to be read into memory.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(order.model, revision=order.commit, cache_dir=order.cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    for file in files:
        name = PurePosixPath(file.path).name
        try:
            if file.path in INDICES:
                require_small(file.path, file.size, INDEX_BYTES)
            elif _in_place(file.path) and any(fnmatch(name, pattern) for pattern in CONFIGS):
                require_small(file.path, file.size, CONFIG_BYTES)
        except FileTooLarge as error:
            raise DownloadFailed(str(error), permanent=True) from error
    return {file.path: file.size for file in files}


def _plan(order: DownloadOrder, folder: str, listed: Mapping[str, int]) -> list[str]:
    """Return the files that vLLM reads, without weights that the repository's own index does not name."""
    wanted = wanted_files(listed, load_format=order.load_format, weights=order.weights)
    for name in INDICES:
        index = Path(folder) / name
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            kind = f"{name.partition('.')[0]}*.safetensors"
            wanted = [file for file in wanted if file in named or "/" in file or not fnmatch(file, kind)]
    return wanted


def _missing(folder: str, wanted: Iterable[str]) -> list[str]:
    return [file for file in wanted if not (Path(folder) / file).is_file()]


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


# --- room in the cache ---------------------------------------------------------------------------------------


def _make_room(order: DownloadOrder, to_load: int) -> None:
    """Remove unused models, least recently used first, until ``to_load`` more bytes fit."""
    if order.max_bytes is None:
        return
    locks = Path(order.locks_dir)
    mine = lock_of(order.model, locks)
    with _locked(locks / "room"):
        while (used := _used(order, mine)) + to_load > order.max_bytes:
            if not _remove_oldest(order, mine):
                raise DownloadFailed(
                    f"it needs {_gib(to_load)}, but the limit of the cache is {_gib(order.max_bytes)}, and "
                    f"{_gib(used)} of it are in use (models.cache_max_gib)",
                    permanent=to_load > order.max_bytes,
                )
        mine.write_text(str(to_load), encoding="utf-8")  # reserves the room, so that others leave it free


def _used(order: DownloadOrder, mine: Path) -> int:
    """Return the bytes that the cache holds, plus those reserved by running downloads of others."""
    info = _scan(order)
    promised = sum(
        int(lock.read_text(encoding="utf-8") or 0)
        for lock in Path(order.locks_dir).glob("models--*")
        if lock != mine and _in_use(lock)
    )
    return info.size_on_disk + info.incomplete_size_on_disk + promised


def _remove_oldest(order: DownloadOrder, mine: Path) -> bool:
    """Remove the least recently used model; return False if none can be removed."""
    cache = _scan(order)
    assert cache.cache_dir is not None
    whole = {repo.repo_path: repo for repo in cache.repos}
    models = {*whole, *(file.file_path.parent.parent for file in cache.incomplete_files)}

    def last_used_s(model: Path) -> float:
        lock = Path(order.locks_dir) / model.name
        return lock.stat().st_mtime if lock.exists() else model.stat().st_mtime

    for model in sorted(models, key=last_used_s):
        lock = Path(order.locks_dir) / model.name
        if lock == mine:
            continue
        with lock.open("a+") as file:
            if not try_lock(file, fcntl.LOCK_EX):
                continue  # in use
            if model in whole:
                cache.delete_revisions(*(revision.commit_hash for revision in whole[model].revisions)).execute()
            shutil.rmtree(model, ignore_errors=True)  # files that the hub's library does not know
            return True
    return False


def _in_use(lock: Path) -> bool:
    with lock.open("a+") as file:
        return not try_lock(file, fcntl.LOCK_EX)


def try_lock(file: IO[str], kind: int) -> bool:
    """Lock an open file (``fcntl.LOCK_SH`` or ``LOCK_EX``) until it is closed; False if another lock forbids it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _scan(order: DownloadOrder) -> HFCacheInfo:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(order.cache_dir)


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


# --- words -----------------------------------------------------------------------------------------------------


def _in_words(revision: str | None, problem: Exception) -> DownloadFailed:
    """Describe a problem for people. The hub's own texts are long and refer to Python."""
    from huggingface_hub import errors

    where = "where the registry and Ray are started"
    match problem:
        case errors.GatedRepoError():
            text = f"it is gated: ask for access on its page at the Hugging Face hub, and set HF_TOKEN {where}"
            return DownloadFailed(text, permanent=True)
        case errors.RevisionNotFoundError():
            return DownloadFailed(f"it has no revision {revision} at the Hugging Face hub", permanent=True)
        case errors.RepositoryNotFoundError():
            text = f"there is no such model at the Hugging Face hub, or it is private: then set HF_TOKEN {where}"
            return DownloadFailed(text, permanent=True)
        case errors.RevisionResolutionError() | errors.LocalEntryNotFoundError() | errors.IncompleteSnapshotError():
            cause = problem.__cause__
            why = "HF_HUB_OFFLINE is set" if cause is None else f"{type(cause).__name__}: {_short(cause)}"
            text = f"it is not on this machine, and the Hugging Face hub can't be reached ({why})"
            return DownloadFailed(text)
        case _:
            return DownloadFailed(f"its download failed ({type(problem).__name__}: {_short(problem)})")


def _short(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300]


def _progress_bar(report: Callable[[int], None]) -> Any:
    """Return a class of progress bars for the hub's library that show nothing and report the counted bytes."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **more: Any) -> None:
            self._counts_bytes = more.get("unit") == "B"
            super().__init__(*args, **(more | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                report(int(self.n))

    return Bar


def main(argument: str) -> int:
    """Run one order; return the exit status: 0 if it succeeded, else 1."""
    order = DownloadOrder(**json.loads(argument))
    if order.owner_pid is not None:
        die_with_parent(order.owner_pid)
    told_s, told, most = 0.0, 0, 0

    def say(**what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def tell(done: int, total: int) -> None:
        nonlocal told_s, told, most
        most = max(most, done)  # the hub's library has several bars with different counts
        if done == total or most > told + total / 100 or time.monotonic() >= told_s + TELL_EVERY_S:
            told_s, told = time.monotonic(), most
            say(done=most, total=total)

    try:
        folder = download(order, tell)
    except DownloadFailed as failed:
        say(problem=failed.problem, permanent=failed.permanent)
        return 1
    say(folder=folder)
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1]))  # the hub's library may have threads that never end
