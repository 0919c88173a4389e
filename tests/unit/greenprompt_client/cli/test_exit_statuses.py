"""What a command's exit status tells, and that its error is one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import stamina
import typer
from rich.console import Console

from greenprompt_client.calls import CONNECT_FOR_S
from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import app as shared
from greenprompt_client.cli import main as cli
from greenprompt_client.client import RegistryClient

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command whose registry answers with this status and body, or (an exception) can't be reached."""

    def run(arguments: str, answer: httpx.Response | Exception | None = None) -> tuple[int, list[str]]:
        def answered(_request: httpx.Request) -> httpx.Response:
            if isinstance(answer, Exception):
                raise answer
            assert answer is not None
            return answer

        class Client(RegistryClient):
            def __init__(self, url: str, *, connect_for_s: float, **options: Any) -> None:
                assert connect_for_s == CONNECT_FOR_S, "somebody waits at a terminal"
                super().__init__(url, connect_for_s=connect_for_s, **options)
                self._http.close()
                self._http = httpx.Client(base_url=url, transport=httpx.MockTransport(answered))

        said = io.StringIO()
        monkeypatch.setattr(cli_app, "RegistryClient", Client)
        monkeypatch.setattr(shared, "problems", Console(file=said, soft_wrap=True))
        monkeypatch.setattr(sys, "argv", ["greenprompt", *arguments.split()])
        hooks = stamina.instrumentation.get_on_retry_hooks()
        try:
            with stamina.set_testing(True, attempts=3), pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            stamina.instrumentation.set_on_retry_hooks(hooks)
        status: Any = ended.value.code
        return status, said.getvalue().splitlines()

    return run


def error(status: int, code: str, retryable: bool = False) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "message": f"it says {code}", "retryable": retryable})


@pytest.mark.parametrize("command", ["release r1", "drain a", "undrain a", "status", "report 7"])
def test_a_registry_that_is_away_is_one_line(run: Run, capfd: pytest.CaptureFixture[str], command: str) -> None:
    """While the registry is away the command tries for a while and then says one line; no retry is logged."""
    assert run(command, httpx.ConnectError("refused")) == (
        3,
        ["greenprompt: no registry answers at this URL (refused)"],
    )
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (error(404, "unknown_request"), 4),
        (error(410, "request_forgotten"), 4),
        (error(422, "invalid_field"), 5),
        (error(409, "idempotency_conflict"), 5),
        (error(429, "tenant_budget_used"), 5),
        (error(503, "registry_unavailable", retryable=True), 3),
        (error(500, "internal_error"), 3),
        (httpx.Response(404, text="<html>nginx</html>"), 3),
        (httpx.Response(403, text="forbidden by a proxy"), 3),
    ],
)
def test_statuses_tell_kinds_of_errors_apart(run: Run, answer: httpx.Response, status: int) -> None:
    """Not found, refused and unreachable have a status each; what is no registry is not reached."""
    ended, lines = run("drain a", answer)
    assert (ended, len(lines)) == (status, 1)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (error(401, "key_needed"), "GREENPROMPT_API_KEY"),
        (error(401, "key_refused"), "GREENPROMPT_API_KEY"),
        (error(401, "jwt_refused"), "GREENPROMPT_API_KEY"),
        (error(404, "unknown_measurement"), "--tenant"),
    ],
)
def test_errors_say_what_to_do_on_the_command_line(run: Run, answer: httpx.Response, word: str) -> None:
    """The registry's text names headers; the command adds the variable or the option."""
    _, lines = run("report 7", answer)
    assert len(lines) == 1
    assert lines[0].startswith("greenprompt: it says ")
    assert word in lines[0]


@pytest.mark.parametrize("command", ["status", "report 7", "drain a"])
@pytest.mark.parametrize("body", ["<html>welcome</html>", '"text"', '{"status": []}'])
def test_what_is_no_registry_is_one_line(run: Run, command: str, body: str) -> None:
    """Another server's 200 is an error of one line, not a traceback."""
    ended, lines = run(command, httpx.Response(200, text=body))
    assert (ended, len(lines)) == (3, 1)
    assert "is not a registry" in lines[0]


@pytest.mark.parametrize("arguments", ["report 0", "report x", "drain", "nonsense", "status --nonsense"])
def test_wrong_usage_is_2(run: Run, arguments: str) -> None:
    """A command line that can't be understood has a status of its own, and asks no registry."""
    assert run(arguments)[0] == 2


@pytest.mark.parametrize("command", ["status", "drain a", "release r1", "report 7", "measure"])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("GREENPROMPT_URL", "", "GREENPROMPT_URL: is empty"),
        ("GREENPROMPT_URI", "http://other:8000", "did you mean GREENPROMPT_URL?"),
        ("GREENPROMPT_STATEDIR", "x", "did you mean GREENPROMPT_STATE_DIR?"),
    ],
)
def test_no_other_registry_is_asked_for_a_typo(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str, told: str
) -> None:
    """An empty or unknown variable of ours is refused: the registry that is meant is not the one at the default URL."""
    monkeypatch.setenv(name, value)
    ended, lines = run(command)
    assert (ended, len(lines)) == (2, 1)
    assert told in lines[0]


@pytest.mark.parametrize("command", ["up", "up --detach", "down"])
def test_an_empty_address_is_no_local_registry(run: Run, command: str) -> None:
    """``down --address "$CLUSTER"`` without that variable does not end the registry of this machine."""
    assert run(f"{command} --address= ") == (2, ["greenprompt: --address: is empty; leave it out, or give it a value"])


def test_help_lists_the_statuses(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of the command says what each status means."""
    run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{status} " in said for status in (0, 1, 2, 3, 4, 5, 130))
    assert "no registry answers" in said


def test_every_command_of_a_registry_takes_a_ca() -> None:
    """Each command with ``--url`` has ``--ca-file``, also from the environment."""
    found = {}
    for name, command in typer.main.get_group(cli.app).commands.items():
        for each in getattr(command, "commands", {name: command}).values():
            found[each.name] = {option.name: option for option in each.params}
    with_url = [options for options in found.values() if "url" in options]
    assert len(with_url) == 14
    assert {options["ca_file"].envvar for options in with_url} == {"GREENPROMPT_CA_FILE"}


@pytest.mark.parametrize("command", ["status", "audit", "keys list --key-file key", "measure -m org/a -p p.jsonl -o o"])
def test_a_missing_ca_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    """The file that the environment names is used by all commands; if it is missing, the error names it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("gp_x")
    (tmp_path / "p.jsonl").write_text('{"id": "1", "question": "Why?"}\n')
    monkeypatch.setenv("GREENPROMPT_CA_FILE", "none.pem")
    monkeypatch.setattr(sys, "argv", ["greenprompt", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    assert (ended.value.code, lines) == (2, ["greenprompt: none.pem: can't be read: No such file or directory"])
