"""The secret that HAProxies and replicas make from the token of their cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.machine.cluster_token import proxy_secret
from registry.errors import BadSettings


def test_machines_with_one_token_make_one_secret(tmp_path: Path) -> None:
    """White space around the token does not matter, as for Ray. Another token makes another secret."""
    secrets = []
    for number, text in enumerate(("a" * 64, f"{'a' * 64}\n", "b" * 64)):
        file = tmp_path / str(number)
        file.write_text(text)
        secrets.append(proxy_secret(file))
    assert secrets[0] == secrets[1] != secrets[2]


def test_the_token_is_not_shown(tmp_path: Path) -> None:
    """The secret is sent to replicas: it has 64 digits, and is not the token."""
    file = tmp_path / "token"
    file.write_text("a" * 64)
    secret = proxy_secret(file)
    assert len(bytes.fromhex(secret)) == 32
    assert "a" * 64 not in secret


@pytest.mark.parametrize(("content", "problem"), [(None, "No such file"), (b" \n", "is empty"), (b"\xff", "not text")])
def test_no_token_is_no_secret(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """A token that is missing, empty or not text is an error with the file's name, not a secret that all can guess."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadSettings, match=problem) as refused:
        proxy_secret(file)
    assert str(file) in str(refused.value)
    assert "ray-token" in str(refused.value)
