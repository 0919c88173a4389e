"""Whether the files of Ray's TLS are checked before anything starts."""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.launch.ray_tls import (
    CA,
    CERTIFICATE,
    FILES,
    KEY,
    SWITCH,
    make_tls_files,
    require_tls_files,
    tls_digest,
)
from registry.errors import BadSettings
from tests.support.tls_front import made_certificates

Environment = dict[str, str]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Ray's variables for TLS, with files that fit."""
    ca = made_certificates(tmp_path)
    (tmp_path / "registry.key").chmod(0o600)
    files = {CERTIFICATE: f"{tmp_path}/registry.crt", KEY: f"{tmp_path}/registry.key", CA: str(ca)}
    return {SWITCH: "1", **files}


def test_files_that_fit_are_taken(environment: Environment) -> None:
    """With each spelling that Ray knows; and without TLS there is nothing to check."""
    require_tls_files(environment)
    require_tls_files({**environment, SWITCH: "True"})
    require_tls_files({})
    require_tls_files({SWITCH: "0"})


@pytest.mark.parametrize("name", FILES)
def test_a_variable_that_is_missing_is_named(environment: Environment, name: str) -> None:
    """Ray itself would fail somewhere in its start."""
    for broken in ({**environment, name: ""}, {each: environment[each] for each in environment if each != name}):
        with pytest.raises(BadSettings, match=f"{name}: is missing"):
            require_tls_files(broken)


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_files_without_the_switch_are_no_tls(environment: Environment, value: str) -> None:
    """Somebody believes that the connections are encrypted, and they are not."""
    with pytest.raises(BadSettings, match=f"{CERTIFICATE}: has no effect without {SWITCH}=1"):
        require_tls_files({**environment, SWITCH: value})


def _no_ca(folder: Path) -> None:
    (folder / "ca.pem").write_text("no certificate")


def _other_ca(folder: Path) -> None:
    new = folder / "other"
    new.mkdir()
    (folder / "ca.pem").write_bytes(made_certificates(new).read_bytes())


def _other_key(folder: Path) -> None:
    new = folder / "new"
    new.mkdir()
    made_certificates(new)
    (folder / "registry.key").write_bytes((new / "registry.key").read_bytes())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "registry.crt").unlink(), f"{CERTIFICATE}: .* can't be read"),
        (lambda folder: (folder / "ca.pem").unlink(), f"{CA}: .* can't be read"),
        (lambda folder: (folder / "registry.key").chmod(0o640), f"{KEY}: other users have access to .* `chmod 600`"),
        (lambda folder: (folder / "registry.crt").write_text("x"), f"{CERTIFICATE}: is no certificate of the key"),
        (_other_key, f"{CERTIFICATE}: is no certificate of the key"),
        (_no_ca, f"{CA}: has no certificate"),
        (_other_ca, f"{CERTIFICATE}: is not valid by the certificate in {CA}"),
        (lambda folder: (folder / "ca.pem").chmod(0o666), f"{CA}: other users have access"),
        (lambda folder: (folder / "registry.crt").chmod(0o664), f"{CERTIFICATE}: other users have access"),
    ],
    ids=[
        "no certificate",
        "no CA",
        "an open key",
        "noise",
        "another key",
        "noise for a CA",
        "another CA",
        "a CA that others can replace",
        "a certificate that others can replace",
    ],
)
def test_files_that_can_not_be_used_are_named(
    environment: Environment, tmp_path: Path, change: Callable[[Path], object], problem: str
) -> None:
    """With the variable, and what to do."""
    change(tmp_path)
    with pytest.raises(BadSettings, match=problem):
        require_tls_files(environment)


def test_paths_are_absolute(environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes have other working folders."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadSettings, match=f"{CA}: 'ca.pem' must be an absolute path"):
        require_tls_files({**environment, CA: "ca.pem"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_files_of_others_are_refused(environment: Environment, tmp_path: Path) -> None:
    """Their owner can replace them."""
    os.chown(tmp_path / "registry.key", 65534, 65534)
    with pytest.raises(BadSettings, match=f"{KEY}: .* belongs to another user .uid 65534"):
        require_tls_files(environment)


def test_renewed_files_have_another_digest(environment: Environment, tmp_path: Path) -> None:
    """Ray is started again for them; without TLS there is none."""
    before = tls_digest(environment)
    assert before == tls_digest(environment)
    assert tls_digest({}) is None
    _other_ca(tmp_path)
    assert tls_digest(environment) != before


# --- files that are made -----------------------------------------------------------------------------------


def test_made_files_are_for_this_user_alone(tmp_path: Path) -> None:
    """They are what Ray wants, and each start has others."""
    made = make_tls_files(tmp_path)
    require_tls_files(made)
    key = Path(made[KEY])
    assert [stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()] == [0o600] * 2
    before = key.read_text()
    assert make_tls_files(tmp_path) == made
    assert key.read_text() != before


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost"])
async def test_both_sides_know_each_other_by_the_made_files(tmp_path: Path, name: str) -> None:
    """A process with the files reaches another by each address of this machine; one without them is refused."""
    made = make_tls_files(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=made[CA])
    server.load_cert_chain(made[CERTIFICATE], made[KEY])
    server.verify_mode = ssl.CERT_REQUIRED
    friend = ssl.create_default_context(cafile=made[CA])
    friend.load_cert_chain(made[CERTIFICATE], made[KEY])
    stranger = ssl.create_default_context(cafile=made[CA])

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async def heard(context: ssl.SSLContext) -> bytes:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        try:
            return await reader.read()
        except ssl.SSLError:  # with TLS 1.3 a client hears only afterwards that it was refused, or nothing at all
            return b""
        finally:
            writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=server) as listening:
        assert await heard(friend) == b"hello"
        assert await heard(stranger) == b""
