"""A whole registry in virtual time: the real service, store and lease gates, with clients and faults made from a seed.

The faults end at some moment. After that, all requests must end without help. This shows that no accepted request was
lost, and that no client waits for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import structlog

from registry.settings import Settings
from tests.simulation.database import forget_everything
from tests.simulation.machines import Weather
from tests.simulation.shape import KINDS, Shape
from tests.simulation.simulated_world import SimulatedWorld
from tests.support.virtual_time import Stuck, VirtualLoop


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a simulation. ``digest``: hash of all its events, which is the same for two runs of a seed.

    ``faults``: number of faults, without those of ``Weather`` (late messages and failed calls).
    """

    seed: int
    violations: tuple[str, ...]
    story: tuple[str, ...]
    simulated_s: float
    decisions: int
    grants: int
    stayed: int
    requests: int
    faults: int
    took_ns: tuple[int, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the story."""
        return hashlib.sha256("\n".join(self.story).encode()).hexdigest()

    def __str__(self) -> str:
        told = "\n".join(self.story[-60:])
        return f"seed {self.seed}:\n{told}\n" + "\n".join(self.violations)


def small_world(seed: int) -> Shape:
    """Return a world of a few machines. Each seed has its own kinds of faults, so that each kind also occurs alone."""
    random = Random(f"shape of {seed}")
    chance = lambda most: random.choice((0.0, most * random.random()))  # noqa: E731
    settings = settings_of(
        leases={
            "max_s": random.choice((120, 300, 600)),
            "idle_s": random.choice((60, 120)),
            "at_expiry": random.choice(("cut", "finish")),
        },
        wrappers={
            "per_machine": random.choice((1, 1, 2)),
            "start_timeout_s": 60,
            "deploy_timeout_s": random.choice((60, 120)),
            "prompt_max_s": 60,
            "fence_s": random.choice((20, 30, 60)),
        },
        queue={
            "deploy_attempts": random.choice((2, 3)),
            "wrapper_attempts": random.choice((2, 3)),
            "max_overtake_s": random.choice((0, 60)),
        },
    )
    return Shape(
        machines=random.randint(1, 5),
        clients=random.randint(4, 16),
        busy_s=random.choice((200.0, 400.0, 800.0)),
        kinds=tuple(random.sample(KINDS, random.randint(0, 6))),
        pause_s=random.choice((10.0, 30.0, 100.0)),
        weather=Weather(
            late=chance(0.05),
            twice=chance(0.1),
            start_fails=chance(0.3),
            call_fails=chance(0.3),
            held_is_lost=random.random(),
            engine_start_s=random.choice(((0.5, 3.0), (2.0, 30.0), (20.0, 90.0))),
        ),
        settings=settings,
        homes=random.random() < 0.3,
        broken=random.random() < 0.3,
    )


def two_machines(seed: int) -> Shape:
    """Return a world with two equal machines, whose clients request the same LLMs four times, as ``measure`` does."""
    random = Random(f"machines of {seed}")
    kinds = random.sample([kind for kind in KINDS if kind != "machine_joins"], random.choice((0, 0, 1, 2)))
    shape = replace(small_world(seed), machines=2, clients=random.randint(1, 4), repetitions=4, kinds=tuple(kinds))
    sticky = shape.settings.measurements.model_copy(update={"sticky_s": random.choice((60.0, 600.0))})
    return replace(shape, settings=shape.settings.model_copy(update={"measurements": sticky}))


def large_world(machines: int, clients: int, busy_s: float, *, kinds: Sequence[str], pause_s: float) -> Shape:
    """Return a world of many machines and clients, checked every half hour, to measure costs or to test the scale."""
    return Shape(
        machines=machines,
        clients=clients,
        busy_s=busy_s,
        kinds=tuple(kinds),
        pause_s=pause_s,
        weather=Weather(late=0.001, twice=0.001, start_fails=0.02, call_fails=0.01),
        settings=settings_of(
            watch={"period_s": 10, "report_timeout_s": 5, "failures": 2},
            leases={"max_s": 600, "idle_s": 200},
            wrappers={"deploy_timeout_s": 120},
        ),
        check_every_s=1800.0,
    )


def settings_of(**sections: dict[str, Any]) -> Settings:
    """Return settings with few checks of wrappers, so that thousands of hours can be simulated."""
    watch = {"period_s": 5, "report_timeout_s": 5, "failures": 2}
    return Settings.model_validate({"watch": watch, **sections})


def run(shape: Shape, seed: int) -> Verdict:
    """Simulate a world to its end, and return the verdict."""
    forget_everything()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        world = SimulatedWorld(shape, seed, runner.get_loop())
        try:
            with _logs_to(world.on_log):
                runner.run(world.run())
        except Stuck as error:
            world.fail(str(error))
    return Verdict(
        seed=seed,
        violations=tuple(world.violations),
        story=tuple(world.story),
        simulated_s=world.now_s,
        decisions=world.decisions,
        grants=world.grants,
        stayed=world.moves.stayed,
        requests=len(world.accepted),
        faults=world.faults,
        took_ns=tuple(world.took_ns),
    )


@contextmanager
def _logs_to(listener: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Return a context in which logged errors go only to the listener, and other log lines are dropped."""

    def listen(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> Mapping[str, Any]:
        listener(entry)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield
    finally:
        structlog.configure(**before)
