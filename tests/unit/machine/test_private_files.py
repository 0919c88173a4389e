"""Folders and files that are this user's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.machine.private_files import (
    is_private,
    open_private,
    private_folder,
    require_unchanged_by_others,
    writable_by_others,
    write_private,
)
from registry.errors import BadSettings


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """Nothing is closed by the umask."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process another user, to whom none of the test's files belong."""
    return lambda: monkeypatch.setattr("os.geteuid", lambda: 65_534)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_closed(tmp_path: Path) -> None:
    """Only its owner can enter a folder that is created, and it is accepted from then on."""
    folder = tmp_path / "x"
    assert not is_private(folder)
    assert private_folder(folder) == private_folder(folder) == folder
    assert mode_of(folder) == 0o700
    assert is_private(folder)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o777, 0o1777])
def test_a_folder_that_is_open_is_refused(tmp_path: Path, mode: int) -> None:
    """Whoever could enter it may have left something in it. The error names the folder, its mode and the remedy."""
    folder = tmp_path / "x"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BadSettings, match=rf"x: is open to other users \(mode {mode:04o}\).*remove it"):
        private_folder(folder)
    assert mode_of(folder) == mode
    assert not is_private(folder)


def test_a_link_or_file_is_refused(tmp_path: Path) -> None:
    """A link leads to a place of somebody else's choice, also if that is a closed folder."""
    private_folder(tmp_path / "closed")
    (tmp_path / "link").symlink_to(tmp_path / "closed")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "file").touch()
    for name in ("link", "nowhere", "file"):
        with pytest.raises(BadSettings, match=rf"{name}: is a link or a file"):
            private_folder(tmp_path / name)
        assert not is_private(tmp_path / name)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, stranger: Callable[[], None]) -> None:
    """Its owner could change what is in it at any time."""
    folder = private_folder(tmp_path / "x")
    stranger()
    with pytest.raises(BadSettings, match=rf"belongs to another user \(uid {os.getuid()}\)"):
        private_folder(folder)
    assert not is_private(folder)


@pytest.mark.parametrize(("mode", "refused"), [(0o700, False), (0o775, False), (0o777, True), (0o1777, True)])
def test_a_configured_folder_is_not_writable_by_all(tmp_path: Path, mode: int, refused: bool) -> None:
    """The operator may share a folder with a group, but not with every user; the error names the setting."""
    tmp_path.chmod(mode)
    if refused:
        with pytest.raises(BadSettings, match=rf"^state_dir: every user .*\(mode {mode:04o}\); run `chmod o-w`"):
            require_unchanged_by_others(tmp_path, "state_dir")
    else:
        require_unchanged_by_others(tmp_path, "state_dir")
    tmp_path.chmod(0o700)


def test_a_configured_folder_of_another_user_is_refused(tmp_path: Path, stranger: Callable[[], None]) -> None:
    """Only this user's and root's are accepted."""
    if os.getuid() == 0:
        os.chown(tmp_path, 65_533, -1)
    stranger()
    with pytest.raises(BadSettings, match=r"cache_dir: .* belongs to another user"):
        require_unchanged_by_others(tmp_path, "cache_dir")


@pytest.mark.parametrize(("mode", "refused"), [(0o755, False), (0o777, True)])
def test_root_may_use_a_folder_of_any_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    """A volume of a container may belong to a user of the host; it must not be writable by all users."""
    found = tmp_path.stat()
    seen = os.stat_result((stat.S_IFDIR | mode, *found[1:4], 1000, *found[5:10]))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: seen)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    if refused:
        with pytest.raises(BadSettings, match="every user of this machine"):
            require_unchanged_by_others(tmp_path, "state_dir")
    else:
        require_unchanged_by_others(tmp_path, "state_dir")


@pytest.mark.parametrize(
    ("mode", "user", "group", "remedy"),
    [
        (0o644, 1000, 2000, None),
        (0o664, 1000, 1001, None),
        (0o664, 1000, 1000, "g-w"),
        (0o620, 1000, 0, "g-w"),
        (0o664, 1234, 1234, "g-w"),
        (0o602, 1000, 1001, "o-w"),
        (0o666, 1000, 2000, "o-w"),
        (0o666, 0, 0, "o-w"),
    ],
)
def test_only_the_group_of_the_owner_may_write(
    monkeypatch: pytest.MonkeyPatch, mode: int, user: int, group: int, remedy: str | None
) -> None:
    """Every other group is one of strangers, also if this machine does not know the owner."""
    known = {1000: 1001, 0: 0}
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_gid=known[uid]))
    problem = writable_by_others(os.stat_result((stat.S_IFREG | mode, 1, 1, 1, user, group, 1, 0, 0, 0)))
    assert problem is None if remedy is None else f"run `chmod {remedy}` on it" in str(problem)


def test_files_are_their_owners(tmp_path: Path) -> None:
    """A file is closed from its first moment on, whatever was there before; a link in its place is not followed."""
    victim, link, old = tmp_path / "victim", tmp_path / "link", tmp_path / "old"
    victim.write_text("precious")
    link.symlink_to(victim)
    old.write_text("x")
    assert mode_of(old) == 0o666
    for file in (link, old, tmp_path / "new"):
        write_private(file, "a\r\nb\n")
        assert file.read_bytes() == b"a\r\nb\n"
        assert stat.S_IMODE(file.lstat().st_mode) == 0o600
    assert victim.read_text() == "precious"
    write_private(old, "#!/bin/sh\n", executable=True)
    assert mode_of(old) == 0o700


def test_an_older_file_is_closed_when_it_is_opened(tmp_path: Path) -> None:
    """A log of an earlier version that all could read is closed and goes on."""
    file = tmp_path / "log"
    file.write_text("a")
    with open_private(file, "a+") as opened:
        opened.write("b")
    assert (file.read_text(), mode_of(file)) == ("ab", 0o600)


def test_a_link_is_not_opened(tmp_path: Path) -> None:
    """A file that a link leads to is neither emptied nor closed."""
    (victim := tmp_path / "victim").write_text("precious")
    (link := tmp_path / "link").symlink_to(victim)
    for mode in ("w", "a+"):
        with pytest.raises(OSError, match="symbolic link"):
            open_private(link, mode)
    assert (victim.read_text(), mode_of(victim)) == ("precious", 0o666)
