"""Looks for secrets in files, processes and answers. A finding names a place and a kind of secret, never the secret."""

from __future__ import annotations

import os
import re
import subprocess
from base64 import b64encode
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import psutil

from tests.support.listening_ports import listening_ports

API_KEY = "API key"
JWT = "JWT"
LEASE_TOKEN = "token of a lease"

SHAPES = {
    API_KEY: re.compile(rb"gp_[0-9a-f]{8}_[\w-]{43}"),
    JWT: re.compile(rb"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
    LEASE_TOKEN: re.compile(rb"(?<![A-Za-z])lease_[\w-]{43}(?![\w-])"),  # not the end of an operationId: release_…
}
"""How secrets look that a test need not know, because a program made or got them."""

SHORTEST = 16
"""Shorter values are in many places by chance."""

OTHER_USER = 65534

_RUN = re.compile(rb"[\w.~%+/=-]{16,}")
"""A text that may be or contain a secret in one of its forms."""


def forms(value: str) -> set[bytes]:
    """The secret as it is, in a URL, in hexadecimal digits, and as a part of any text in Base64."""
    raw = value.encode()
    found = {raw, quote(value, safe="").encode(), raw.hex().encode()}
    for before in range(3):
        # Base64 makes 4 characters of 3 bytes. Those that also depend on the bytes around the secret are left out.
        after = -(before + len(raw)) % 3
        encoded = b64encode(bytes(before) + raw + bytes(after))
        sure = encoded[(0, 2, 3)[before] : len(encoded) - (0, 2, 3)[after]]
        found |= {sure, sure.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


@dataclass
class SecretSearch:
    """Collects what it finds of the secrets ``values`` (by kind), and of all texts that look like SHAPES.

    Raises:
        ValueError: A value is too short to be searched, or has characters that `_RUN` lacks.
    """

    values: Mapping[str, Collection[str]]
    found: list[str] = field(default_factory=list)
    looked_at: Counter[str] = field(default_factory=Counter)
    """How many places of each sort were looked at, so that a test can see that none was forgotten."""

    def __post_init__(self) -> None:
        self._forms: list[tuple[bytes, str]] = []
        for kind, values in self.values.items():
            for value in values:
                if len(value) < SHORTEST or not _RUN.fullmatch(value.encode()):
                    raise ValueError(f"a value of the kind {kind!r} can't be searched")
                self._forms += [(form, kind) for form in forms(value)]

    def kinds_in(self, data: bytes, *, shapes: bool = True) -> set[str]:
        """The kinds of the secrets in these bytes."""
        runs = b"\n".join(set(_RUN.findall(data)))  # a log repeats itself; the secrets are many
        found = {kind for form, kind in self._forms if form in runs}
        return found | {kind for kind, shape in SHAPES.items() if shapes and shape.search(runs)}

    def look(self, sort: str, place: str, data: bytes, allowed: Collection[str] = (), *, shapes: bool = True) -> None:
        """Look at one place. ``allowed``: the kinds that may be there."""
        self.looked_at[sort] += 1
        self.found += [f"{kind}: {place}" for kind in sorted(self.kinds_in(data, shapes=shapes) - set(allowed))]

    def look_at_files(self, root: Path, allowed: Mapping[Path, Collection[str]]) -> None:
        """Look at the names and contents of all files below a folder, or at one file. Files may go meanwhile."""
        paths = [root, *sorted(root.rglob("*"))]
        self.look("file", f"the name of a file below {root}", "\n".join(map(str, paths)).encode())
        for path in paths:
            with suppress(FileNotFoundError):
                if path.is_file():
                    self.look("file", str(path), path.read_bytes(), allowed.get(path, ()))

    def look_at_processes(self, processes: Iterable[psutil.Process], allowed: Mapping[int, Collection[str]]) -> None:
        """Look at the command lines and environments of processes. ``allowed``: kinds in an environment, by process."""
        for process in processes:
            with suppress(FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
                place = f"process {process.pid} ({process.name()})"
                for name, kinds in (("cmdline", ()), ("environ", allowed.get(process.pid, ()))):
                    self.look(name, f"{name} of {place}", Path(f"/proc/{process.pid}/{name}").read_bytes(), kinds)

    def look_as_other_user(self) -> None:
        """Look at what another user sees of all processes; without root's rights, at what this user sees in ``ps``.

        Only values: other programs of the machine may have secrets with the same shapes.
        """
        is_root = os.geteuid() == 0
        user: dict[str, Any] = {"user": OTHER_USER, "group": OTHER_USER, "extra_groups": []} if is_root else {}
        for command in ("ps -efww", "cat /proc/[0-9]*/cmdline", *(["cat /proc/[0-9]*/environ"] if is_root else [])):
            seen = subprocess.run(["sh", "-c", command], cwd="/", capture_output=True, timeout=60, check=False, **user)
            self.look("other user", f"`{command}` of another user", seen.stdout, shapes=False)

    def look_at_answers(self, client: httpx.Client, urls: Iterable[str]) -> None:
        """Look at the headers and bodies of answers to GET. Each must be a 200."""
        for url in urls:
            answer = client.get(url)
            assert answer.status_code == 200, (urlsplit(url).path, answer.status_code)
            head = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
            self.look("answer", f"GET {url}", f"{head}\n{answer.text}".encode())

    def look_at_metrics(self, processes: Iterable[psutil.Process]) -> None:
        """Look at the metrics and statistics that these processes serve on any of their ports."""
        for process in processes:
            ports: set[int] = set()
            with suppress(psutil.NoSuchProcess):  # HAProxy's process is another after each reload
                ports = listening_ports(process)
            for port, path in product(sorted(ports), ("/metrics", "/stats")):
                with suppress(httpx.TransportError):  # other ports speak gRPC
                    answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30, trust_env=False)
                    self.look("metrics", f"{path} of {process.name()}", answer.content)
