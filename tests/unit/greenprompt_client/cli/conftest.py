"""For tests of commands: an empty folder, in which no key is found."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The current folder. Neither it, nor the home folder, nor the environment has a key."""
    monkeypatch.delenv("GREENPROMPT_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
