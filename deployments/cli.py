"""The ``greenprompt`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from registry.client import RegistryClient
from registry.errors import RegistryError
from registry.settings import Settings, load_settings

EXIT_UNUSABLE = 2
"""Exit status when the configuration or the surroundings don't allow the command."""

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "local.yaml"
DEFAULT_URL = "http://127.0.0.1:8000"

app = typer.Typer(
    help="GreenPrompt LLM Registry: hands LLMs out exclusively, with an honest account of their energy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
problems = Console(stderr=True, soft_wrap=True)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Configuration file (YAML).")]
AddressOption = Annotated[str | None, typer.Option(help="Join this running Ray cluster ('auto': the local one).")]
URLOption = Annotated[str, typer.Option("--url", help="Base URL of a running registry.", envvar="GREENPROMPT_URL")]


@app.command()
def up(
    config: ConfigOption = DEFAULT_CONFIG,
    address: AddressOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready; end it with 'down'.")] = False,
) -> None:
    """Start the registry with its cluster, in the foreground until Ctrl-C."""
    from deployments import lifecycle

    settings = _settings(config, address)
    if detach:
        lifecycle.run_detached(settings, _up_command(config, address), say=console.print)
    else:
        lifecycle.run_in_foreground(settings, say=console.print)


@app.command()
def down(config: ConfigOption = DEFAULT_CONFIG, address: AddressOption = None) -> None:
    """End a registry that was started with 'up'; returns when everything is gone."""
    from deployments import lifecycle

    lifecycle.end(_settings(config, address), say=console.print)


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="LLM to try (hub id or path); repeatable.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Start everything, act as a Prompting Service over HTTP, show what came out, and end everything."""
    from deployments.demo import run_demo

    run_demo(config, model or [], console)


@app.command()
def status(url: URLOption = DEFAULT_URL) -> None:
    """Show machines, wrappers and LLMs of a running registry."""
    with RegistryClient(url) as registry:
        machines: list[dict[str, Any]] = registry.get("/machines")
    table = Table("machine", "wrapper", "GPUs", "status", "LLM", "note")
    for machine in machines:
        for wrapper in machine["wrappers"]:
            table.add_row(
                machine["machine"],
                wrapper["wrapper"],
                str(wrapper["gpus"]),
                wrapper["status"],
                wrapper["llm"] or "-",
                wrapper["phase"] or wrapper["reason"] or "",
            )
    console.print(table if machines else "No LLM Machine has joined yet.")


@app.command()
def release(request_id: str, url: URLOption = DEFAULT_URL) -> None:
    """Give back, or cancel, a request."""
    with RegistryClient(url) as registry:
        registry.release(request_id)


def _settings(config: Path, address: str | None) -> Settings:
    return load_settings(config, **({"ray": {"address": address}} if address else {}))


def _up_command(config: Path, address: str | None) -> list[str]:
    command = [sys.executable, "-m", "deployments.cli", "up", "--config", str(config.absolute())]
    return [*command, "--address", address] if address else command


def main() -> None:
    """Entry point: every expected error is one line on standard error and exit status 2."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        app()
    except RegistryError as error:
        problems.print(f"greenprompt: {error}", markup=False, highlight=False)
        sys.exit(EXIT_UNUSABLE)
    except httpx.TransportError as error:
        problems.print(f"greenprompt: no registry answers there ({error})", markup=False, highlight=False)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()
