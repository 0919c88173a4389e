"""The commands ``status`` and ``llms``: machines, what is unusual about each of them, and the LLMs that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from greenprompt_client.cli.app import (
    DEFAULT_URL,
    CAFileOption,
    JSONOption,
    URLOption,
    app,
    console,
    interactive_client,
    say_json,
)
from greenprompt_client.notation import phase_words
from registry.wire.schemas import HealthState, MachineState, WrapperState


@app.command()
def status(json: JSONOption = False, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None) -> None:
    """Show the machines, wrappers and LLMs of a running registry, and the number of waiting requests.

    With '--json': an object with the answers of GET /healthz ("health") and GET /machines ("machines").
    """
    with interactive_client(url, ca_file) as registry:
        health, machines = registry.health(), registry.machines()
    if json:
        shown = {"health": health.model_dump(), "machines": [each.model_dump() for each in machines]}
        say_json(shown)
    else:
        console.print(overview(health, machines, datetime.now(UTC)))


@app.command()
def llms(json: JSONOption = False, url: URLOption = DEFAULT_URL, ca_file: CAFileOption = None) -> None:
    """Show the LLMs that run or start. With '--json': one JSON object per line."""
    table = Table("LLM", "task", "status", "machine", "wrapper", "revision", box=box.SIMPLE)
    with interactive_client(url, ca_file) as registry:
        found = registry.llms()
    for each in found:
        if json:
            say_json(each.model_dump())
            continue
        cells = (each.model, each.modeltyp, each.status, each.machine, each.wrapper, each.revision or "-")
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    if not json:
        console.print(table if found else "No LLM runs.")


def overview(health: HealthState, machines: Sequence[MachineState], now: datetime) -> RenderableType:
    """Return a line about the registry, a line about its machines, and a table with a row per wrapper."""
    lines = [Text(f"Registry {health.version} is {health.status}: {queue(health, machines)}")]
    if not machines:
        return Group(*lines, Text("No LLM Machine has joined yet."))
    lines.append(Text(summary(machines)))
    table = Table("machine", "GPUs", "status", "LLM", "note", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[:3]:
        column.no_wrap = True
    for column in table.columns:
        column.overflow = "fold"  # a truncated name can't be copied
    for machine in machines:
        rows: list[WrapperState | None] = [*machine.wrappers] or [None]
        for n, wrapper in enumerate(rows):
            notes = [*(machine_notes(machine, now) if n == 0 else ()), *(wrapper_notes(wrapper) if wrapper else ())]
            table.add_row(
                Text(machine.machine if n == 0 else ""),
                Text(gpus_of(machine, wrapper)),
                Text(wrapper.status if wrapper else "-"),
                Text((wrapper.llm if wrapper else None) or "-"),
                Text("; ".join(notes)),
            )
    return Group(*lines, Text(), table)


def queue(health: HealthState, machines: Sequence[MachineState]) -> str:
    """Return how many LLMs are in use and being deployed (if any), and how many requests wait."""
    leases = sum(machine.leases for machine in machines)
    deploying = f", {health.deploying} being deployed" if health.deploying else ""
    return f"{_count(leases, 'LLM')} in use{deploying}, {_count(health.queued, 'request')} waiting"


def summary(machines: Sequence[MachineState]) -> str:
    """Return the number of machines, by state."""
    states = Counter(map(_state_of, machines))
    return (
        f"{_count(len(machines), 'machine')}: {', '.join(f'{states[each]} {each}' for each in _ORDER if states[each])}"
    )


_ORDER = ("healthy", "starting", "unhealthy", "lost", "draining", "drained")


def _state_of(machine: MachineState) -> str:
    if not machine.alive:
        return "lost"
    return machine.drain or {True: "healthy", False: "unhealthy", None: "starting"}[machine.healthy]


def gpus_of(machine: MachineState, wrapper: WrapperState | None) -> str:
    """Return the number of a wrapper's GPUs and their type: ``8 H100``."""
    gpus = machine.gpus if wrapper is None else wrapper.gpus
    return f"{gpus} {machine.gpuType}" if gpus and machine.gpuType else str(gpus)


def machine_notes(machine: MachineState, now: datetime) -> Iterator[str]:
    """Yield what is unusual about a machine, as text."""
    if not machine.alive:
        yield "it left the cluster"
    elif machine.gpus and not machine.wrappers and machine.drain is None:
        yield "no wrapper yet; none is created if it has fewer GPUs than gpus_per_wrapper"
    if machine.drain is not None:
        yield drain_note(machine)
    if not machine.healthy and machine.drain is None and machine.lastHeardAt is not None:
        yield f"last heard of {_ago(now - datetime.fromisoformat(machine.lastHeardAt))} ago"
    yield from machine.differs


def drain_note(machine: MachineState) -> str:
    """Return the progress of draining a machine."""
    if machine.drain != "draining":
        return machine.drain or "not drained"
    if machine.leases:
        return f"draining: {_count(machine.leases, 'LLM')} still in use"
    return "draining: its wrappers are being removed"


def wrapper_notes(wrapper: WrapperState) -> Iterator[str]:
    """Yield what a wrapper is doing, or what is wrong with it."""
    if wrapper.phase is not None:
        yield phase_words(wrapper.phase, wrapper.progress, wrapper.bytesTotal)
    if wrapper.reason is not None:
        yield wrapper.reason
    if wrapper.warm is False:
        yield f"LLMs start cold: {wrapper.coldReason}" if wrapper.coldReason else "LLMs start cold"


def _ago(duration: timedelta) -> str:
    """Return a duration as text, in seconds, minutes or hours."""
    seconds = max(0, round(duration.total_seconds()))
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
