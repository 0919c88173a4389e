"""The access token of a cluster: made by our command, and never left open to others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.launch.access_token import make_token, require_own_token, token_path
from greenprompt_client.cli.main import app
from registry.errors import BadSettings


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token of a user with an empty home is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return tmp_path / ".ray" / "auth_token"


def modes(token: Path) -> tuple[int, int]:
    return stat.S_IMODE(token.parent.stat().st_mode), stat.S_IMODE(token.stat().st_mode)


def test_the_command_makes_a_closed_token_once(token: Path) -> None:
    """`greenprompt ray-token` makes 64 digits that only their owner can read, does not show them, and keeps them."""
    made = CliRunner().invoke(app, ["ray-token"])
    assert made.exit_code == 0, made.output
    first = token.read_text()
    assert len(first) == 64
    assert first not in made.output
    assert modes(token) == (0o700, 0o600)
    assert "is there already" in CliRunner().invoke(app, ["ray-token"]).output
    assert token.read_text() == first


def test_what_rays_command_left_open_is_closed(token: Path) -> None:
    """The token and its folder, as `ray get-auth-token --generate` makes them, are closed; the token is the same."""
    token.parent.mkdir(mode=0o755)
    token.write_text("x" * 64)
    token.chmod(0o644)
    assert not make_token(token)
    assert modes(token) == (0o700, 0o600)
    assert token.read_text() == "x" * 64


def test_only_rays_own_folder_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token elsewhere is closed; its folder, which may have other uses, stays as it is."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert make_token(token_path())
    assert modes(tmp_path / "token") == (0o755, 0o600)


def test_a_start_closes_an_open_token(token: Path) -> None:
    """One that this user owns; without one the error names our command."""
    with pytest.raises(BadSettings, match="`greenprompt ray-token` makes one"):
        require_own_token()
    make_token(token)
    token.chmod(0o640)
    require_own_token()
    assert modes(token) == (0o700, 0o600)


@pytest.mark.parametrize(
    ("owner", "mode", "told"),
    [
        (0, 0o440, None),  # as Kubernetes mounts a secret for a user of its own
        (0, 0o444, "by every user of this machine"),
        (os.getuid() + 7, 0o600, "belongs to another user"),
    ],
)
def test_a_token_of_another_user(
    token: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, told: str | None
) -> None:
    """Root's is accepted if strangers can't read it; another user's is not, because that user could run code here."""
    make_token(token)
    found = token.stat()
    seen = os.stat_result((stat.S_IFREG | mode, *found[1:4], owner, *found[5:10]))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: seen)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if told is None:
        require_own_token(token)
    else:
        with pytest.raises(BadSettings, match=told):
            require_own_token(token)


@pytest.mark.parametrize(
    ("owner", "mode", "refused"), [(0, 0o440, False), (0, 0o444, True), (0, 0o460, True), (1000, 0o440, True)]
)
def test_a_token_that_can_not_be_closed(
    token: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, refused: bool
) -> None:
    """On a volume that is read-only: root's may be read by its group; else the error says how to mount it."""
    make_token(token)
    found = token.stat()
    seen = os.stat_result((stat.S_IFREG | mode, *found[1:4], owner, *found[5:10]))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "stat", lambda *_, **__: seen)
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    if refused:
        with pytest.raises(BadSettings, match=r"can be read by other users.*Read-only.*`defaultMode: 0400`"):
            require_own_token(token)
    else:
        require_own_token(token)


def test_a_token_in_a_closed_folder_is_named(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may be missing for some commands, but one that this user can't look at is an error of one line."""
    require_own_token(token, may_be_missing=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(BadSettings, match="Permission denied"):
        require_own_token(token, may_be_missing=True)
