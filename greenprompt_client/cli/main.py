"""The ``greenprompt`` command."""

from __future__ import annotations

import io
import os
import signal
import sys
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import httpx
import stamina
import typer

from greenprompt_client.answers import UNEXPECTED, AnswerError, NotDeployed
from greenprompt_client.cli import audit, keys, leasing, server, status
from greenprompt_client.cli.app import (
    API_KEY_VARIABLE,
    CHAT_TEMPLATE,
    DEFAULT_URL,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_NOT_YET,
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_UNUSABLE,
    ArgOption,
    CAFileOption,
    DeploymentArgOption,
    EmissionsOption,
    GPUTypeOption,
    GradeOption,
    JoulesOption,
    LikeOption,
    PriorityOption,
    TenantOption,
    URLOption,
    api_key,
    app,
    complain,
    console,
    interactive_client,
    needs,
    require_known_variables,
    say,
)
from greenprompt_client.cli.status import drain_note
from greenprompt_client.client import RegistryClient
from registry.errors import LeaseEnded, RegistryError
from registry.wire.schemas import MachineState

__all__ = ["app", "audit", "keys", "leasing", "main", "server", "status"]


ExperimentFile = Annotated[
    Path | None, typer.Argument(help="Experiment file (YAML). Options override its fields.", show_default=False)
]
LLMs = Annotated[list[str] | None, typer.Option("--llm", "-m", help="LLM (hub id or path). Repeatable.")]
PromptFile = Annotated[
    str | None,
    typer.Option("--prompts", "-p", metavar="<path>", help="File of the prompts: JSONL or a JSON array."),
]
OutputFolder = Annotated[str | None, typer.Option("--output", "-o", metavar="<path>", help="Folder for the results.")]
PromptTimeout = Annotated[float | None, typer.Option("--prompt-timeout", help="Maximum wait for an answer, seconds.")]


@app.command()
def measure(
    experiment: ExperimentFile = None,
    llms: LLMs = None,
    prompts: PromptFile = None,
    question_field: Annotated[str | None, typer.Option(help="Field of a prompt that contains the question.")] = None,
    output: OutputFolder = None,
    repetitions: Annotated[int | None, typer.Option(help="How often each LLM answers each prompt.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Number of prompts in flight.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Number of warm-up prompts per lease; they are not counted.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for the order of the LLMs.")] = None,
    arg: ArgOption = None,
    deployment_arg: DeploymentArgOption = None,
    modeltyp: Annotated[str | None, typer.Option(help="Task of the LLMs, e.g. text-generation.")] = None,
    uses_chat_template: Annotated[bool | None, CHAT_TEMPLATE] = None,
    measurement_id: Annotated[int | None, typer.Option(help="The measurementId. Default: a new one.")] = None,
    tenant: TenantOption = None,
    priority: PriorityOption = None,
    grade: GradeOption = None,
    gpu_type: GPUTypeOption = None,
    like: LikeOption = None,
    max_joules: JoulesOption = None,
    max_gco2eq: EmissionsOption = None,
    prompt_timeout_s: PromptTimeout = None,
    url: Annotated[str | None, typer.Option(help="Base URL of the registry.", envvar="GREENPROMPT_URL")] = None,
    ca_file: CAFileOption = None,
) -> None:
    """Run prompts on LLMs, and sum up energy and carbon.

    To resume an interrupted run, repeat the command. LLMs, prompts and repetitions may be added to a run.

    Exit status 1: some answers are missing, or an LLM refused every prompt. 130: Ctrl-C.
    """
    given = locals()
    from greenprompt_client.measure.experiment import arguments, load_plan
    from greenprompt_client.measure.run import run_measure

    require_known_variables()
    fields = {name: value for name, value in given.items() if value is not None and value != []}
    for name in ("experiment", "ca_file"):
        fields.pop(name, None)
    plan = load_plan(
        experiment,
        prompting_args=arguments(fields.pop("arg", [])),
        deployment_args=arguments(fields.pop("deployment_arg", [])),
        **fields,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that a scheduler ends releases its LLMs, too
    try:
        complete = run_measure(plan, console, api_key(), ca_file)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not complete:
        raise typer.Exit(EXIT_NOT_YET)


@app.command()
def report(
    measurement: Annotated[int, typer.Argument(min=1, help="The measurementId.")],
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with plots to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the energy windows to this file, one row per window.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole report with its windows to this file.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of the measurement, if not 'default'.")] = None,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Show energy and carbon of a measurement by LLM, how they were determined, and what is not known."""
    from greenprompt_client.report.files import write_report
    from greenprompt_client.report.table import report_table

    with interactive_client(url, ca_file, tenant=tenant) as registry:
        found = registry.report(measurement)
        if html or csv or json:
            found = replace(found, windows=tuple(registry.windows(measurement, detail=json is not None)))
    console.print(report_table(found))
    with needs("report"):
        for path in write_report(found, html=html, csv=csv, json=json):
            say(f"Written: {path}")


@app.command()
def drain(
    machine: Annotated[str, typer.Argument(help="Name of the machine, as 'status' shows it.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the machine has no wrapper any more.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Maximum wait, seconds. After it: exit status 1; the draining continues."),
    ] = None,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Grant no new leases on a machine. When its leases have ended, its wrappers are removed."""
    with interactive_client(url, ca_file) as registry:
        state = registry.drain(machine)
        if wait:
            state = _wait_until_drained(registry, machine, timeout)
    say(f"{machine}: {drain_note(state)}")


@app.command()
def undrain(
    machine: Annotated[str, typer.Argument(help="Name of the machine, as 'status' shows it.")],
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Use a drained machine again; its wrappers are recreated."""
    with interactive_client(url, ca_file) as registry:
        registry.undrain(machine)
    say(f"{machine} is used again")


def _wait_until_drained(registry: RegistryClient, machine: str, timeout_s: float | None) -> MachineState:
    """Wait and show the progress; exit with status 1 on timeout, or if the machine is undrained meanwhile."""
    with console.status(f"{machine} …") as line:
        try:
            state = registry.wait_until_drained(
                machine, timeout_s=timeout_s, on_look=lambda seen: line.update(f"{machine}: {drain_note(seen)}")
            )
        except TimeoutError as error:
            complain(f"{error}; the draining continues")
            raise typer.Exit(EXIT_NOT_YET) from None
    if state.drain is None:
        complain(f"{machine} was undrained meanwhile")
        raise typer.Exit(EXIT_NOT_YET)
    return state


def exit_status(error: RegistryError | httpx.TransportError) -> int:
    """Return the exit status for a command that failed with this error."""
    if isinstance(error, httpx.TransportError):
        return EXIT_UNREACHABLE
    if isinstance(error, NotDeployed):
        return EXIT_NOT_YET
    if not isinstance(error, AnswerError):
        return EXIT_UNUSABLE
    if error.answer_code == LeaseEnded.code:
        return EXIT_NOT_YET
    if error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE) and error.answer_code != UNEXPECTED:
        return EXIT_NOT_FOUND
    unavailable = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.answer_code == UNEXPECTED
    return EXIT_UNREACHABLE if unavailable else EXIT_REFUSED


_KEY_FROM = f"this command takes the key from {API_KEY_VARIABLE}"
_REMEDIES = {
    "key_needed": _KEY_FROM,
    "key_refused": _KEY_FROM,
    "jwt_refused": f"this command takes the JWT from {API_KEY_VARIABLE}",
    "unknown_measurement": "for a tenant other than 'default', add --tenant (not needed with that tenant's own key)",
}
"""What to do on the command line, by the code of the registry's error, which names only HTTP."""


def told(error: RegistryError) -> str:
    """Return the text of an error, with a remedy for the command line if there is one."""
    remedy = _REMEDIES.get(error.answer_code) if isinstance(error, AnswerError) else None
    return str(error) if remedy is None else f"{error}; {remedy}"


def main() -> None:
    """Run the command line: every expected error is one line on standard error, with an exit status for its kind."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # replaces characters that the terminal can't show
            stream.reconfigure(errors="replace")
    stamina.instrumentation.set_on_retry_hooks(())  # calls are retried silently; the last error is shown
    try:
        app()
    except RegistryError as error:
        complain(told(error))
        sys.exit(exit_status(error))
    except httpx.TransportError as error:
        complain(f"no registry answers at this URL ({error})")
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
