"""The command ``audit``: who changed something in the registry, and who was refused. Needs an operator's key."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from greenprompt_client.cli.app import DEFAULT_URL, CAFileOption, URLOption, app, console, interactive_client, say
from greenprompt_client.cli.keys import KeyFile, id_of, operator_key
from registry.wire.schemas import AuditEntry

FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]


@app.command("audit")
def show(
    since: Annotated[
        datetime | None,
        typer.Option(formats=FORMATS, help="Calls from this time on, UTC. Default: 24 hours ago.", show_default=False),
    ] = None,
    before: Annotated[datetime | None, typer.Option(formats=FORMATS, help="Calls before this time, UTC.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only calls for this tenant.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Only calls with the API key that has this id, or of this iss#sub of JWTs.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, as in GET /audit.")] = False,
    key_file: KeyFile = None,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Show who changed something, and which calls were refused. Refused calls appear within two minutes."""
    begin = datetime.now(UTC) - timedelta(days=1) if since is None else since.replace(tzinfo=UTC)
    end = None if before is None else before.replace(tzinfo=UTC)
    table = Table("time (UTC)", "from", "who", "call", "outcome", "times", box=box.SIMPLE)
    # A registry without keys needs none; one with keys says so.
    chosen = None if key_file is None else operator_key(key_file, url)
    with interactive_client(url, ca_file, key=chosen) as registry:
        for entry in registry.audit(since=begin, before=end, tenant=tenant, key_id=key and id_of(key)):
            if json:
                say(entry.model_dump_json())
            else:
                table.add_row(*(Text(word, overflow="fold") for word in _words(entry)))
    if not json:
        console.print(table)


def _words(entry: AuditEntry) -> tuple[str, ...]:
    """Return the cells of an entry's row in the table."""
    who = filter(None, (entry.key, entry.role, entry.tenant))
    call, about = entry.path or "", entry.about or ""
    if about and "{" in call:
        call, about = re.sub(r"\{[^}]*\}", lambda _: about, call), ""
    return (
        entry.at[:19].replace("T", " "),
        entry.source or "",
        " ".join(who),
        " ".join(filter(None, (entry.method, call, about))),
        " ".join(filter(None, (str(entry.status), entry.code))),
        str(entry.count),
    )
