"""The ``greenprompt`` command."""

from __future__ import annotations

import io
import os
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import httpx
import stamina
import typer

from greenprompt_client.cli import server
from greenprompt_client.cli.app import (
    DEFAULT_URL,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_NOT_YET,
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_UNUSABLE,
    URLOption,
    app,
    complain,
    console,
    needs,
    say,
)
from greenprompt_client.cli.status import drain_note, overview
from greenprompt_client.client import CONNECT_FOR_S, UNEXPECTED, AnswerError, RegistryClient
from registry.environment import EMPTY_VARIABLE, ENV_PREFIX, problems_of
from registry.errors import BadSettings, RegistryError
from registry.settings import Settings
from registry.wire.schemas import MachineState

__all__ = ["app", "main", "server"]


ExperimentFile = Annotated[
    Path | None, typer.Argument(help="Experiment (YAML); options override its fields.", show_default=False)
]
LLMs = Annotated[list[str] | None, typer.Option("--llm", "-m", help="LLM to ask (hub id or path); repeatable.")]
PromptFile = Annotated[
    str | None, typer.Option("--prompts", "-p", metavar="<path>", help="Prompts: JSONL or a JSON array.")
]
OutputFolder = Annotated[str | None, typer.Option("--output", "-o", metavar="<path>", help="Folder of the results.")]
PromptingArgs = Annotated[
    list[str] | None,
    typer.Option("--arg", help="Prompting argument for all LLMs, as in max_new_tokens=64; repeatable."),
]
DeploymentArgs = Annotated[
    list[str] | None, typer.Option("--deployment-arg", help="Deployment argument, as in max_model_len=2048.")
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option("--chat-template/--no-chat-template", help="Whether questions are put into the chat template."),
]
PromptTimeout = Annotated[float | None, typer.Option("--prompt-timeout", help="Longest wait for an answer, s.")]


@app.command()
def measure(
    experiment: ExperimentFile = None,
    llms: LLMs = None,
    prompts: PromptFile = None,
    question_field: Annotated[str | None, typer.Option(help="Which field of a prompt is the question.")] = None,
    output: OutputFolder = None,
    repetitions: Annotated[int | None, typer.Option(help="How often each LLM is asked each prompt.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Prompts in flight at once.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up prompts of each lease (not counted).")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed: the order of the LLMs.")] = None,
    arg: PromptingArgs = None,
    deployment_arg: DeploymentArgs = None,
    modeltyp: Annotated[str | None, typer.Option(help="What the LLMs do, as in text-generation.")] = None,
    uses_chat_template: ChatTemplate = None,
    measurement_id: Annotated[int | None, typer.Option(help="The measurementId, instead of a new one.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose turn in the queue it takes.")] = None,
    priority: Annotated[str | None, typer.Option(help="low, normal or high, among the tenant's own.")] = None,
    grade: Annotated[str | None, typer.Option(help="'measurement': warm LLM, machine at rest.")] = None,
    gpu_type: Annotated[str | None, typer.Option(help="GPUs that the machine must have, as in H100.")] = None,
    like: Annotated[str | None, typer.Option(help="Id of an earlier request: the same LLM and machine again.")] = None,
    max_joules: Annotated[float | None, typer.Option(help="Energy that each lease may use, J.")] = None,
    max_gco2eq: Annotated[float | None, typer.Option(help="Emissions that each lease may cause, g.")] = None,
    prompt_timeout_s: PromptTimeout = None,
    url: Annotated[str | None, typer.Option(help="Base URL of the registry.", envvar="GREENPROMPT_URL")] = None,
) -> None:
    """Run prompts on LLMs and sum up energy and carbon; repeat the command to resume an interrupted run.

    Prompts, LLMs and repetitions may be added to a run.

    Exit status 1: some answers are missing, or an LLM has refused every prompt. 130: Ctrl-C.
    """
    given = locals()
    from greenprompt_client.measure.experiment import arguments, load_plan
    from greenprompt_client.measure.run import run_measure

    _require_known_variables()
    fields = {name: value for name, value in given.items() if value is not None and value != []}
    fields.pop("experiment", None)
    plan = load_plan(
        experiment,
        prompting_args=arguments(fields.pop("arg", [])),
        deployment_args=arguments(fields.pop("deployment_arg", [])),
        **fields,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that a scheduler ends releases its LLMs, too
    try:
        complete = run_measure(plan, console)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not complete:
        raise typer.Exit(EXIT_NOT_YET)


@app.command()
def status(url: URLOption = DEFAULT_URL) -> None:
    """Show the machines, wrappers and LLMs of a running registry, and how many requests wait."""
    with _registry(url) as registry:
        health, machines = registry.health(), registry.machines()
    console.print(overview(health, machines, datetime.now(UTC)))


@app.command()
def report(
    measurement: Annotated[int, typer.Argument(min=1, help="The measurementId.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the windows to this file, one row each.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose measurement it is, if not the default tenant's.")] = None,
    url: URLOption = DEFAULT_URL,
) -> None:
    """Show the energy and carbon of a measurement by LLM, how they were determined, and what is unknown."""
    from greenprompt_client.report.files import write_report
    from greenprompt_client.report.table import report_table

    with _registry(url, tenant) as registry:
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
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing of the registry is left on it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Longest wait in seconds; then exit status 1, and the draining goes on.")
    ] = None,
    url: URLOption = DEFAULT_URL,
) -> None:
    """Assign no more LLMs to a machine; once its leases have ended, its wrappers are removed."""
    with _registry(url) as registry:
        state = registry.drain(machine)
        if wait:
            state = _wait_until_drained(registry, machine, timeout)
    say(f"{machine}: {drain_note(state)}")


@app.command()
def undrain(
    machine: Annotated[str, typer.Argument(help="Name of the machine, as 'status' shows it.")],
    url: URLOption = DEFAULT_URL,
) -> None:
    """Use a drained machine again; its wrappers are recreated."""
    with _registry(url) as registry:
        registry.undrain(machine)
    say(f"{machine} is used again")


@app.command()
def release(
    request_id: Annotated[str, typer.Argument(help="Id of the request.")], url: URLOption = DEFAULT_URL
) -> None:
    """Release an LLM, or cancel a waiting request."""
    with _registry(url) as registry:
        registry.release(request_id)


def _registry(url: str, tenant: str | None = None) -> RegistryClient:
    """Return a client for interactive use: if nothing listens at ``url``, it fails within seconds."""
    _require_known_variables()
    return RegistryClient(url, tenant=tenant, connect_for_s=CONNECT_FOR_S)


def _require_known_variables() -> None:
    """Raise BadSettings for an empty or misspelt GREENPROMPT_… variable: the command could use a wrong registry."""
    url = f"{ENV_PREFIX}URL"
    if not os.environ.get(url, url).strip():
        raise BadSettings(url, EMPTY_VARIABLE)
    for name, problem in problems_of(Settings, os.environ):
        raise BadSettings(name, problem)


def _wait_until_drained(registry: RegistryClient, machine: str, timeout_s: float | None) -> MachineState:
    """Wait and show the progress; exit with status 1 on timeout, or if the machine is undrained meanwhile."""
    with console.status(f"{machine} …") as line:
        try:
            state = registry.wait_until_drained(
                machine, timeout_s=timeout_s, on_look=lambda seen: line.update(f"{machine}: {drain_note(seen)}")
            )
        except TimeoutError as error:
            complain(f"{error}; that goes on by itself")
            raise typer.Exit(EXIT_NOT_YET) from None
    if state.drain is None:
        complain(f"{machine} was undrained meanwhile")
        raise typer.Exit(EXIT_NOT_YET)
    return state


def exit_status(error: RegistryError | httpx.TransportError) -> int:
    """Return the exit status for a command that failed with this error."""
    if isinstance(error, httpx.TransportError):
        return EXIT_UNREACHABLE
    if not isinstance(error, AnswerError):
        return EXIT_UNUSABLE
    if error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE) and error.answer_code != UNEXPECTED:
        return EXIT_NOT_FOUND
    unavailable = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.answer_code == UNEXPECTED
    return EXIT_UNREACHABLE if unavailable else EXIT_REFUSED


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
        complain(str(error))
        sys.exit(exit_status(error))
    except httpx.TransportError as error:
        complain(f"no registry answers there ({error})")
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
