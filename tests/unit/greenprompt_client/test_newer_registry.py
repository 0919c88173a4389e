"""A client of today with a registry of tomorrow: its answers have more fields, at every level, and new words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from greenprompt_client.answers import AnswerError
from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import main as cli
from greenprompt_client.client import RegistryClient

NEWER = "newIn99"
ANSWERS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "newer_registry.json").read_text(encoding="utf-8")
)
"""By method and path, what a newer registry answers."""


class Recorded(RegistryClient):
    """A client whose registry is the recording."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._http.close()
        self._http = httpx.Client(base_url=url, transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE" and "promptingservice" in request.url.path:
            return httpx.Response(204)
        path = request.url.path
        status = 404 if path.endswith("unknown") else 201 if path == "/promptingservice/request" else 200
        return httpx.Response(status, json=ANSWERS[f"{request.method} {path}"])


@pytest.fixture
def registry() -> Iterator[RegistryClient]:
    with Recorded("http://registry:8000") as client:
        yield client


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command against the recording."""
    monkeypatch.setattr(cli_app, "RegistryClient", Recorded)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)

    return run


def test_every_level_of_the_recording_has_a_new_field() -> None:
    """The recording is what it says: an answer, and each object in it, has a field that is not known today."""
    for name, answer in ANSWERS.items():
        first = answer[0] if isinstance(answer, list) else answer
        assert NEWER in first, name
    report = ANSWERS["GET /measurements/7/report"]
    llm = report["llms"][0]
    assert all(NEWER in part for part in (llm, llm["figures"][0], llm["figures"][0]["gco2eq_per_unit"]))
    assert NEWER in ANSWERS["GET /measurements/7/windows"]["windows"][0]
    assert NEWER in ANSWERS["GET /machines"][0]["wrappers"][0]
    assert NEWER in ANSWERS["GET /promptingservice/request/r-1"]["energy"]


def test_client_ignores_new_fields(registry: RegistryClient) -> None:
    """Every call of the client gives what it knows of the answer."""
    assert registry.request(7, [{"model": "org/small"}]) == ["r-1"]
    with registry.lease("r-1") as lease:
        assert lease.url == "http://registry:8000/wrappers/gpu-1-0/token"
        assert lease.state.energy is not None
        assert lease.state.energy.joules == 90.0
    assert registry.measurement(7).flags == ["new_flag"]
    assert [(machine.machine, machine.drain) for machine in registry.machines()] == [
        ("gpu-1", None),
        ("gpu-2", "evacuating"),
    ]
    assert registry.drain("gpu-1").drain == "drained"
    assert registry.undrain("gpu-1").wrappers[0].llm == "org/small"
    assert registry.health().version == "99.0"


def test_errors_with_new_fields_keep_their_code(registry: RegistryClient) -> None:
    """An error of a newer registry is still the error that it says."""
    with pytest.raises(AnswerError, match="no request has the id") as caught:
        registry.status("unknown")
    assert (caught.value.status, caught.value.answer_code) == (404, "unknown_request")


def test_report_with_new_fields(registry: RegistryClient) -> None:
    """The report and its windows are read into what is known of them, the windows' records included."""
    report, recorded = registry.report(7), ANSWERS["GET /measurements/7/report"]
    assert [llm.llm for llm in report.llms] == [llm["llm"] for llm in recorded["llms"]]
    assert (
        report.llms[0].figures[0].gco2eq_per_unit.value == recorded["llms"][0]["figures"][0]["gco2eq_per_unit"]["value"]
    )
    windows = list(registry.windows(7, detail=True))
    recorded_windows = ANSWERS["GET /measurements/7/windows"]["windows"]
    assert [each.window for each in windows] == [each["window"] for each in recorded_windows]
    assert [each.detail for each in windows] == [each["detail"] for each in recorded_windows]


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["report", "7"], ["drain", "gpu-1", "--wait"], ["undrain", "gpu-1"], ["release", "r-1"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_ignore_new_fields(run: Any, arguments: list[str]) -> None:
    """No command fails on a newer registry, or shows what it does not know."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert NEWER not in done.output


def test_report_of_a_newer_registry_is_written(run: Any, tmp_path: Path) -> None:
    """All forms of a report are written of what is known."""
    files = {form: tmp_path / f"report.{form}" for form in ("html", "csv", "json")}
    done = run("report", "7", *(part for form, path in files.items() for part in (f"--{form}", str(path))))
    assert done.exit_code == 0, done.output
    assert all(path.stat().st_size for path in files.values())
