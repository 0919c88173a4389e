"""The command ``audit``: which times it asks for, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from typer.testing import CliRunner, Result

from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import main as cli
from greenprompt_client.client import RegistryClient
from registry.wire.schemas import AuditEntry, AuditPage

REVOKED = AuditEntry(
    number=7,
    at="2026-11-30T09:00:00.123Z",
    method="DELETE",
    path="/keys/{key_id}",
    status=204,
    code=None,
    key="0a1b2c3d",
    role="operator",
    tenant=None,
    source="10.0.5.7",
    about="ffffffff",
    count=1,
)
REFUSED = REVOKED.model_copy(
    update={"number": 8, "key": None, "role": None, "about": None, "status": 401, "code": "key_refused", "count": 900}
)


class FakeClient(RegistryClient):
    """A client without a registry; ``asked`` has what the command wanted."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def audit(self, **wanted: Any) -> Iterator[AuditEntry]:
        self.asked.append(wanted)
        yield from (REVOKED, REFUSED)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> Any:
    """Runs the command in an empty folder, without a key."""
    monkeypatch.setattr(cli_app, "RegistryClient", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [])
    monkeypatch.setattr(cli_app.console, "width", 160)

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli.app, ["audit", *words], catch_exceptions=False)

    return run


def test_it_shows_the_last_day(run: Any) -> None:
    """One row per entry: who, from where, what, the outcome and how often."""
    lines = [" ".join(line.split()) for line in run().output.splitlines()]
    assert "2026-11-30 09:00:00 10.0.5.7 0a1b2c3d operator DELETE /keys/ffffffff 204 1" in lines
    assert "2026-11-30 09:00:00 10.0.5.7 DELETE /keys/{key_id} 401 key_refused 900" in lines
    ago = datetime.now(UTC) - FakeClient.asked[0]["since"]
    assert timedelta(hours=24) <= ago < timedelta(hours=24, minutes=5)


def test_times_are_utc(run: Any) -> None:
    """A day or a time without a zone is one of UTC, wherever the command runs."""
    run("--since", "2026-11-29", "--before", "2026-11-30T12:30", "--tenant", "ann", "--key", "0a1b2c3d")
    assert FakeClient.asked == [
        {
            "since": datetime(2026, 11, 29, tzinfo=UTC),
            "before": datetime(2026, 11, 30, 12, 30, tzinfo=UTC),
            "tenant": "ann",
            "key_id": "0a1b2c3d",
        }
    ]


def test_a_whole_key_is_looked_for_by_its_id(run: Any) -> None:
    """Its secret stays out of the URL."""
    run("--key", "gp_0a1b2c3d_s_e-cret")
    assert FakeClient.asked[0]["key_id"] == "0a1b2c3d"


def test_json_is_one_object_per_line(run: Any) -> None:
    """Programs get the entries as the registry has them."""
    lines = run("--json").output.splitlines()
    assert [AuditEntry.model_validate(json.loads(line)) for line in lines] == [REVOKED, REFUSED]


def test_the_client_reads_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are sent as the registry wants them, and each page begins where the one before ended."""
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(dict(request.url.params))
        page = AuditPage(entries=[REVOKED], next=7) if len(seen) == 1 else AuditPage(entries=[REFUSED])
        return httpx.Response(200, text=page.model_dump_json())

    with RegistryClient("http://127.0.0.1:1") as registry:
        monkeypatch.setattr(registry, "_http", httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x"))
        since = datetime(2026, 11, 30, 10, tzinfo=UTC).astimezone()
        assert list(registry.audit(since=since, tenant="ann")) == [REVOKED, REFUSED]
    wanted = {"since": "2026-11-30T10:00:00.000000Z", "tenant": "ann"}
    assert seen == [wanted, {**wanted, "after": "7"}]
