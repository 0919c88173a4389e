"""What a simulated world is made of: its size, its LLMs, its weather and the kinds of its faults."""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.records import LLMSpec
from registry.settings import Settings
from tests.simulation.machines import Weather

CHECK_EVERY_S = 60.0
"""Time between two checks of the whole state, seconds. What a single decision can break is checked at each commit."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters of a world. Faults of these ``kinds`` happen until ``busy_s``, every ``pause_s`` on average.

    ``repetitions``: how often each client requests the same LLMs, one repetition after another, in a measurement of its
    own. All machines are alike then. 0: each client makes one request, and some clients share a measurement.
    """

    machines: int
    clients: int
    busy_s: float
    kinds: tuple[str, ...]
    pause_s: float
    weather: Weather
    settings: Settings
    homes: bool = False
    broken: bool = False
    check_every_s: float = CHECK_EVERY_S
    repetitions: int = 0


SPECS = tuple(LLMSpec(f"org/llm-{n}", "text-generation", gpus=gpus) for n, gpus in enumerate((0, 0, 0, 1, 2)))
BROKEN = "org/broken"

OF_REGISTRY = ("registry_dies", "registry_dies_deciding", "registry_dies_calling", "database_fails", "shut_down")
OF_MACHINES = (
    "machine_off",
    "machine_cut",
    "machine_joins",
    "process_dies",
    "process_hangs",
    "engine_dies",
    "controller_away",
    "drained",
)
KINDS = (*OF_MACHINES, *OF_REGISTRY)
"""The kinds of faults."""
