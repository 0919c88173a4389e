"""A fake Hugging Face hub over HTTP on this machine. A test can make it slow, broken or gated.

It serves what ``huggingface_hub`` requests to download a snapshot: the revision, the tree, and the files, with ETag,
X-Repo-Commit and Range.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HELD_LIMIT_S = 20.0
"""Maximum wait until a download reaches the point where it is held, seconds."""

PIECE = 64 * 1024
"""Files up to this size are sent in one piece, bytes."""

WEIGHTS = bytes(range(256)) * 4096 * 3
"""3 MiB."""

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "original/consolidated.00.pth": WEIGHTS,
    "README.md": b"# A model",
}
"""A typical repository: it has the weights in several formats."""


@dataclass
class Repository:
    """Files of one commit.

    ``gated``: reading them is refused. ``cut_after``: for each number in it, one connection breaks after that many
    bytes of a large file. ``hold``: while it is cleared, large files stop half way; ``held`` is set once one has.
    """

    files: Mapping[str, bytes]
    commit: str
    gated: bool = False
    cut_after: list[int] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hold.set()

    async def until_held(self) -> None:
        """Wait until a file has stopped half way."""
        assert await asyncio.to_thread(self.held.wait, HELD_LIMIT_S)


class FakeHub:
    """The hub. ``asked``: the requests so far, as "GET /path". ``url``: the endpoint (HF_ENDPOINT)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.status: int | None = None
        """If set, the HTTP status of every answer."""
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, model: str, files: Mapping[str, bytes] | Path, *, commit: str = "a" * 40) -> Repository:
        """Publish files, or a folder of them, as the head of ``main``."""
        if isinstance(files, Path):
            files = {str(file.relative_to(files)): file.read_bytes() for file in files.rglob("*") if file.is_file()}
        repository = self.repositories[model] = Repository(files, commit)
        return repository

    def loaded(self) -> list[str]:
        """Return the names of the requested files in order, without repetitions."""
        paths = [line.partition("/resolve/")[2].partition("/")[2] for line in self.asked if line.startswith("GET")]
        return list(dict.fromkeys(path for path in paths if path))

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield self
        finally:
            for repository in self.repositories.values():
                repository.hold.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_args: object) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if hub.status is not None:
            self._json(hub.status, {"error": "the hub has a bad day"})
            return
        for model, repository in hub.repositories.items():
            if f"{path}/".startswith(f"/api/models/{model}/"):
                self._about(model, repository, path.removeprefix(f"/api/models/{model}").lstrip("/"))
                return
            if path.startswith(f"/{model}/resolve/"):
                self._file(repository, path.removeprefix(f"/{model}/resolve/"))
                return
        self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _about(self, model: str, repository: Repository, what: str) -> None:
        kind, _, revision = what.partition("/")
        if revision not in ("", "main", repository.commit):
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif kind in ("", "revision"):
            siblings = [{"rfilename": name} for name in repository.files]
            self._json(200, {"id": model, "sha": repository.commit, "siblings": siblings, "tags": []})
        else:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in repository.files.items()
            ]
            self._json(200, tree)

    def _file(self, repository: Repository, what: str) -> None:
        _, _, name = what.partition("/")
        if repository.gated:
            self._json(401, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return
        content = repository.files.get(name)
        if content is None:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        first = 0
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            self.served.ranges.append(asked)
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send(repository, content[first:])

    def _send(self, repository: Repository, content: bytes) -> None:
        large = len(content) > PIECE
        cut_after = repository.cut_after.pop(0) if large and repository.cut_after else len(content)
        sent = 0
        while sent < len(content):
            if large and sent >= len(content) // 2 and not repository.hold.is_set():
                repository.held.set()
                repository.hold.wait()
            piece = content[sent : min(sent + PIECE, cut_after)]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            sent += len(piece)
            if sent >= cut_after and sent < len(content):
                self.close_connection = True
                self.connection.shutdown(2)
                return

    def _json(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
