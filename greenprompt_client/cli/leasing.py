"""The commands ``request``, ``prompt``, ``events`` and ``release``: an LLM from the request to its release."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from json import dumps
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from greenprompt_client.answers import AnswerError, RequestEnded
from greenprompt_client.cli.app import (
    CHAT_TEMPLATE,
    DEFAULT_URL,
    EXIT_INTERRUPTED,
    EXIT_NOT_YET,
    ArgOption,
    CAFileOption,
    DeploymentArgOption,
    EmissionsOption,
    GPUTypeOption,
    GradeOption,
    JoulesOption,
    JSONOption,
    LikeOption,
    PriorityOption,
    TenantOption,
    URLOption,
    app,
    complain,
    console,
    interactive_client,
    note,
    problems,
    say,
    say_json,
    tenants_client,
)
from greenprompt_client.client import ENDED, RegistryClient
from greenprompt_client.notation import in_range, state_words
from greenprompt_client.signals import ignore_signals, one_signal
from registry.errors import BadSettings, RegistryError
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
        bool,
        typer.Option("--wait", help="Wait for the LLM, print its address with the token, and hold it until Ctrl-C."),
    ] = False,
    arg: ArgOption = None,
    deployment_arg: DeploymentArgOption = None,
    modeltyp: Annotated[str, typer.Option(help="Task of the LLM.")] = "text-generation",
    uses_chat_template: Annotated[bool, CHAT_TEMPLATE] = True,
    measurement_id: Annotated[
        int | None, typer.Option(min=1, help="The measurementId. Default: a new one.", show_default=False)
    ] = None,
    tenant: TenantOption = None,
    priority: PriorityOption = None,
    grade: GradeOption = None,
    gpu_type: GPUTypeOption = None,
    like: LikeOption = None,
    max_joules: JoulesOption = None,
    max_gco2eq: EmissionsOption = None,
    json: JSONOption = False,
    url: URLOption = DEFAULT_URL,
    ca_file: CAFileOption = None,
) -> None:
    """Request an LLM, and print the id of the request.

    With '--wait', the LLM is released when the command ends. Exit status: 0 after Ctrl-C, 130 if the LLM was not there
    yet, 1 if the request or its lease has ended. Needs the key of a tenant, if the registry uses keys.
    """
    from greenprompt_client.measure.experiment import arguments
    from greenprompt_client.measure.run import new_id

    args = {"prompting": arguments(arg or []), "deployment": arguments(deployment_arg or [])}
    llmconfig = {"modeltyp": modeltyp, "model": llm, "uses_chat_template": uses_chat_template, "args": args}
    measurement_id = measurement_id or new_id()
    _require_json({**llmconfig, "max_joules": max_joules, "max_gco2eq": max_gco2eq})
    with tenants_client(url, ca_file, tenant) as registry, one_signal():
        (request_id,) = registry.request(
            measurement_id,
            [llmconfig],
            priority=priority,
            gpu_type=gpu_type,
            grade=grade,
            like=like,
            max_joules=max_joules,
            max_gco2eq=max_gco2eq,
        )
        if wait:
            _hold(registry, request_id, json=json)
        elif json:
            say_json({"measurementId": measurement_id, "requestId": request_id})
        else:
            say(request_id)


def _require_json(given: Mapping[str, Any]) -> None:
    """Raise BadSettings if a request has a number or text that JSON can't have, such as nan."""
    for name, value in given.items():
        try:
            dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise BadSettings(name, f"can't be sent: {error}") from None


def _hold(registry: RegistryClient, request_id: str, *, json: bool) -> None:
    """Wait for an LLM, print its address, and keep its lease until a signal; release it in any case."""
    handed_over = False
    try:
        with _progress() as show:
            state = registry.wait_until_deployed(request_id, on_change=lambda seen: show(_words(seen)))
        lease = registry.held(state)
        handed_over = True
        if json:
            say_json(state.model_dump())
        else:
            say(lease.url)
        note(f"Held on {state.machine} until Ctrl-C; request {request_id}")
        _keep(registry, state)
    except KeyboardInterrupt:
        if not handed_over:
            raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        ignore_signals()  # a release tries for 30 s at most
        try:
            registry.release(request_id)
        except (RegistryError, httpx.HTTPError):
            complain(f"request {request_id} was not released: greenprompt release {request_id}")
            raise


def _keep(registry: RegistryClient, state: RequestState) -> None:
    """Keep a lease alive until it ends, also while its engine is started again. Raises RequestEnded."""
    pause_s = keep_alive_pause_s(state)
    while state.status not in ENDED:
        state = registry.status(state.requestId, wait_s=pause_s, seen=state.status)
        if state.status == "deployed":
            with suppress(AnswerError):  # the wrapper can't be asked now; the status says how it goes on
                registry.keep_alive(state.requestId)
    raise RequestEnded(state.requestId, state.status, state.reason)


def keep_alive_pause_s(state: RequestState) -> float:
    """Return the seconds between two keep-alives of a lease that has just begun."""
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
            note(words)
        last = words

    yield show


def _words(state: RequestState) -> str:
    """Return the status of a request, and what it waits for."""
    return f"{state_words(state)}: {state.reason}" if state.reason else state_words(state)


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

    Its energy appears on standard error; it is provisional until the final energy windows exist. Needs the key of the
    tenant, if the registry uses keys.
    """
    asked = _standard_input() if question is None else question
    _require_json({"question": asked})
    with tenants_client(url, ca_file) as registry:
        lease = registry.held(registry.status(request_id))
        try:
            answer = lease.prompt(asked, timeout_s=timeout)
        except httpx.ReadTimeout:
            complain(f"no answer within {timeout:g} s (--timeout)")
            raise typer.Exit(EXIT_NOT_YET) from None
    if json:
        say_json(answer)
    else:
        say(str(answer["answer"]))
        note(cost_words(answer))


def _standard_input() -> str:
    """Return what standard input contains. Raises BadSettings if it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise BadSettings("QUESTION", "is missing, and standard input is closed")
    if sys.stdin.isatty():
        note("Type the question, then Ctrl-D:")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise BadSettings("QUESTION", f"standard input is not UTF-8: {error}") from None


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
    with interactive_client(url, ca_file) as registry:
        for event in registry.events(request_id):
            if json:
                say_json(event.model_dump())
                continue
            at, cause = event.at[:19].replace("T", " "), "" if event.cause is None else str(event.cause)
            cells = (str(event.event), at, event.what, event.status or "", cause, event.reason or "")
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    if not json:
        console.print(table)


@app.command()
def release(request_id: RequestId, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None) -> None:
    """Release an LLM, or cancel a waiting request."""
    with interactive_client(url, ca_file) as registry:
        registry.release(request_id)
