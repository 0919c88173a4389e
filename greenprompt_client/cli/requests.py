"""The commands ``request``, ``prompt``, ``events`` and ``release``: an LLM from the request to its release."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from greenprompt_client.answers import RequestEnded
from greenprompt_client.cli.app import (
    DEFAULT_URL,
    EXIT_INTERRUPTED,
    CAFileOption,
    JSONOption,
    URLOption,
    app,
    connect,
    console,
    problems,
    say,
)
from greenprompt_client.client import RegistryClient
from greenprompt_client.notation import in_range, phase_words
from registry.wire.labels import Label
from registry.wire.schemas import RequestState

LONGEST_PAUSE_S = 20.0
"""Longest time between two keep-alives of a lease that a command holds, seconds."""

KEEP_ALIVES = 3
"""Least number of keep-alives in the time after which an unused lease would end."""

RequestId = Annotated[str, typer.Argument(help="Id of the request.")]


@app.command()
def request(
    llm: Annotated[str, typer.Argument(help="LLM (hub id or path).")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the LLM, print its address, and hold it until Ctrl-C.")
    ] = False,
    arg: Annotated[
        list[str] | None, typer.Option(help="Prompting argument, e.g. max_new_tokens=64. Repeatable.")
    ] = None,
    deployment_arg: Annotated[
        list[str] | None, typer.Option(help="Deployment argument, e.g. max_model_len=2048. Repeatable.")
    ] = None,
    modeltyp: Annotated[str, typer.Option(help="Task of the LLM.")] = "text-generation",
    uses_chat_template: Annotated[
        bool,
        typer.Option("--chat-template/--no-chat-template", help="Whether questions are put into the chat template."),
    ] = True,
    measurement_id: Annotated[
        int | None, typer.Option(min=1, help="The measurementId. Default: a new one.", show_default=False)
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Name of your tenant: tenants take turns in the queue.")] = None,
    priority: Annotated[str | None, typer.Option(help="low, normal or high, within the tenant.")] = None,
    grade: Annotated[
        str | None, typer.Option(help="'measurement': the LLM is handed over warm, on a machine at rest.")
    ] = None,
    gpu_type: Annotated[str | None, typer.Option(help="GPUs that the machine must have, e.g. H100.")] = None,
    like: Annotated[
        str | None, typer.Option(help="Id of an earlier request to repeat: same LLM, software and kind of machine.")
    ] = None,
    max_joules: Annotated[float | None, typer.Option(help="Energy that the lease may use, joules.")] = None,
    max_gco2eq: Annotated[float | None, typer.Option(help="Emissions that the lease may cause, grams CO2eq.")] = None,
    json: JSONOption = False,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Request an LLM, and print the id of the request.

    With '--wait', the LLM is released when the command ends. If the lease ends before: exit status 1.
    """
    from greenprompt_client.measure.experiment import arguments

    args = {"prompting": arguments(arg or []), "deployment": arguments(deployment_arg or [])}
    llmconfig = {"modeltyp": modeltyp, "model": llm, "uses_chat_template": uses_chat_template, "args": args}
    conditions = {"priority": priority, "gpu_type": gpu_type, "grade": grade, "like": like}
    budgets = {"max_joules": max_joules, "max_gco2eq": max_gco2eq}
    with connect(url, ca_file, tenant) as registry:
        new_id = measurement_id or time.time_ns()
        (request_id,) = registry.request(new_id, [llmconfig], **conditions, **budgets)  # type: ignore[arg-type]
        if wait:
            _hold(registry, request_id, json=json)
        elif json:
            say(registry.status(request_id).model_dump_json())
        else:
            say(request_id)


def _hold(registry: RegistryClient, request_id: str, *, json: bool) -> None:
    """Wait for an LLM, print its address, and keep it alive until Ctrl-C or SIGTERM; release it in any case."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    handed_over = False
    try:
        with _progress() as show:
            state = registry.wait_until_deployed(request_id, on_change=lambda seen: show(progress_words(seen)))
        handed_over = True
        say(state.model_dump_json() if json else str(state.url))
        problems.print(f"Held on {state.machine} until Ctrl-C; request {request_id}", markup=False, highlight=False)
        _keep(registry, state)
    except KeyboardInterrupt:
        if not handed_over:
            raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        registry.release(request_id)


def _keep(registry: RegistryClient, state: RequestState) -> None:
    """Keep a lease alive until it ends. Raises RequestEnded then."""
    pause_s = _pause_s(state)
    while state.status == "deployed":
        registry.keep_alive(state.requestId)
        state = registry.status(state.requestId, wait_s=pause_s, seen="deployed")
    raise RequestEnded(state.requestId, state.status, state.reason)


def _pause_s(state: RequestState) -> float:
    """Return the seconds between two keep-alives of a lease that has just begun, by the registry's clock."""
    if state.idleAfter is None or state.deployedAt is None:
        return LONGEST_PAUSE_S
    idle = datetime.fromisoformat(state.idleAfter) - datetime.fromisoformat(state.deployedAt)
    return min(idle.total_seconds() / KEEP_ALIVES, LONGEST_PAUSE_S)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that changes; elsewhere, a line on standard error for each change."""
    if problems.is_terminal:
        with problems.status("") as line:
            yield lambda words: line.update(Text(words))
        return
    last = ""

    def show(words: str) -> None:
        nonlocal last
        if words != last:
            problems.print(words, markup=False, highlight=False)
        last = words

    yield show


def progress_words(state: RequestState) -> str:
    """Return the status of a request that waits, with what it waits for: ``queued, place 2: no free wrapper``."""
    words = state.status
    if state.position is not None:
        words += f", place {state.position}"
    if state.phase is not None:
        words += f", {phase_words(state.phase, state.progress, state.bytesTotal)}"
    return f"{words}: {state.reason}" if state.reason else words


@app.command()
def prompt(
    request_id: RequestId,
    question: Annotated[
        str | None, typer.Argument(help="The question. Default: standard input.", show_default=False)
    ] = None,
    json: JSONOption = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Maximum wait for the answer, seconds.")] = 600.0,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Send a question to the LLM of a deployed request, and print the answer.

    Its energy appears on standard error; it is provisional until the final energy windows exist.
    """
    asked = sys.stdin.read() if question is None else question
    with connect(url, ca_file) as registry:
        answer = registry.held(registry.status(request_id)).prompt(asked, timeout_s=timeout)
    if json:
        console.print_json(data=answer)
        return
    say(str(answer["answer"]))
    problems.print(cost_words(answer), markup=False, highlight=False)


def cost_words(answer: dict[str, Any]) -> str:
    """Return what an answer used: ``12 output tokens, ~3.2 (2.8 to 3.6) J, modeled; provisional``."""
    energy, label = answer["energy"], answer["methods"].get("E", Label.UNAVAILABLE)
    joules = in_range(energy.get("total_j"), energy.get("low_j"), energy.get("high_j"), label)
    return f"{answer['usage'].get('completion_tokens')} output tokens, {joules} J, {label}; provisional"


@app.command()
def events(
    request_id: RequestId, json: JSONOption = False, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None
) -> None:
    """Show what has happened to a request, oldest first. With '--json': one JSON object per line."""
    table = Table("event", "time (UTC)", "what", "status", "cause", "reason", box=box.SIMPLE)
    with connect(url, ca_file) as registry:
        for event in registry.events(request_id):
            if json:
                say(event.model_dump_json())
                continue
            at, cause = event.at[:19].replace("T", " "), "" if event.cause is None else str(event.cause)
            cells = (str(event.event), at, event.what, event.status or "", cause, event.reason or "")
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    if not json:
        console.print(table)


@app.command()
def release(request_id: RequestId, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None) -> None:
    """Release an LLM, or cancel a waiting request."""
    with connect(url, ca_file) as registry:
        registry.release(request_id)
