"""What the hosts of tests/hosts ask of the machine that they are made on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.hosts import HOME, install, network


def test_a_clone_that_hosts_would_hide_is_refused_at_once(tmp_path: Path) -> None:
    """Hosts have their home where others may keep their clones; before anything is made that is said."""
    clone = HOME.parent / "clone"
    with pytest.raises(AssertionError, match=f"hosts have a {HOME.parent} of their own"):
        install(clone, tmp_path / "shared", [])
    with pytest.raises(AssertionError, match=f"hosts have a {HOME.parent} of their own"), network(clone, [], tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
