"""The search for secrets after the tests of a cluster finds each kind of secret in each kind of place."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from registry.core.records import Lease
from registry.service.keys import Keys
from registry.service.lease_tokens import LeaseTokens
from registry.wire.words import Role
from tests.support import oidc
from tests.support.secret_search import API_KEY, JWT, LEASE_TOKEN, SecretSearch

SECRET = "Vq3-7_hT0a/xZ9+kLmN2"
"""With all characters that forms differ in."""


def search() -> SecretSearch:
    return SecretSearch({"planted": {SECRET}})


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in a URL": lambda text: text.replace("/", "%2F").replace("+", "%2B"),
    "in hexadecimal digits": lambda text: text.encode().hex(),
    "in Base64": lambda text: b64encode(text.encode()).decode(),
    "in Base64 for URLs": lambda text: urlsafe_b64encode(text.encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", ["", "x", "xy", "lease:"])
@pytest.mark.parametrize("after", ["", "x", "xy"])
def test_each_form_is_found(form: str, before: str, after: str) -> None:
    """A secret is found in all its forms, also in the middle of another text; a part of it is not."""
    make = FORMS[form]
    assert search().kinds_in(f'{{"x": "{make(before + SECRET + after)}"}}'.encode()) == {"planted"}
    assert search().kinds_in(f'{{"x": "{make(before + SECRET[:-1])}"}}'.encode()) == set()


def test_shapes_are_those_of_the_registry() -> None:
    """A token of a lease, an API key and a JWT are found without being known."""
    tokens = LeaseTokens(b"a key", lambda: "id")
    stored = tokens.new()
    lease = Lease("r", "w", stored.token_id, stored.token_sha256, 1.0, 2.0, 3.0, 4.0)
    keys: Any = Keys(cast("Any", SimpleNamespace(api_keys=list)), lambda: 1.0, nullcontext)
    _, key = keys.new(Role.VIEWER, tenant=None, name="")
    made = {LEASE_TOKEN: tokens.of(lease), API_KEY: key, JWT: oidc.signed()}
    for kind, secret in made.items():
        assert SecretSearch({}).kinds_in(f"GET /wrappers/w/{secret}/v1".encode()) == {kind}


@pytest.mark.parametrize("value", ["", "short", "with a space in its middle"])
def test_a_value_that_cannot_be_searched_is_an_error(value: str) -> None:
    """A value that would be found by chance, or never, is refused."""
    with pytest.raises(ValueError, match="'planted' can't be searched") as refused:
        SecretSearch({"planted": {value}})
    assert not value or value not in str(refused.value)


def test_a_finding_names_the_file_but_not_the_secret(tmp_path: Path) -> None:
    """Secrets in contents and names of files, and in a database and its log, are found unless they are allowed."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ray.log").write_bytes(b"\xff\0" + SECRET.encode() + b"\n")
    (tmp_path / "own.key").write_text(SECRET)
    (tmp_path / "clean").write_text("nothing")
    with sqlite3.connect(tmp_path / "r.db") as database:
        database.execute("PRAGMA journal_mode=wal")
        database.execute("CREATE TABLE notes (note)")
        database.execute("INSERT INTO notes VALUES (?)", (SECRET,))
        database.commit()
        looking = search()
        looking.look_at_files(tmp_path, {tmp_path / "own.key": {"planted"}})
    database.close()
    assert looking.found == [f"planted: {tmp_path / name}" for name in ("logs/ray.log", "r.db-wal")]
    named = SecretSearch({"planted": {"a-secret-in-a-name"}})
    (tmp_path / "a-secret-in-a-name").touch()
    named.look_at_files(tmp_path, {})
    assert named.found[0] == f"planted: the name of a file below {tmp_path}"


def test_a_process_shows_its_command_line_and_environment() -> None:
    """Each is found in the process itself; another user sees the command line only."""
    secrets = {"word": {"0123456789-a-word"}, "variable": {"0123456789-a-variable"}}
    command = [sys.executable, "-c", "print(flush=True); input()", "0123456789-a-word"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "X": "0123456789-a-variable"}, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        own, allowed, other = (SecretSearch(secrets) for _ in range(3))
        own.look_at_processes([psutil.Process(process.pid)], {})
        allowed.look_at_processes([psutil.Process(process.pid)], {process.pid: {"variable"}})
        other.look_as_other_user()
        process.communicate(b"\n", timeout=60)
    assert [finding.split(" of ")[0] for finding in own.found] == ["word: cmdline", "variable: environ"]
    assert [finding.split(" of ")[0] for finding in allowed.found] == ["word: cmdline"]
    assert [finding.split(":")[0] for finding in other.found] == ["word", "word"]


def test_answers_and_their_headers_are_looked_at() -> None:
    """A secret in a body or a header is found; an answer that is no 200 is an error."""
    answers = {"/body": httpx.Response(200, text=SECRET), "/head": httpx.Response(200, headers={"location": SECRET})}
    transport = httpx.MockTransport(lambda request: answers.get(request.url.path, httpx.Response(404)))
    looking = search()
    with httpx.Client(transport=transport, base_url="http://r") as client:
        looking.look_at_answers(client, ["/body", "/head"])
        with pytest.raises(AssertionError, match="404"):
            looking.look_at_answers(client, ["/none"])
    assert looking.found == ["planted: GET /body", "planted: GET /head"]


def test_a_long_name_is_no_token() -> None:
    """The operationIds of the OpenAPI document are long enough, and one of them ends like a token of a lease."""
    assert SecretSearch({}).kinds_in(b"release_request_promptingservice_request__request_id__delete") == set()
