"""For all tests: the cheap ones go first, so that a fault shows soon and a running cluster disturbs no other test.

Where several processes share them, the longest go first, so that none is left alone with a long one at the end.

HYPOTHESIS_PROFILE says how many examples Hypothesis makes: ``default``, ``quick`` (a fifth of them) or ``long`` (a
hundred times as many).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from tests.support.fake_hub import FakeHub

EXAMPLES = 100

# No deadline: how long an example takes says how busy the machine is.
settings.register_profile("default", max_examples=EXAMPLES, deadline=None, print_blob=True)
settings.register_profile("quick", max_examples=EXAMPLES // 5, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=100 * EXAMPLES, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ORDER = ("unit", "property", "integration", "simulation", "engine", "cluster", "hosts")
NOT_COUNTED = ("property", "simulation")
"""Folders whose tests are left out of the coverage: counting doubles their time, and they are there to find faults."""
SHARED_ORDER = ("simulation", "property", "integration", "unit", "engine", "cluster", "hosts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder; inside a folder the order stays. Each test has an id of its own."""
    root, order = Path(__file__).parent, SHARED_ORDER if "PYTEST_XDIST_WORKER" in os.environ else ORDER

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(root).parts[0]

    for item in items:
        if folder(item) in NOT_COUNTED:
            item.add_marker("no_cover")
        # pytest 9.2 gives all of Schemathesis's tests of a function one id, and xdist runs one test of each id.
        if item.parent is not None and not item.nodeid.endswith(item.name):
            item._id = item.parent.id.child(item.name)
    assert len({item.nodeid for item in items}) == len(items), "tests have the same id"
    items.sort(key=lambda item: order.index(folder(item)))


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """What a test configures of the log ends with it: others read what is written to standard output."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that this process, and those it starts, take for the Hugging Face one."""
    from huggingface_hub import constants

    with FakeHub().running() as hub:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        # Read when the library was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield hub
