"""The second user of a machine: who it can be, and what its processes get."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest

from deployments.machine.second_user import (
    OWN,
    USER,
    SecondUser,
    engine_environment,
    home_of,
    own_variables,
    run_as_second_user,
    second_user,
    unreadable,
)
from registry.errors import BadSettings

ME = SecondUser(pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), os.getegid())


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


@pytest.mark.usefixtures("as_root")
def test_a_user_is_found_by_name() -> None:
    """Root can start engines as another user of this machine."""
    assert second_user("nobody") == SecondUser("nobody", *pwd.getpwnam("nobody")[2:4])


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-user", "wrappers.run_as: this machine has no user 'no-such-user': create it (useradd --system "),
        ("root", "wrappers.run_as: 'root' has the rights of root: name a user with a group of its own"),
    ],
)
def test_not_everybody_can_be_the_second_user(name: str, said: str) -> None:
    """A user that does not exist, or that is root, is refused with the remedy."""
    with pytest.raises(BadSettings) as refused:
        second_user(name)
    assert said in str(refused.value)


def test_only_root_can_have_a_second_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not root is refused, and never runs engines as itself instead."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(BadSettings, match=r"only root can start engines as 'nobody', but this is user 1000: start Ray"):
        second_user("nobody")


def test_engines_get_what_they_need_and_no_secret(tmp_path: Path) -> None:
    """Of the wrapper's variables, unknown ones, secrets, and paths of the operator's caches are left out."""
    own = own_variables(ME, tmp_path)
    environment = {
        USER: ME.text,
        OWN: json.dumps(own),
        "PATH": "/bin",
        "VLLM_HOST_IP": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/srv",
        "VLLM_CACHE_ROOT": "/srv/cache",
        "VLLM_API_KEY": "secret",
        "CUDA_MIRROR": "https://me:secret@mirror.example",
        "HF_TOKEN": "secret",
        "HF_TOKEN_PATH": "/srv/token",
        "RAY_AUTH_TOKEN": "secret",
        "GREENPROMPT_SECRETS_FILE": "/srv/secrets",
        "PGPASSWORD": "secret",
    }
    kept = (USER, OWN, "PATH", "VLLM_HOST_IP", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
    assert engine_environment(environment) == {name: environment[name] for name in kept} | own
    assert own["HOME"] == str(tmp_path)
    assert own["VLLM_CACHE_ROOT"].startswith(str(tmp_path))


def test_without_a_second_user_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get all variables, and a process does not execute itself again."""
    environment = {"HF_TOKEN": "secret", "HOME": "/srv"}
    assert engine_environment(environment) == environment
    monkeypatch.delenv(USER, raising=False)
    assert run_as_second_user() is None


def test_a_process_of_somebody_else_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is neither root nor the second user does not pass for the latter."""
    monkeypatch.setenv(USER, SecondUser("nobody", 65_534, 65_534).text)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("os.getresuid", lambda: (1000, 1000, 1000))
    assert run_as_second_user() == f"the engine's process is still user (1000, 1000, 1000), group {os.getresgid()}"


def test_the_home_is_the_users_alone(tmp_path: Path) -> None:
    """It is created once; a link, or a folder of somebody else, is refused in its place."""
    home = home_of(ME, tmp_path)
    assert home == home_of(ME, tmp_path)
    assert home.stat().st_mode & 0o777 == 0o700
    (tmp_path / "engines-other").mkdir()
    with pytest.raises(BadSettings, match=r"cache_dir: .* must be a folder of user 'other' alone"):
        home_of(SecondUser("other", ME.uid + 1, ME.gid), tmp_path)
    home.rmdir()
    home.symlink_to(tmp_path)
    with pytest.raises(BadSettings, match="must be a folder of user"):
        home_of(ME, tmp_path)


def test_the_first_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    """A file that is missing for this process counts as one that it can't read."""
    (tmp_path / "config.json").touch()
    files = [str(tmp_path / name) for name in ("config.json", "model.safetensors")]
    assert unreadable(files[:1]) is None
    assert unreadable(files) == files[1]
