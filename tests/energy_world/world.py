"""The entry point: one simulated machine with a clock, its events, its counters and the truth about it.

Example:
    with EnergyWorld(7) as world:
        for event in world.events:
            world.clock.advance_to(event.at_s)
            world.write_tree(tmp_path)
            …  # poll, and tell the meter what happened
        assert abs(published_j - world.expected.lease("lease-0-0").total.total_j) < …
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Self

from tests.energy_world.counters import Fault, gpu_counters, rapl_zones
from tests.energy_world.expected import Expected
from tests.energy_world.history import Event, History
from tests.energy_world.machine import Machine, random_kind, random_machine
from tests.energy_world.nvml import Nvml
from tests.energy_world.random_history import random_history
from tests.energy_world.tree import FileTree
from tests.energy_world.truth import Truth


class Clock:
    """A clock that moves only when it is moved. Call it for the time [s]; it begins at 0."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance_to(self, at_s: float) -> None:
        """Move to a time [s]. Raises ValueError if that has passed."""
        if at_s < self.now_s:
            raise ValueError(at_s)
        self.now_s = at_s

    def advance(self, by_s: float) -> None:
        """Move by some seconds. Raises ValueError for a negative number."""
        self.advance_to(self.now_s + by_s)


class EnergyWorld:
    """A simulated machine: the same for the same arguments."""

    def __init__(
        self,
        seed: int,
        kind: str | None = None,
        *,
        horizon_s: float | None = None,
        wrappers: int | None = None,
        history: Callable[[Random, Machine], History] | None = None,
    ) -> None:
        """Take a seed and, if they are not to be random, a kind, a length [s], a number of wrappers and a history.

        Raises ValueError for an unknown kind.
        """
        rng = Random(f"{seed}:machine")
        drawn_kind, drawn_s = random_kind(rng), rng.uniform(60.0, 300.0)
        self.seed, self.kind = seed, kind or drawn_kind
        length_s = horizon_s or drawn_s
        self.machine: Machine = random_machine(rng, self.kind, length_s, wrappers)
        happens = Random(f"{seed}:history")
        self.history: History = (
            random_history(happens, self.machine, length_s, calm=self.kind == "calm")
            if history is None
            else history(happens, self.machine)
        )
        self.horizon_s = self.history.horizon_s
        self.truth = Truth(self.history)
        self.clock = Clock()
        self.gpu_counters = gpu_counters(Random(f"{seed}:nvml"), self.truth)
        self.zones = rapl_zones(Random(f"{seed}:rapl"), self.truth)
        self.nvml = Nvml(self.truth, self.gpu_counters, self.clock)
        self.tree = FileTree(self.truth, self.zones)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def events(self) -> tuple[Event, ...]:
        """All events in order of time."""
        return self.history.events

    @cached_property
    def expected(self) -> Expected:
        """What a meter should publish."""
        return Expected(self.truth)

    @property
    def wall_s(self) -> float:
        """UTC [s] by the machine's own clock, which may be set in the middle."""
        return self.history.wall_s(self.clock.now_s)

    @cached_property
    def faults(self) -> list[Fault]:
        """What is wrong with the counters, and when."""
        found = [fault for counter in self.gpu_counters for fault in counter.faults]
        for zone in self.zones:
            found += [Fault("reset", zone.directory, at_s, at_s) for at_s in zone.counter.resets_s]
            if zone.unreadable[0] < self.horizon_s:
                found.append(Fault("unreadable", zone.directory, *zone.unreadable))
        return found

    def write_tree(self, root: Path) -> None:
        """Bring the kernel's files under an empty directory to the state of this moment."""
        self.tree.write(root, self.clock.now_s)

    def read(self, path: str) -> str:
        """Return one of the kernel's files at this moment, without writing. Raises OSError like the kernel."""
        return self.tree.read(path, self.clock.now_s)

    def is_paused(self) -> bool:
        """Return True while the meter's poller gets no CPU time."""
        return any(pause.begin_s <= self.clock.now_s < pause.end_s for pause in self.history.pauses)

    def close(self) -> None:
        """Close the files of ``write_tree``. Idempotent."""
        self.tree.close()
