"""The commands of the registry's own machine: up, down, ray-token, ray-start, firewall, demo. They need ``server``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from greenprompt_client.cli.app import app, console, needs, say
from registry.environment import EMPTY
from registry.errors import BadSettings

if TYPE_CHECKING:
    from registry.settings import Settings

DEFAULT_CONFIG = Path(__file__).resolve().parent / "local.yaml"
"""Configuration of ``up`` and ``demo`` if none is named; ``configs/local.yaml`` of the repository is the same file."""

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file (YAML).", show_default="configs/local.yaml")
]
AddressOption = Annotated[str | None, typer.Option(help="Use this running Ray cluster ('auto': the local one).")]


@app.command()
def up(
    config: ConfigOption = DEFAULT_CONFIG,
    address: AddressOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the registry is ready. End it with 'down'.")
    ] = False,
) -> None:
    """Start the registry and its cluster. Run in the foreground until Ctrl-C. A cluster that dies is replaced.

    With '--address' and '--detach', the registry keeps running on that cluster. Repeating the command changes nothing.
    """
    with needs("server"):
        # D10: imported late: most commands need no server
        from deployments.launch import lifecycle

    settings = _settings(config, address)
    if detach and settings.ray.address is not None:
        lifecycle.start_on_cluster(settings, [*_up_command(config, address), "--detach"], say=say)
    elif detach:
        lifecycle.run_detached(settings, _up_command(config, address), say=say)
    else:
        lifecycle.run_in_foreground(settings, say=say)


@app.command()
def down(config: ConfigOption = DEFAULT_CONFIG, address: AddressOption = None) -> None:
    """Stop a registry that was started with 'up', and wait until everything has ended."""
    with needs("server"):
        from deployments.launch import lifecycle

    lifecycle.end(_settings(config, address), say=say)


@app.command("ray-token")
def ray_token() -> None:
    """Make the access token of a cluster, in '~/.ray/auth_token', unless there is one; only you can read it."""
    with needs("server"):
        from deployments.launch.access_token import make_token, token_path

    path = token_path()
    console.print(f"{path} was made." if make_token(path) else f"{path} is there already.", soft_wrap=True)


@app.command("ray-start", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ray_start(context: typer.Context) -> None:
    """Make this machine a node of a cluster: run 'ray start' with these options, unless Ray already runs with them."""
    with needs("server"):
        from deployments.launch.node import start_ray

    console.print("Ray was started." if start_ray(context.args) else "Ray already runs here with these options.")


@app.command()
def firewall(
    cluster: Annotated[Path, typer.Argument(help="cluster.yaml of the cluster.")],
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A machine that may reach all ports, too, e.g. one for monitoring. Repeatable."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="http.port of the registry.")] = 8000,
) -> None:
    """Print rules for nftables that open Ray's ports only to the machines of a cluster. Changes nothing.

    To apply them, on each machine: greenprompt firewall cluster.yaml | sudo nft -f -
    """
    with needs("server"):
        from deployments.launch.firewall import addresses_of, machines_of, rules

    machines = [*machines_of(cluster), *addresses_of(allow or [], "--allow")]
    typer.echo(rules(machines, open_ports=[port]), nl=False)


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="LLM to try (hub id or path). Repeatable.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Start a registry, use it over HTTP as a Prompting Service would, show the results, and stop everything."""
    with needs("server,cpu"):
        from greenprompt_client.demo.demo import run_demo

    run_demo(config, model or [], console)


def _settings(config: Path, address: str | None) -> Settings:
    from registry.settings import load_settings

    if address is not None and not address.strip():
        raise BadSettings("--address", EMPTY)
    return load_settings(config, **({"ray": {"address": address}} if address else {}))


def _up_command(config: Path, address: str | None) -> list[str]:
    command = [sys.executable, "-m", "greenprompt_client.cli.main", "up", "--config", str(config.absolute())]
    return [*command, "--address", address] if address else command
