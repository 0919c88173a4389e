"""The command that started a cluster's registry is remembered for its keeper, and for nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from deployments.launch import up_again
from registry.environment import problems_of
from registry.errors import BadSettings
from registry.settings import Settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, which is the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_is_remembered_until_it_is_forgotten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its folder and its environment; without one there is none, and forgetting is repeated without an error."""
    assert up_again.remembered() is None
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "8001")
    up_again.remember(["greenprompt", "up"])
    found = up_again.remembered()
    assert found is not None
    assert (found.command, found.folder) == (["greenprompt", "up"], str(home))
    assert found.environment == {name: value for name, value in os.environ.items() if name in found.environment}
    assert {"GREENPROMPT_HTTP__PORT", "PATH", "HOME"} <= set(found.environment)
    up_again.forget()
    up_again.forget()
    assert up_again.remembered() is None


def test_only_its_owner_can_read_it(home: Path) -> None:
    """It may contain the password of the database: the file and its folder are its owner's alone."""
    up_again.remember(["greenprompt", "up"])
    file = up_again.command_file()
    assert file.parent == home / ".greenprompt"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]


def test_a_repeated_command_accepts_its_mark() -> None:
    """`up` refuses variables with our prefix that are no settings."""
    assert list(problems_of(Settings, {up_again.REPEATED: "1"})) == []


def test_the_path_of_a_key_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Ray's TLS, no command can connect to Ray without it."""
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", "/etc/ray/key.pem")
    up_again.remember(["greenprompt", "up"])
    found = up_again.remembered()
    assert found is not None
    assert found.environment["RAY_TLS_SERVER_KEY"] == "/etc/ray/key.pem"


def test_only_the_secrets_that_are_settings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry can't start without the URL of its database; tokens, keys and proxies' passwords are left out."""
    url = "postgresql+psycopg://me:pass@db/registry"
    monkeypatch.setenv("GREENPROMPT_DATABASE_URL", url)
    for name in ("GREENPROMPT_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "very-secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:very-secret@proxy:3128")
    up_again.remember(["greenprompt", "up"])
    found = up_again.remembered()
    assert found is not None
    assert found.environment["GREENPROMPT_DATABASE_URL"] == url
    assert "very-secret" not in up_again.command_file().read_text()


def test_a_folder_that_others_can_change_is_refused(home: Path) -> None:
    """Another user could replace the command there, which runs later."""
    (home / ".greenprompt").mkdir()
    (home / ".greenprompt").chmod(0o777)
    with pytest.raises(BadSettings, match="every user of this machine can write to"):
        up_again.remember(["greenprompt", "up"])
