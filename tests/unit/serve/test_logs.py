"""The registry's own log: a file that stays, bounded, one JSON object a line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import structlog

import deployments
from deployments.serve import logs
from deployments.serve.logs import REGISTRY_LOG, configure_logging, configure_replica_logging
from registry.core.decision import Changes
from registry.core.events import LeaseBound
from registry.core.records import Request
from registry.service.history import log_fields, rows_of
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Scene


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The file of a test's log is closed at its end; tests/conftest.py restores the rest."""
    yield
    configure_logging()


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_lines_are_in_the_file_and_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both have the same line; only its owner reads the file, and who comes later appends to it."""
    for event in ("one", "two"):
        configure_logging(tmp_path / REGISTRY_LOG)
        structlog.get_logger("registry.test").warning(event, request_id="r-1")
    (one, two) = lines(tmp_path / REGISTRY_LOG)
    assert (one["event"], one["request_id"], one["level"], two["event"]) == ("one", "r-1", "warning", "two")
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == [one, two]
    assert stat.S_IMODE((tmp_path / REGISTRY_LOG).stat().st_mode) == 0o600


def test_without_a_file_standard_error_is_all(capsys: pytest.CaptureFixture[str]) -> None:
    """As the other parts log."""
    configure_logging()
    structlog.get_logger("registry.test").info("one")
    assert json.loads(capsys.readouterr().err)["event"] == "one"


@pytest.mark.parametrize("with_file", [False, True])
def test_a_full_disk_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_file: bool) -> None:
    """A line that can't be written is dropped: the caller goes on, in the actor as in a replica."""
    file = tmp_path / REGISTRY_LOG
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        monkeypatch.setattr("sys.stderr", full)
        monkeypatch.setattr("sys.__stderr__", full)
        if with_file:
            configure_logging(file)
        else:
            configure_replica_logging()
        for _ in range(3):
            structlog.get_logger("registry.test").error("one")
        with suppress(OSError):
            full.close()
    if with_file:
        assert [line["event"] for line in lines(file)] == ["one"] * 3


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some older files are kept, and no line is cut: 100 lines of 1 kB in files of 10 kB, 2 of them older."""
    monkeypatch.setattr(logs, "FILE_BYTES", 10_000)
    monkeypatch.setattr(logs, "OLDER_FILES", 2)
    configure_logging(tmp_path / REGISTRY_LOG)
    for number in range(100):
        structlog.get_logger("registry.test").info("a line", number=number, text="x" * 1000)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [REGISTRY_LOG, f"{REGISTRY_LOG}.1", f"{REGISTRY_LOG}.2"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    kept = [line["number"] for file in reversed(files) for line in lines(file)]
    assert kept == list(range(100))[-len(kept) :]
    assert len(kept) > 18


def test_a_log_that_cannot_be_written_keeps_nobody_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a full disk, say: the line is on standard error, and the registry goes on."""
    (tmp_path / REGISTRY_LOG).mkdir()
    configure_logging(tmp_path / REGISTRY_LOG)
    structlog.get_logger("registry.test").info("one")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["one"]


def test_a_line_names_the_request_that_an_event_changed() -> None:
    """A wrapper's event names no request: the line does, with its measurement, its wrapper and its cause."""
    scene = Scene()
    scene.machine("m")
    scene.ask(1, "A")
    scene.runs()
    event = LeaseBound("m-0", scene.wrapper().epoch)
    scene.tell(event)
    request: Request = scene.request("1a")
    (row,) = rows_of(event, Changes(requests=(request,)), scene.allocator.request, 1000.0, 17)
    assert log_fields(row) == {
        "kind": "LeaseBound",
        "request_id": "1a",
        "measurement_id": 1,
        "wrapper_id": "m-0",
        "cause_id": "17",
        "epoch": event.epoch,
        "status": RequestStatus.DEPLOYED.value,
    }


def test_all_of_our_parts_log_in_one_way() -> None:
    """No module writes by Python's own ``logging``, which would be neither JSON nor in one place."""
    own = [
        f"{file}:{number}"
        for file in sorted(Path(deployments.__path__[0]).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "= logging.getLogger(" in line
    ]
    assert own == []
