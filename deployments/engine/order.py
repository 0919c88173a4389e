"""What an engine host is asked for, and what it reports: the LLM to start, and the result of stopping one."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from deployments.models.weights import Weights

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


@dataclass(frozen=True, slots=True)
class StopOutcome:
    """The result of stopping an engine.

    ``killed``: pids that had to be killed. ``leftover``: pids that still live after the kill, so their memory is not
    free. ``gpu_excess_bytes``: by GPU UUID, the bytes in use beyond those in use before the first start; GPUs whose use
    is unknown are missing. ``took_s``: seconds.
    """

    killed: tuple[int, ...] = ()
    leftover: tuple[int, ...] = ()
    gpu_excess_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    took_s: float = 0.0

    @property
    def problem(self) -> str | None:
        """What was not cleaned up, as text; None if everything was."""
        problems = [f"{uuid} holds {excess / 2**20:.0f} MiB too much" for uuid, excess in self.gpu_excess_bytes.items()]
        if self.leftover:
            problems.insert(0, f"engine processes {', '.join(map(str, self.leftover))} can't be ended")
        return "; ".join(problems) or None


@dataclass(slots=True)
class Order:
    """The LLM to start, and the progress of the start; shared by the event loop and the engine thread.

    ``model``: directory or Hugging Face id. ``name``: the name that clients use. ``given_up``: the
    start was aborted. Two orders are equal if they name the same LLM with the same arguments and
    weights.
    """

    model: str
    name: str
    revision: str | None
    engine_args: Mapping[str, Any]
    modeltyp: str
    weights: Weights | None = None
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the arguments that vLLM finally received
    accepted: bool = field(default=False, compare=False)  # vLLM has validated the arguments
    given_up: bool = field(default=False, compare=False)


def pids(processes: Iterable[psutil.Process]) -> tuple[int, ...]:
    """Return the process ids, ascending."""
    return tuple(sorted(process.pid for process in processes))
