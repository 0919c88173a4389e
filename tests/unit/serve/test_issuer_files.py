"""The file of an issuer's keys, and the file of its CA: what they may be, and when they are read."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import certifi
import pytest
from structlog.testing import capture_logs

from deployments.machine import private_files
from deployments.serve import issuer_keys
from deployments.serve.issuer_keys import AGAIN_S, MAX_BYTES
from deployments.serve.issuer_keys import issuer_keys as keys_of
from registry.access_errors import JWTNotChecked
from registry.errors import BadSettings
from tests.support.fake_counters import ManualClock
from tests.support.oidc import jwk, jwks, rsa_key, settings

TEXTS: dict[str, Callable[[], bytes]] = {"jwks_file": jwks, "ca_file": lambda: certifi.contents().encode()}
"""What each file of the settings may contain."""


async def test_keys_may_be_in_a_file(clock: ManualClock, tmp_path: Path) -> None:
    """A file is read like a URL, and again when it is old."""
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks())
    keys = keys_of(settings(jwks_file=str(file)))
    assert len(await keys.fitting("r1", "RS256")) == 1
    file.write_bytes(jwks(jwk(rsa_key(), "r2")))
    clock.now_s += AGAIN_S
    assert len(await keys.fitting("r2", "RS256")) == 1
    assert await keys_of(settings(jwks_file=str(file), algorithms=["ES256"])).fitting("r2", "RS256") == []


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("jwks_file", None, "No such file"),
        ("jwks_file", "keys", "the list of keys .JWKS. is no JSON"),
        ("jwks_file", "{}", "no list"),
        ("jwks_file", '{"keys": []}', "no key for RS256, ES256"),
        ("jwks_file", " " * (MAX_BYTES + 1), "more than 256 KiB"),
        ("ca_file", None, "No such file[^;]*$"),
        ("ca_file", "no certificate", "needs certificates"),
    ],
)
def test_a_start_needs_the_files(tmp_path: Path, field: str, text: str | None, problem: str) -> None:
    """A file that can't be used is an error of `up`, which names the setting."""
    file = tmp_path / "file"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadSettings, match=rf"access\.oidc\.{field}: .*{problem}"):
        issuer_keys.require_files(settings(**{field: str(file)}))


@pytest.mark.parametrize("field", ["jwks_file", "ca_file"])
@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        (0o666, "every user of this machine can write to it; run `chmod o-w`"),
        (0o622, "every user of this machine can write to it; run `chmod o-w`"),
        (0o602, "every user of this machine can write to it; run `chmod o-w`"),
        (0o664, r"a group that is not its owner's can write to it .*; run `chmod g-w`"),
    ],
)
async def test_a_file_that_others_can_change_is_not_used(
    clock: ManualClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, mode: int, problem: str
) -> None:
    """Who can change the keys, or the CA, can sign JWTs of an operator. The error is one of `up`, and of each read."""
    file = tmp_path / "file"
    file.write_bytes(TEXTS[field]())
    file.chmod(mode)
    monkeypatch.setattr(private_files, "_group_of", lambda _user: file.stat().st_gid + 1)
    changed = settings(**{field: str(file)})
    with pytest.raises(BadSettings, match=rf"access\.oidc\.{field}: .*{problem}"):
        issuer_keys.require_files(changed)
    with capture_logs() as logs, pytest.raises(JWTNotChecked):
        await keys_of(changed).fitting("r1", "RS256")
    assert re.search(problem, logs[0]["reason"])


@pytest.mark.parametrize("field", ["jwks_file", "ca_file"])
def test_the_group_of_the_owner_may_change_a_file(tmp_path: Path, field: str) -> None:
    """On most machines only the owner is in it; what everybody may read is public."""
    file = tmp_path / "file"
    file.write_bytes(TEXTS[field]())
    os.chown(file, -1, pwd.getpwuid(os.geteuid()).pw_gid)
    file.chmod(0o664)
    issuer_keys.require_files(settings(**{field: str(file)}))


ODD: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("field", ["jwks_file", "ca_file"])
@pytest.mark.parametrize("name", ODD)
async def test_only_regular_files_are_read(clock: ManualClock, tmp_path: Path, name: str, field: str) -> None:
    """A read of a named pipe would not end: neither `up`, nor a thread of the ingress. The error comes at once."""
    ODD[name](tmp_path / "file")
    changed = settings(**{field: str(tmp_path / "file")})
    with pytest.raises(BadSettings, match=rf"access\.oidc\.{field}: .*(no regular file|Is a directory)"):
        await asyncio.wait_for(asyncio.to_thread(issuer_keys.require_files, changed), timeout=5)
    with pytest.raises(JWTNotChecked):
        await asyncio.wait_for(keys_of(changed).fitting("r1", "RS256"), timeout=5)


def test_a_file_of_the_largest_size_is_used(tmp_path: Path) -> None:
    """Of a larger one, at most one byte more is read into memory."""
    file = tmp_path / "jwks.json"
    file.write_bytes(jwks().ljust(MAX_BYTES))
    issuer_keys.require_files(settings(jwks_file=str(file)))
    os.truncate(file, 64 * MAX_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(BadSettings, match="more than 256 KiB"):
            issuer_keys.require_files(settings(jwks_file=str(file)))
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    finally:
        tracemalloc.stop()


async def test_a_slow_disk_does_not_stop_the_ingress(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read in a thread, while other calls are answered."""
    answered = threading.Event()

    def contents(_file: Path) -> bytes:
        assert answered.wait(timeout=5), "the ingress waits for the disk"
        return jwks()

    monkeypatch.setattr(issuer_keys, "_contents", contents)
    call = asyncio.create_task(keys_of(settings(jwks_file="/jwks.json")).fitting("r1", "RS256"))
    await asyncio.sleep(0.01)
    answered.set()
    assert len(await call) == 1


async def test_a_slow_read_of_a_ca_does_not_stop_the_ingress(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates are read in a thread, too."""
    answered = threading.Event()

    def trust(*_args: object) -> None:
        assert answered.wait(timeout=5), "the ingress waits for the disk"
        raise OSError("the end of the test")

    monkeypatch.setattr(issuer_keys, "_trust", trust)
    call = asyncio.create_task(keys_of(settings()).fitting("r1", "RS256"))
    with capture_logs() as logs:
        await asyncio.sleep(0.01)
        answered.set()
        with pytest.raises(JWTNotChecked):
            await call
    assert "the end of the test" in logs[0]["reason"]
