"""``greenprompt demo``: a small Prompting Service that starts a registry of its own and uses only HTTP.

Starts ``greenprompt up`` as a separate process with a temporary state folder, requests the LLMs of one measurement,
shows their progress, prompts and releases them, shows energy and carbon, and ends everything it started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deployments.launch.local_ray import free_ports
from greenprompt_client.answers import RequestEnded
from greenprompt_client.cli.status import wrapper_notes
from greenprompt_client.client import RegistryClient
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from greenprompt_client.figures_table import label_words
from greenprompt_client.held_lease import HeldLease
from greenprompt_client.notation import LEGEND, bounded_text, estimate_text, phase_words
from greenprompt_client.signals import ignore_signals, one_signal
from registry.accounting.figures import MachineFigures, figures_of, of_kind
from registry.accounting.window_report import WindowReport
from registry.errors import BadSettings, RegistryError, StartFailed
from registry.settings import LOOPBACK_OF, load_settings, url_host
from registry.wire.lease_token import lease_headers
from registry.wire.schemas import RequestState
from registry.wire.words import WindowKind

MEASUREMENT_ID = 1
WINDOWS_WAIT_S = 30.0
"""Longest wait for the final energy windows, seconds."""

QUESTIONS = (
    "What does a prompt cost the climate?",
    "Name three things that a green data centre does.",
    "Why do figures of different machines not compare?",
)
TINY_LLMS = Path("build/llms")
END_LIMIT_S = 150.0
POLL_S = 0.25

TELL_EVERY_S = 30.0
"""A start that takes longer says every so many seconds what it waits for."""

LOOK_LIMIT_S = 5.0
"""Longest wait for an answer of a registry that is not ready, seconds."""


@dataclass
class Row:
    """The demo's results for one LLM."""

    model: str
    request_id: str = ""
    asked_s: float = field(default_factory=time.monotonic)
    deploying_s: float | None = None
    deployed_s: float | None = None
    state: RequestState | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    prompts_s: float = 0.0
    streamed: int | None = None
    windows: list[WindowReport] = field(default_factory=list)
    note: str = ""

    def heard(self, state: RequestState) -> None:
        """Record a state of the request."""
        now_s = time.monotonic()
        if state.status in ("deploying", "deployed") and self.deploying_s is None:
            self.deploying_s = now_s
        if state.status == "deployed" and self.deployed_s is None:
            self.deployed_s = now_s
        self.state = state


def run_demo(config: Path, models: list[str], console: Console) -> None:
    """Run the whole demo. Raises RegistryError with the reason of a failure, after all started processes have ended."""
    if not models:
        models = [str(path.absolute()) for path in (TINY_LLMS / "a", TINY_LLMS / "b")]
        for number, path in enumerate(models):
            make_tiny_llm(Path(path), seed=number)
    rows = [Row(model) for model in models]
    failed: list[str] = []
    with (
        one_signal(),
        _registry(config, console) as url,
        RegistryClient(url) as registry,
        httpx.Client(timeout=600, trust_env=False) as http,
    ):
        ids = registry.request(MEASUREMENT_ID, [_llmconfig(model) for model in models])
        console.print(f"\nPOST /promptingservice/request → {len(ids)} links, polled until the LLM is ours:")
        for row, request_id in zip(rows, ids, strict=True):
            row.request_id = request_id
            row.asked_s = time.monotonic()
        with Live(_progress(rows), console=console, refresh_per_second=8, transient=False) as live:
            for row in rows:
                try:
                    _use(registry, http, row, rows, live)
                except RequestEnded as error:
                    row.note = str(error)
                    failed.append(str(error))
        with console.status("Waiting for the final energy windows …"):
            _await_windows(registry, rows)
        console.print()  # ends the table's last line where the output is no terminal
        console.print(_results(rows))
        console.print(_legend(rows), style="dim")
    if failed:
        raise StartFailed("; ".join(failed))


def _use(registry: RegistryClient, http: httpx.Client, row: Row, rows: list[Row], live: Live) -> None:
    def show(state: RequestState | None) -> None:
        if state is not None:
            row.heard(state)
        for other in rows:
            if other is not row and other.request_id and other.deployed_s is None and not other.note:
                other.heard(registry.status(other.request_id))
        live.update(_progress(rows))

    try:
        state = registry.wait_until_deployed(row.request_id, on_change=show, poll_s=POLL_S)
        assert state.url is not None  # deployed requests have a URL
        lease = HeldLease(state, state.url, http)
        for question in QUESTIONS:
            row.note = f"prompt {len(row.answers) + 1} of {len(QUESTIONS)}"
            show(None)
            begun_s = time.monotonic()
            row.answers.append(lease.prompt(question))
            row.prompts_s += time.monotonic() - begun_s
        row.note = "streaming /v1/chat/completions"
        show(None)
        row.streamed = _stream(http, lease, row.model)
        row.note = "done"
    finally:
        registry.release(row.request_id)
        row.heard(registry.status(row.request_id))
        live.update(_progress(rows))


def _await_windows(registry: RegistryClient, rows: list[Row]) -> None:
    """Fetch the final windows of all rows; wait for at most WINDOWS_WAIT_S seconds."""
    until_s = time.monotonic() + WINDOWS_WAIT_S
    while True:
        windows = list(registry.windows(MEASUREMENT_ID))
        for row in rows:
            row.windows = [window for window in windows if window.requestId == row.request_id]
        if all(of_kind(row.windows, WindowKind.LEASE) for row in rows if row.answers) or time.monotonic() >= until_s:
            return
        time.sleep(POLL_S)


def _stream(http: httpx.Client, lease: HeldLease, model: str) -> int:
    """Stream one chat completion from vLLM's own API; return the number of chunks."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 24,
        "stream": True,
    }
    pieces = 0
    url = f"{lease.base_url}/v1/chat/completions"
    with http.stream("POST", url, json=body, headers=lease_headers(lease.token)) as response:
        if response.status_code != HTTPStatus.OK:
            response.read()
            raise StartFailed(f"the streamed completion was refused: {response.text[:200]}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                pieces += bool(json.loads(line.removeprefix("data: "))["choices"])
    return pieces


def _llmconfig(model: str) -> dict[str, Any]:
    return {
        "modeltyp": "text-generation",
        "model": model,
        "uses_chat_template": True,
        "args": {
            "prompting": {"max_new_tokens": 48, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
            "deployment": {"torch_dtype": "torch.bfloat16", "device_map": "auto", "enforce_eager": True},
        },
    }


@contextmanager
def _registry(config: Path, console: Console) -> Iterator[str]:
    """Start a separate registry process on free ports, yield its URL, and end it afterwards."""
    settings = load_settings(config)
    if settings.access.keys:
        raise BadSettings("access.keys", "the demo needs a configuration without keys")
    port, dashboard_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="greenprompt-demo-") as folder:
        environment = os.environ | {
            "GREENPROMPT_STATE_DIR": folder,
            "GREENPROMPT_HTTP__PORT": str(port),
            "GREENPROMPT_RAY__DASHBOARD_PORT": str(dashboard_port),
        }
        command = [sys.executable, "-P", "-m", "greenprompt_client.cli.main", "up", "--config", str(config.absolute())]
        host = LOOPBACK_OF.get(settings.http.host, settings.http.host)
        log = Path(folder) / "up.log"
        console.print("$ greenprompt up", style="bold")
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        try:
            limit_s = settings.wrappers.start_timeout_s + 120
            lacks = partial(_lacks, f"http://{url_host(host)}:{port}", log)
            yield _wait_ready(process, log, Path(folder) / "up.json", limit_s, console, lacks=lacks)
        finally:
            ignore_signals()  # the end has a time limit
            with console.status("Shutting everything down …"):
                _end(process)
            console.print("Everything that was started has ended.")


def _wait_ready(
    process: subprocess.Popen[bytes],
    log: Path,
    record: Path,
    limit_s: float,
    console: Console,
    *,
    lacks: Callable[[], str],
) -> str:
    """Return the registry's URL once it is ready; until then, print every TELL_EVERY_S what it ``lacks``."""
    begun_s = told_s = time.monotonic()
    with console.status("Starting Ray, Serve and a wrapper …") as status:
        while time.monotonic() - begun_s < limit_s:
            if process.poll() is not None:
                lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it ended without a message"]
                raise StartFailed(lines[-1].removeprefix("greenprompt: "))
            if record.exists() and "url" in (state := json.loads(record.read_text(encoding="utf-8"))):
                took_s = time.monotonic() - begun_s
                console.print(
                    f"Registry at {state['url']}, Ray dashboard at {state['dashboard']}, after {took_s:.0f} s"
                )
                return str(state["url"])
            status.update(f"Starting Ray, Serve and a wrapper … {time.monotonic() - begun_s:.0f} s")
            if time.monotonic() - told_s >= TELL_EVERY_S:
                told_s = time.monotonic()
                line = f"Waiting for the registry, {told_s - begun_s:.0f} of at most {limit_s:g} s: {lacks()}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            time.sleep(POLL_S)
    raise StartFailed(f"it was not ready within {limit_s:g} s")


def _lacks(url: str, log: Path) -> str:
    """Return why a registry is not ready: its wrappers' states and reasons; before it answers, its last output."""
    try:
        with RegistryClient(url, timeout_s=LOOK_LIMIT_S, connect_for_s=LOOK_LIMIT_S) as registry:
            wrappers = [(machine.machine, each) for machine in registry.machines() for each in machine.wrappers]
    except (RegistryError, httpx.TransportError):
        return (log.read_text(encoding="utf-8").strip().splitlines() or ["it says nothing yet"])[-1]
    states = [f"{name}: {'; '.join([each.status, *wrapper_notes(each)])}" for name, each in wrappers]
    return ", ".join(states) or "no wrapper answers yet"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # all its child processes end with it
        process.wait()
        raise StartFailed(f"it did not shut down within {END_LIMIT_S:g} s and was killed") from None


def _progress(rows: list[Row]) -> Table:
    table = Table("LLM", "status", "place", "phase", "seconds", "", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        state = row.state
        seconds = (row.deployed_s or time.monotonic()) - row.asked_s
        table.add_row(
            _short(row.model),
            state.status if state else "-",
            str(state.position) if state and state.position else "-",
            phase_words(state.phase, state.progress, state.bytesTotal) if state and state.phase else "-",
            f"{seconds:.1f}",
            row.note or (state.reason if state else None) or "",
        )
    return table


def _results(rows: list[Row]) -> Table:
    table = Table(
        title="\nWhat it took, and what it cost",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for name in ("LLM", "machine"):
        table.add_column(name, overflow="fold", min_width=6)
    for name in ("wait s", "start s", "tokens", "tok/s", "J/token", "gCO2eq"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("joules are", no_wrap=True)
    for row in rows:
        tokens = sum(answer["usage"]["completion_tokens"] for answer in row.answers)
        found = _figures(row)
        label = "-" if found is None else label_words(found.joules_per_token.label)
        table.add_row(
            _short(row.model),
            (row.state.machine if row.state else None) or "-",
            _seconds(row.asked_s, row.deploying_s),
            _seconds(row.deploying_s, row.deployed_s),
            str(tokens) if row.answers else "-",
            f"{tokens / row.prompts_s:.1f}" if row.answers else "-",
            "-" if found is None else estimate_text(found.joules_per_token),
            "-" if found is None else estimate_text(found.gco2eq_per_unit),
            label if row.answers else row.note,
        )
    return table


def _legend(rows: list[Row]) -> Text:
    figures = [found for row in rows if (found := _figures(row)) is not None]
    if not figures:
        return Text("No final energy window has arrived." if any(row.answers for row in rows) else "")
    score = figures[-1].gco2eq_per_unit
    unit = score.unit.removeprefix("gCO2eq/")
    lines = [f"gCO2eq per {unit} of all prompts, without start and idle time, from the final energy windows. {LEGEND}."]
    if score.value is not None and score.bound_low is not None:
        lines.append(f"The last LLM's score with its bounds: {bounded_text(score)}.")
    reasons = {found.gco2eq_per_unit.reason for found in figures} - {None}
    lines += [f"Not known, or left out: {reason}." for reason in sorted(map(str, reasons))]
    if flags := sorted({flag for found in figures for flag in found.flags}):
        lines.append("Flags: " + ", ".join(flags))
    return Text("\n".join(lines))


def _figures(row: Row) -> MachineFigures | None:
    """Return the figures of a row's prompts, None before their first final window."""
    return next((found for found in figures_of(row.windows) if found.prompts), None)


def _seconds(start_s: float | None, end_s: float | None) -> str:
    return "-" if start_s is None or end_s is None else f"{end_s - start_s:.1f}"


def _short(model: str) -> str:
    path = Path(model)
    if not path.is_absolute():
        return model
    return f"{path.parent.name}/{path.name}"
