"""Starts of LLMs: those that fail or are given up, LLMs that sleep, and weights that are read ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from deployments.engine.order import StopOutcome
from deployments.models.weights import weights_of
from deployments.wrapper import swap
from deployments.wrapper.llm_wrapper import LLMWrapper
from registry.contract.messages import Belief
from registry.core.records import LLMSpec
from registry.errors import InvalidField, StaleEpoch
from tests.support.fake_cluster import UNTOLD
from tests.support.llm_wrapper import OTHER_SPEC, SECOND, SPEC, FakeHost, Make, RunningFake


async def test_metric_tells_whether_llms_start_warm(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is true while LLMs start warm, false from the first report that says otherwise, and after the end."""
    shown: list[bool] = []

    async def close(_host: object) -> None:
        pass

    monkeypatch.setattr(FakeHost, "close", close, raising=False)
    client = await make(finish=False, show_warm=shown.append)
    assert shown == [True]
    await client.wrapper.report(UNTOLD)
    assert shown[-1:] == [True]
    monkeypatch.setattr(FakeHost, "warm", False)
    await client.wrapper.report(UNTOLD)
    assert shown[-1:] == [False]
    monkeypatch.setattr(FakeHost, "warm", True)
    await client.wrapper.report(UNTOLD)
    await LLMWrapper.__del__(client.wrapper)
    assert shown[-2:] == [True, False]


# --- starts, and those that fail or are given up ----------------------------------------------------------


async def test_a_start_tells_its_phases(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says how long each phase of a start took."""
    client = await make(finish=False)

    async def start(model: str, **_: object) -> None:
        host: Any = client.wrapper._host
        host.running = RunningFake()
        host.running.phases = {"configuring": 0.5, "loading": 1.234}

    monkeypatch.setattr(client.wrapper._host, "start", start)
    with structlog.testing.capture_logs() as logs:
        await client.wrapper.deploy(3, OTHER_SPEC, None)
    (ready,) = [line for line in logs if line["event"] == "the LLM is ready"]
    assert (ready["log_level"], ready["model"]) == ("info", OTHER_SPEC.model)
    assert ready["took_s"] == {"configuring": 0.5, "loading": 1.23}


async def test_a_model_that_leads_elsewhere(make: Make, tmp_path: Path) -> None:
    """A link out of the allowed folder fails the start with that reason; the LLM before never passes for that one."""
    for name in ("models", "models/good", "elsewhere"):
        (tmp_path / name).mkdir()
    link = tmp_path / "models" / "llm"
    link.symlink_to(tmp_path / "elsewhere")
    client = await make(finish=False, local_roots=(tmp_path / "models",))
    spec = LLMSpec(str(link), "text-generation")
    for epoch in (3, 4):
        with pytest.raises(InvalidField, match="neither a Hugging Face id nor below"):
            await client.wrapper.deploy(epoch, spec, None)
        assert client.wrapper._host.running is None
    link.unlink()
    link.symlink_to(tmp_path / "models" / "good")
    await client.wrapper.deploy(5, spec, None)
    assert (await client.wrapper.report(UNTOLD)).running == spec.fingerprint


async def test_a_start_that_fails_before_its_predecessor_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, the LLM that still runs answers nobody, and the next deployment starts the right one."""
    client = await make(finish=False)
    before = client.engine

    async def fails(*, wanted_next: str) -> StopOutcome:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(client.wrapper._host, "vacate", fails)
        with pytest.raises(OSError, match="disk"):
            await client.wrapper.deploy(3, OTHER_SPEC, SECOND)
    assert client.engine is before
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.starting, report.bound) == (None, None, "request-2")
    await client.wrapper.report(Belief(3, "request-2", client.wrapper._gate.moment))
    assert (await client.prompt("token-2")).json()["code"] == "engine_not_ready"
    await client.wrapper.deploy(4, OTHER_SPEC, SECOND)
    assert client.engine is not before
    assert (await client.prompt("token-2")).status_code == 200


async def test_a_start_is_given_up_for_a_command_that_goes_away(make: Make) -> None:
    """The registry may lose a command after that has cancelled a start: the LLM before does not pass for either."""
    client = await make(finish=True)
    before = client.engine
    prompt, first = await client.replace_while_it_answers()
    assert (await client.wrapper.report(UNTOLD)).running is None
    third = asyncio.create_task(client.wrapper.deploy(5, LLMSpec("org/third", "text-generation"), None))
    await asyncio.sleep(0)
    assert not client.wrapper._commands.is_starting
    third.cancel()
    with pytest.raises(StaleEpoch):
        await first
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await client.wrapper.deploy(6, OTHER_SPEC, None)
    assert client.engine is not before


async def test_a_start_that_ends_late_leaves_the_next_one_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that was given up may take a while to end; by then another LLM is meant, and that one counts."""
    client = await make(finish=False)
    starting, over = asyncio.Event(), asyncio.Event()

    async def slow(model: str, **_: object) -> None:
        starting.set()
        try:
            await asyncio.Event().wait()
        finally:
            await over.wait()

    with monkeypatch.context() as patch:
        patch.setattr(client.wrapper._host, "start", slow)
        first = asyncio.create_task(client.wrapper.deploy(3, OTHER_SPEC, None))
        await starting.wait()
    second = asyncio.create_task(client.wrapper.deploy(4, LLMSpec("org/third", "text-generation"), None))
    await asyncio.sleep(0)
    assert not client.wrapper._commands.is_starting
    second.cancel()
    third = asyncio.create_task(client.wrapper.deploy(5, SPEC, None))
    while (await client.wrapper.report(UNTOLD)).starting is None:
        await asyncio.wait({third}, timeout=0)
    over.set()
    await third
    with pytest.raises(StaleEpoch):
        await first
    assert (await client.wrapper.report(UNTOLD)).running == SPEC.fingerprint


# --- LLMs that sleep, and weights that are read ahead --------------------------------------------------------


async def test_llms_sleep_when_they_are_swapped(make: Make) -> None:
    """An LLM that another one replaces may sleep on; at a stop everything ends."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    assert host.vacated_for == [SPEC.model, OTHER_SPEC.model]
    host.asleep.append(SPEC.model)
    await client.wrapper.stop(4)
    assert (host.asleep, host.running) == ([], None)


@pytest.mark.parametrize("asleep", [False, True])
async def test_weights_are_read_ahead(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep: bool
) -> None:
    """From when the LLM before is stopped until the new one runs, its weights are read ahead, unless it sleeps."""
    read: list[object] = []
    reading = False

    @contextmanager
    def read_ahead(weights: object) -> Iterator[None]:
        nonlocal reading
        read.append(weights)
        reading = True
        yield
        reading = False

    model = tmp_path / "models" / "local"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"12345")
    client = await make(finish=False, local_roots=(tmp_path / "models",))
    host: Any = client.wrapper._host
    monkeypatch.setattr(swap, "read_ahead", read_ahead)
    during: list[bool] = []
    vacate = host.vacate

    async def vacate_seen(*, wanted_next: str) -> StopOutcome:
        during.append(reading)
        return await vacate(wanted_next=wanted_next)  # type: ignore[no-any-return]

    monkeypatch.setattr(host, "vacate", vacate_seen)
    spec = LLMSpec(str(model), "text-generation")
    if asleep:
        host.asleep.append(spec.model)
    await client.wrapper.deploy(3, spec, None)
    assert read == [None if asleep else weights_of(str(model))]
    assert (during, reading) == ([True], False)
