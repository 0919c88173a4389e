"""The commands of API keys: which key they use, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import main as cli
from greenprompt_client.client import RegistryClient
from registry.errors import BadSettings
from registry.wire.schemas import KeyState, NewKey

KEY = KeyState(
    id="0a1b2c3d",
    role="client",
    tenant="lab",
    name="Ann [old] [/x]",
    createdAt="2026-01-02T00:00:00.000Z",
    expiresAt="2026-02-03T00:00:00.000Z",
    revokedAt=None,
    usedAt=None,
)


class FakeClient(RegistryClient):
    """A client without a registry; ``used`` has the keys that it was given."""

    used: ClassVar[list[str | None]] = []

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.used.append(options["api_key"])

    def keys(self) -> list[KeyState]:
        return [KEY]

    def create_key(self, role: str, **options: Any) -> NewKey:
        return NewKey(**KEY.model_dump(), key=f"gp_{role}_{options['tenant']}")

    def revoke_key(self, key_id: str) -> None:
        assert key_id == KEY.id


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> Any:
    """Runs a command in an empty folder."""
    monkeypatch.setattr(cli_app, "RegistryClient", FakeClient)
    monkeypatch.setattr(FakeClient, "used", [])
    monkeypatch.setattr(cli_app.console, "width", 80)

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli.app, ["keys", *words], catch_exceptions=False)

    return run


def own_key(text: str = "gp_own\n") -> None:
    file = cli_app.OPERATOR_KEYS[0]
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_a_new_key_is_printed_alone(run: Any) -> None:
    """Scripts can take the output as it is."""
    own_key()
    assert run("create", "--tenant", "lab").output == "gp_client_lab\n"
    assert FakeClient.used == ["gp_own\n"]


def test_names_are_shown_as_they_are(run: Any) -> None:
    """A name in brackets is no markup; a key that has expired says so."""
    own_key()
    output = run("list").output
    assert "Ann [old] [/x]" in output
    assert "expired 2026-02-03" in output


def test_a_key_is_revoked(run: Any) -> None:
    """The command says what it did."""
    own_key()
    assert run("revoke", KEY.id).output == "0a1b2c3d is refused from now on\n"


def test_a_whole_key_is_revoked_by_its_id(run: Any) -> None:
    """The registry gets the id, and the secret is not repeated."""
    own_key()
    assert run("revoke", f"gp_{KEY.id}_s_e-cret").output == "0a1b2c3d is refused from now on\n"


def test_the_file_that_is_named_is_used(run: Any, tmp_path: Path) -> None:
    """It is used even if the environment has a key; a missing file is named."""
    file = tmp_path / "other.key"
    file.write_text("gp_other")
    assert run("list", "--key-file", str(file)).exit_code == 0
    assert FakeClient.used == ["gp_other"]
    with pytest.raises(BadSettings, match=r"missing\.key: can't be read"):
        run("list", "--key-file", "missing.key")


def test_the_environment_goes_before_this_machines_key(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator of another registry has its key there."""
    own_key()
    monkeypatch.setenv("GREENPROMPT_API_KEY", "gp_elsewhere")
    assert run("list", "--url", "http://elsewhere:8000").exit_code == 0
    assert FakeClient.used == ["gp_elsewhere"]


def test_this_machines_key_stays_on_this_machine(run: Any) -> None:
    """The key of the registry in this folder is not sent to another machine; without a key the error says which."""
    own_key()
    with pytest.raises(BadSettings, match=r"--key-file: is needed, or GREENPROMPT_API_KEY: a file with an operator's"):
        run("list", "--url", "http://elsewhere:8000")
    assert FakeClient.used == []


def test_on_the_head_of_a_cluster_its_key_is_used(run: Any, tmp_path: Path) -> None:
    """``configs/production.yaml`` has its state in the home folder: ``ray exec … greenprompt status`` needs no key."""
    file = tmp_path / "home" / "greenprompt-state" / "operator.key"
    file.parent.mkdir(parents=True)
    file.write_text("gp_head")
    assert run("list").exit_code == 0
    with cli_app.interactive_client("http://127.0.0.1:8000"), cli_app.interactive_client("http://elsewhere:8000"):
        pass
    assert FakeClient.used == ["gp_head", "gp_head", None]
