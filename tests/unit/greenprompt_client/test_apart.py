"""The client side is a house of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import deployments
import registry
from deployments.launch import node
from greenprompt_client import client
from registry import client as old_name


def test_old_name_of_the_client_stays() -> None:
    """`from registry.client import RegistryClient` is the client, as it was before the client had its own package."""
    assert {name: getattr(old_name, name) for name in old_name.__all__} == {
        name: getattr(client, name) for name in old_name.__all__
    }
    assert "RegistryClient" in old_name.__all__


def test_client_side_restarts_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash by which Ray is started anew on a machine reads files of registry and deployments, of nobody else."""
    read: list[Path] = []

    def noted(path: Path) -> bytes:
        read.append(path)
        return b""

    monkeypatch.setattr(Path, "read_bytes", noted)
    node._code()
    homes = [Path(package.__path__[0]) for package in (registry, deployments)]
    assert {home for home in homes for path in read if path.is_relative_to(home)} == set(homes)
    assert [path for path in read if not any(path.is_relative_to(home) for home in homes)] == []
