"""The commands that make, list and revoke API keys. They need an operator's key."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from greenprompt_client.cli.app import (
    API_KEY_VARIABLE,
    DEFAULT_URL,
    CAFileOption,
    URLOption,
    app,
    console,
    default_key,
    interactive_client,
    say,
)
from registry.errors import BadSettings
from registry.wire.schemas import KeyState
from registry.wire.words import KEY_PREFIX, Role

keys = typer.Typer(help="Make, list and revoke API keys. Needs an operator's key.", no_args_is_help=True)
app.add_typer(keys, name="keys")

KeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with an operator's key: operator.key in the registry's state_dir. Default: GREENPROMPT_API_KEY, "
        "else the operator's key of a registry on this machine.",
        show_default=False,
    ),
]


@keys.command()
def create(
    role: Annotated[Role, typer.Option(help="What the key allows.")] = Role.CLIENT,
    tenant: Annotated[str | None, typer.Option(help="Tenant of a client's key.")] = None,
    name: Annotated[str, typer.Option(help="For people: who uses it, and for what.")] = "",
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires. Default: never.")] = None,
    key_file: KeyFile = None,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Make an API key and print it: gp_ID_SECRET. It can't be shown again, because only its hash is stored.

    'keys revoke' and 'audit --key' take the ID, which is not secret.
    """
    with interactive_client(url, ca_file, key=operator_key(key_file, url)) as registry:
        say(registry.create_key(role, tenant=tenant, name=name, days=days).key)


@keys.command("list")
def show(key_file: KeyFile = None, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None) -> None:
    """List all API keys, without their texts."""
    with interactive_client(url, ca_file, key=operator_key(key_file, url)) as registry:
        found = registry.keys()
    table = Table("id", "role", "tenant", "name", "last used", "state", box=box.SIMPLE)
    for key in found:
        words = key.id, key.role, key.tenant or "", key.name, _day(key.usedAt), _state(key)
        table.add_row(*(Text(word, overflow="fold") for word in words))
    console.print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as 'keys list' shows it: the ID in gp_ID_SECRET.")],
    key_file: KeyFile = None,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Revoke an API key. It is refused after at most 5 seconds. Leases of its tenant continue; 'release' ends one."""
    key_id = id_of(key_id)
    with interactive_client(url, ca_file, key=operator_key(key_file, url)) as registry:
        registry.revoke_key(key_id)
    say(f"{key_id} is refused from now on")


def id_of(text: str) -> str:
    """Return the id of a key from an id or a whole key, whose secret must get neither into a URL nor into an error."""
    return text.removeprefix(KEY_PREFIX).partition("_")[0] if text.startswith(KEY_PREFIX) else text


def operator_key(file: Path | None, url: str) -> str:
    """Return the key in the file; without a file, the key that all commands use. Raises BadSettings: there is none."""
    if file is None:
        key = default_key(url)
        if key is None:
            problem = (
                f"is needed, or {API_KEY_VARIABLE}: a file with an operator's key, such as operator.key in the "
                "registry's state_dir"
            )
            raise BadSettings("--key-file", problem)
        return key
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadSettings(str(file), f"can't be read: {error}") from error


def _day(time: str | None) -> str:
    return "never" if time is None else time[:10]


def _state(key: KeyState) -> str:
    if key.revokedAt is not None:
        return f"revoked {_day(key.revokedAt)}"
    if key.expiresAt is None:
        return "in force"
    expired = datetime.fromisoformat(key.expiresAt) <= datetime.now(UTC)
    return f"{'expired' if expired else 'until'} {_day(key.expiresAt)}"
