"""Used by all commands: the typer application, its consoles, its exit statuses, and the check for missing extras."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from greenprompt_client.calls import CONNECT_FOR_S
from greenprompt_client.client import RegistryClient
from registry.environment import EMPTY_VARIABLE, ENV_PREFIX, problems_of
from registry.errors import BadSettings
from registry.settings import Settings
from registry.wire.http import base_url_of, is_loopback

EXIT_NOT_YET = 1
"""Exit status if the awaited result did not occur."""

EXIT_UNUSABLE = 2
"""Exit status if the command line, the configuration or the environment does not allow the command."""

EXIT_UNREACHABLE = 3
"""Exit status if no registry answers, or it is temporarily unavailable."""

EXIT_NOT_FOUND = 4
"""Exit status if the registry does not know an id or name in the command, or has forgotten it."""

EXIT_REFUSED = 5
"""Exit status if the registry refuses the command."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""

EXIT_STATUSES = (
    "Exit status: 0 done; 1 not completed; 2 wrong usage or configuration; "
    "3 no registry answers; 4 unknown id or name; 5 refused by the registry; 130 Ctrl-C."
)

DEFAULT_URL = "http://127.0.0.1:8000"

DISTRIBUTION = "greenprompt-llm-registry"
_OWN = ("greenprompt_client", "registry", "deployments")

app = typer.Typer(
    help="GreenPrompt LLM Registry: leases LLMs to one client at a time and measures their energy.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(version(DISTRIBUTION))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


console = Console()
problems = Console(stderr=True, soft_wrap=True)

API_KEY_VARIABLE = "GREENPROMPT_API_KEY"

OPERATOR_KEYS = (Path("build/state/operator.key"), Path("~/greenprompt-state/operator.key"))
"""Where a registry writes its operator's key with configs/local.yaml, and with configs/production.yaml."""


def api_key() -> str | None:
    """Return the API key from the environment, None if it is not set.

    There is no option for it: all users of the machine can see the options of a running command.
    """
    return os.environ.get(API_KEY_VARIABLE)


URLOption = Annotated[str, typer.Option("--url", help="Base URL of a running registry.", envvar="GREENPROMPT_URL")]
CAFileOption = Annotated[
    Path | None,
    typer.Option(
        help="File of the CA of a registry behind TLS (PEM), the only one to be trusted. Default: public CAs.",
        envvar="GREENPROMPT_CA_FILE",
        show_default=False,
    ),
]


JSONOption = Annotated[
    bool, typer.Option("--json", help="Print JSON with the fields of the HTTP API, one object per line.")
]
ArgOption = Annotated[
    list[str] | None,
    typer.Option("--arg", help="Prompting argument of all LLMs, e.g. max_new_tokens=64. Repeatable."),
]
DeploymentArgOption = Annotated[
    list[str] | None,
    typer.Option("--deployment-arg", help="Deployment argument of all LLMs, e.g. max_model_len=2048. Repeatable."),
]
CHAT_TEMPLATE: Any = typer.Option(
    "--chat-template/--no-chat-template", help="Whether to put questions into the chat template."
)
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Name of your tenant: tenants take turns.")]
PriorityOption = Annotated[str | None, typer.Option("--priority", help="low, normal or high, within the tenant.")]
GradeOption = Annotated[
    str | None, typer.Option("--grade", help="'measurement': the LLM is handed over warm, on a machine at rest.")
]
GPUTypeOption = Annotated[str | None, typer.Option("--gpu-type", help="GPUs that the machine must have, e.g. H100.")]
LikeOption = Annotated[
    str | None,
    typer.Option("--like", help="Id of an earlier request to repeat: same LLM, software and kind of machine."),
]
JoulesOption = Annotated[float | None, typer.Option("--max-joules", help="Energy that a lease may use, joules.")]
EmissionsOption = Annotated[
    float | None, typer.Option("--max-gco2eq", help="Emissions that a lease may cause, grams CO2eq.")
]


# D101: a client has dependencies of its own
@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Return a context for imports that need an extra, e.g. ``server``. If it is missing, the command ends.

    Raises:
        typer.Exit: A package that is not ours can't be imported; standard error says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in _OWN:
            raise
        complain(f"this command needs {error.name}: pip install '{DISTRIBUTION}[{extra}]'")
        raise typer.Exit(EXIT_UNUSABLE) from None


def complain(problem: str) -> None:
    """Print a problem on standard error, without markup."""
    problems.print(f"greenprompt: {problem}", markup=False, highlight=False, emoji=False)


def note(line: str) -> None:
    """Print a line that is not the result of a command on standard error, without markup."""
    problems.print(line, markup=False, highlight=False, emoji=False)


def say(line: str) -> None:
    """Print a line exactly as it is; rich would replace ``:100:`` and tabs."""
    console.file.write(f"{line}\n")
    console.file.flush()


def say_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII, so that no terminal changes it."""
    say(json.dumps(value))


def default_key(url: str) -> str | None:
    """Return the key from the environment, else this machine's operator's key; None if there is neither."""
    given = api_key()
    return _operator_key(url) if given is None else given


def _operator_key(url: str) -> str | None:
    """Return the key that a registry on this machine wrote for its operator; None if this user can't read one.

    It is used for loopback addresses only: no other machine gets it.
    """
    if not is_loopback(base_url_of(url).host):
        return None
    for file in OPERATOR_KEYS:
        try:
            return file.expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
    return None


def interactive_client(
    url: str, ca_file: Path | None = None, *, tenant: str | None = None, key: str | None = None
) -> RegistryClient:
    """Return a client for a command; if nothing listens at ``url``, it fails within seconds. Sends nothing yet.

    ``key`` None: see ``default_key``. Raises like ``require_known_variables``.
    """
    return _client(url, ca_file, tenant, default_key(url) if key is None else key)


def tenants_client(url: str, ca_file: Path | None, tenant: str | None = None) -> RegistryClient:
    """Do as ``interactive_client``, but with the key of the environment or none: an operator's key leases no LLM."""
    return _client(url, ca_file, tenant, api_key())


def _client(url: str, ca_file: Path | None, tenant: str | None, key: str | None) -> RegistryClient:
    require_known_variables()
    return RegistryClient(url, tenant=tenant, api_key=key, ca_file=ca_file, connect_for_s=CONNECT_FOR_S)


def require_known_variables() -> None:
    """Raise BadSettings for an empty or misspelt GREENPROMPT_… variable: the command could use a wrong registry."""
    url = f"{ENV_PREFIX}URL"
    if not os.environ.get(url, url).strip():
        raise BadSettings(url, EMPTY_VARIABLE)
    for name, problem in problems_of(Settings, os.environ):
        raise BadSettings(name, problem)
