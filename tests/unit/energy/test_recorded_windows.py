"""The records of a wrapper are the same, byte for byte, as those of the version that made ``recorded_windows.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from deployments.energy.counters.probe import Unreadable
from registry.contract.messages import StartedFor
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind
from tests.support.meter_bench import LEASE, Bench, Make

RECORDED: Final = Path(__file__).with_name("recorded_windows.json")
GRID: Final = {"gco2eq_per_kwh": 360.0, "low_gco2eq_per_kwh": 300.0, "high_gco2eq_per_kwh": 400.0}
HOLE: Final = Unreadable("gpu:GPU-y", "no counter", in_boundary=True)


async def a_lease_with_everything(made: Bench) -> tuple[EnergyWindow, ...]:
    """Starts, a warm-up, prompts alone and together, refused and of unknown tokens, a start inside, idle time."""
    for woken in (False, True):
        with made.meter.load("org/tiny", StartedFor("request-1", 7)) as start:
            made.passes(5.0)
            start.woken = woken
    made.passes(1.0)
    made.bind(replace(LEASE, max_j=10_000.0))
    made.prompt(1.0, warmup=True)
    made.prompt(2.0)
    first, second = made.meter.prompt(prompt_id="p 1"), made.meter.prompt("/v1/chat/completions")
    made.passes(1.0)
    made.end(second)
    second.flight.answer_id = "chatcmpl-1"
    made.passes(0.5)
    first.refused()
    first.end()
    with made.meter.load("org/tiny"):
        made.passes(2.0)
    made.prompt(1.0, None)
    made.passes(3.0)
    made.bind(None)
    made.passes(1.0)
    return await made.windows()


async def nothing_is_known(made: Bench) -> tuple[EnergyWindow, ...]:
    """A lease on a machine of which a GPU can't be read, without factors for carbon."""
    made.bind(LEASE)
    made.prompt(1.0)
    made.bind(None)
    made.passes(100.0)
    return await made.windows()


async def test_records_are_byte_equal_to_those_of_the_version_before(make: Make) -> None:
    """Every row, with its record as text: clients, databases and later versions read this form."""
    made = make(grid=GRID | {"source": "a test", "date": "2026-01-01"})
    rows = list(await a_lease_with_everything(made))
    assert {row.kind for row in rows} == set(WindowKind)
    rows += await nothing_is_known(make(HOLE, grid=None, embodied=None, functional_unit="word"))
    assert [json.loads(json.dumps(asdict(row))) for row in rows] == recorded()


def recorded() -> list[dict[str, Any]]:
    """The rows of that version."""
    rows: list[dict[str, Any]] = json.loads(RECORDED.read_text())
    return rows
