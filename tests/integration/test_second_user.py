"""A process that starts as root really becomes the second user, and can't undo it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.machine.second_user import OWN, USER, SecondUser, home_of, own_variables
from tests.support.second_user import NOBODY, answer_of, open_folder, require_root


@pytest.fixture(scope="module")
def found() -> Iterator[Any]:
    """What a child of the second user reports, after it has tried to be root again."""
    require_root()
    user = SecondUser("nobody", NOBODY, NOBODY)
    with open_folder() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret, setuid = folder / "secret", folder / "id"
        secret.write_text("the token")
        secret.chmod(0o600)
        shutil.copy("/usr/bin/id", setuid)
        setuid.chmod(0o4755)
        own = own_variables(user, home_of(user, folder))
        yield answer_of(
            "tests.support.second_user_child",
            *(str(secret), str(setuid), str(server.getsockname()[1])),
            variables={USER: user.text, OWN: json.dumps(own), "HF_TOKEN": "a secret", "RAY_AUTH_TOKEN": "a secret"},
        )


def test_it_has_given_up_every_right(found: Any) -> None:
    """User and group are the second user's, for good: no attempt to be root, or to use what is root's, succeeds."""
    assert found["problem"] is None
    assert found["uids"] == found["gids"] == [NOBODY] * 3
    assert 0 not in found["groups"]
    assert found["attempts"] == {
        "read a file of root": "PermissionError",
        "read the variables of the parent": "PermissionError",
        "enter the parent's folder": "PermissionError",
        "kill the parent": "PermissionError",
        "setuid": "PermissionError",
        "setgid": "PermissionError",
        "setgroups": "PermissionError",
        "connect to loopback": "ConnectionRefusedError",
    }
    assert found["setuid program"] == str(NOBODY)


def test_nothing_of_root_is_left_in_it(found: Any) -> None:
    """Its environment has no secret, nor has the kernel's copy; it is in no folder, session or network of root's."""
    assert not {"HF_TOKEN", "RAY_AUTH_TOKEN"} & found["environment"].keys()
    assert "secret" not in found["own variables at its start"]
    assert Path(found["environment"]["HOME"]).name == "engines-nobody"
    assert found["folder"] == "/"
    assert found["umask"] == 0o077
    assert found["session"]
    assert found["networks"] == ["lo"]
