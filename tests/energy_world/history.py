"""What happened on a machine, as plain records and as a list of events in time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from tests.energy_world.machine import Llm, Machine

Outcome = Literal["ok", "hung_up", "refused", "died"]
Reaping = Literal["at_once", "zombie", "twice", "missing"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: prefill from ``begin_s`` to ``prefill_end_s``, then decode at a steady rate to ``end_s``.

    A refused prompt reaches no engine and takes no energy. One that died ended with its wrapper's process.
    ``name`` is the client's, the same for the same text in every lease.
    """

    id: str
    lease_id: str
    wrapper: str
    llm: str
    begin_s: float
    prefill_end_s: float
    end_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    outcome: Outcome = "ok"
    warm_up: bool = False
    name: str | None = None

    @property
    def ran(self) -> bool:
        """True if an engine worked on it."""
        return self.outcome != "refused"

    def output_tokens_by(self, at_s: float) -> float:
        """Return how many output tokens existed at a time; fractions for the one in the making."""
        if at_s <= self.prefill_end_s or not self.output_tokens:
            return 0.0
        if at_s >= self.end_s:
            return float(self.output_tokens)
        return self.output_tokens * (at_s - self.prefill_end_s) / (self.end_s - self.prefill_end_s)


@dataclass(frozen=True, slots=True)
class Load:
    """A wrapper loads an LLM; ``lease_id`` if that is in the middle of a lease, after a death."""

    id: str
    wrapper: str
    llm: str
    begin_s: float
    end_s: float
    lease_id: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease. ``holes`` are the stretches (begin, end) [s] in which the wrapper had no process."""

    id: str
    wrapper: str
    llm: str
    pattern: str
    concurrency: int | None
    begin_s: float
    end_s: float
    holes: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Life:
    """One process of a wrapper, from its start to its death."""

    wrapper: str
    pid: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine with its LLM, from the begin of the load to its end."""

    wrapper: str
    llm: str
    pid: int
    wrapper_pid: int
    begin_s: float
    loaded_s: float
    end_s: float
    earlier_cpu_s: float
    """CPU time [s] before the history began."""
    reaping: Reaping


@dataclass(frozen=True, slots=True)
class Stranger:
    """CPU load of somebody else, or (with ``gpu``) power [W] on a wrapper's GPU."""

    pid: int
    begin_s: float
    end_s: float
    cpus: float = 0.0
    gpu: int | None = None
    gpu_w: float = 0.0


@dataclass(frozen=True, slots=True)
class ClockStep:
    """The wall clock jumps by ``by_s``."""

    at_s: float
    by_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """The meter's poller gets no CPU time from ``begin_s`` to ``end_s``: poll nothing meanwhile."""

    begin_s: float
    end_s: float


EventKind = Literal[
    "first_token",
    "prompt_ended",
    "lease_ended",
    "wrapper_died",
    "load_ended",
    "clock_stepped",
    "wrapper_started",
    "load_began",
    "lease_began",
    "prompt_began",
]
"""In the order of events at one instant."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; ``what`` is the record that it is about."""

    at_s: float
    kind: EventKind
    what: Prompt | Lease | Life | Load | ClockStep


@dataclass(frozen=True)
class History:
    """All that happened on one machine in ``horizon_s``, seconds since its begin."""

    machine: Machine
    horizon_s: float
    leases: tuple[Lease, ...]
    prompts: tuple[Prompt, ...]
    loads: tuple[Load, ...]
    lives: tuple[Life, ...]
    engines: tuple[Engine, ...]
    strangers: tuple[Stranger, ...]
    clock_steps: tuple[ClockStep, ...]
    pauses: tuple[Pause, ...]
    epoch_s: float
    """UTC [s] of the begin."""

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All events in order. At one instant, what ends comes before what begins.

        A prompt that died with its wrapper has no end of its own: ``wrapper_died`` is it. What ran already when the
        history began has no begin: ``lives`` and ``engines`` hold it.
        """
        found = [Event(s.at_s, "clock_stepped", s) for s in self.clock_steps]
        for lease in self.leases:
            found += [Event(lease.begin_s, "lease_began", lease), Event(lease.end_s, "lease_ended", lease)]
        for load in self.loads:
            found += [Event(load.begin_s, "load_began", load), Event(load.end_s, "load_ended", load)]
        for prompt in self.prompts:
            found.append(Event(prompt.begin_s, "prompt_began", prompt))
            if prompt.ran and prompt.prefill_end_s < prompt.end_s:
                found.append(Event(prompt.prefill_end_s, "first_token", prompt))
            if prompt.outcome != "died":
                found.append(Event(prompt.end_s, "prompt_ended", prompt))
        for life in self.lives:
            if life.begin_s >= 0:
                found.append(Event(life.begin_s, "wrapper_started", life))
            if life.end_s < self.horizon_s:
                found.append(Event(life.end_s, "wrapper_died", life))
        order = get_args(EventKind)
        return tuple(sorted(found, key=lambda e: (e.at_s, order.index(e.kind))))

    def wall_s(self, at_s: float) -> float:
        """Return what the wall clock says (UTC, s), steps included."""
        return self.epoch_s + at_s + sum(step.by_s for step in self.clock_steps if step.at_s <= at_s)

    def prompts_of(self, lease_id: str) -> list[Prompt]:
        """Return the prompts of a lease, refused ones among them."""
        return [p for p in self.prompts if p.lease_id == lease_id]


def llm_of(machine: Machine, name: str) -> Llm:
    """Return an LLM of the machine by name. Raises StopIteration if there is none."""
    return next(llm for llm in machine.llms if llm.name == name)
