"""The commands of the registry's own machine: up, down, ray-token, ray-start, firewall, demo. They need ``server``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from greenprompt_client.cli.app import EXIT_NOT_YET, EXIT_UNUSABLE, app, complain, console, needs, problems, say
from registry.environment import EMPTY
from registry.errors import BadSettings

if TYPE_CHECKING:
    from registry.settings import Settings

DEFAULT_CONFIG = Path(__file__).resolve().parent / "local.yaml"
"""Configuration of ``up`` and ``demo`` if none is named; ``configs/local.yaml`` of the repository is the same file."""

CHECK_S = 1800.0
"""Longest time of ``firewall --check`` if none is given, seconds. A filtered machine takes about two minutes."""

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
    check: Annotated[
        bool, typer.Option("--check", help="Print which ports answer this host, which must be outside of the cluster.")
    ] = False,
    ports: Annotated[
        str | None, typer.Option(metavar="<from-to>", help="With --check: the ports to try. Default: 1024-65535.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=1, help="With --check: longest time, seconds. Default: 1800.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="With --check: print one JSON object per line, for each machine.")
    ] = False,
) -> None:
    """Print rules for nftables that open Ray's ports only to the machines of a cluster. Changes nothing.

    To apply them, on each machine: greenprompt firewall cluster.yaml | sudo nft -f -

    With '--check', the exit status is 0 if only ssh and the registry answer, 1 if another port does, 2 if unknown.
    """
    with needs("server"):
        from deployments.launch.firewall import addresses_of, machines_of, rules

    if check:
        if allow:
            raise BadSettings("--allow", "can't be used with --check")
        _check_ports(cluster, port, ports, time_limit, as_json=json)
        return
    if ports is not None or time_limit is not None or json:
        raise BadSettings("--ports, --time-limit and --json", "need --check")
    machines = [*machines_of(cluster), *addresses_of(allow or [], "--allow")]
    typer.echo(rules(machines, open_ports=[port]), nl=False)


def _check_ports(cluster: Path, port: int, ports: str | None, limit_s: float | None, *, as_json: bool) -> None:
    """Print which ports of the machines answer this host.

    Raises:
        BadSettings: The file or the ports can't be read, or this host is a machine of the cluster.
        typer.Exit: A port answers and should not, or that is not known.
    """
    with needs("server"):
        from deployments.launch import port_check
        from deployments.launch.firewall import machines_of

    machines, tried = machines_of(cluster), port_check.parse_ports(ports or port_check.PORTS, "--ports")
    port_check.require_outside(machines)
    with problems.status("trying ports …") as line:
        found = asyncio.run(
            port_check.check_ports(
                machines,
                tried,
                http_port=port,
                limit_s=CHECK_S if limit_s is None else limit_s,
                at_once=port_check.most_at_once(),
                on_progress=lambda done, of: line.update(f"{done:,} of {of:,} ports tried …"),
            )
        )
    for machine in found:
        for text in [port_check.as_json(machine)] if as_json else port_check.lines(machine):
            say(text)
    if any(machine.exposed for machine in found):
        complain(
            "ports answer that should not; to close them, on each machine: "
            f"greenprompt firewall {cluster} --port {port} | sudo nft -f -"
        )
        raise typer.Exit(EXIT_NOT_YET)
    if any(machine.doubts() for machine in found):
        complain("it is not known whether other ports answer, too; see above")
        raise typer.Exit(EXIT_UNUSABLE)


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
    command = [sys.executable, "-P", "-m", "greenprompt_client.cli.main", "up", "--config", str(config.absolute())]
    return [*command, "--address", address] if address else command
