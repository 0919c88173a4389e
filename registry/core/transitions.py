"""The transition tables: which status may follow which, and why; and the functions that check them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from registry.core.records import WrapperStatus as W
from registry.wire.words import RequestStatus as R


class InvariantBroken(AssertionError):
    """The registry's own rules do not hold: a bug, never a client's fault."""


FIRST_REQUEST_STATUS: Final = R.QUEUED
FIRST_WRAPPER_STATUS: Final = W.STARTING

REQUEST_TRANSITIONS: Final[Mapping[R, Mapping[R, str]]] = {
    R.QUEUED: {
        R.DEPLOYING: "granted",
        R.CANCELLED: "LeaseReleased",
        R.FAILED: "no wrapper is left to try",
    },
    R.DEPLOYING: {
        R.DEPLOYED: "LeaseBound",
        R.QUEUED: "LLMDeployFailed, WrapperFailed, MachineLost, MachineDrained: tried again elsewhere",
        R.RELEASED: "LeaseReleased after a hand-over",
        R.CANCELLED: "LeaseReleased before the hand-over",
        R.EXPIRED: "TimePassed, ShutdownBegun",
        R.FAILED: "failed too often, or permanently",
    },
    R.DEPLOYED: {
        R.DEPLOYING: "LLMDied, WrapperFailed: its lease stays",
        R.RELEASED: "LeaseReleased",
        R.EXPIRED: "TimePassed, ShutdownBegun",
        R.FAILED: "LLMDied too often, MachineLost",
    },
    R.RELEASED: {},
    R.EXPIRED: {},
    R.CANCELLED: {},
    R.FAILED: {},
}
"""For each status of a request: the possible next statuses, with their main causes."""

_GONE: Final[Mapping[W, str]] = {
    W.STARTING: "WrapperAdded again",
    W.LOST: "MachineLost",
}
_GONE_OR_OFF: Final[Mapping[W, str]] = {
    **_GONE,
    W.OFF: "WrapperSwitchedOff",
}
_BROKEN: Final[Mapping[W, str]] = {
    W.RESTARTING: "WrapperFailed",
    W.FAILED: "WrapperFailed too often",
}

WRAPPER_TRANSITIONS: Final[Mapping[W, Mapping[W, str]]] = {
    W.STARTING: {
        W.IDLE: "WrapperStarted",
        W.DEPLOYING: "WrapperStarted, and a request waits for it",
        W.LEASED: "WrapperStarted with the LLM that a request waits for",
        W.STOPPING: "WrapperStarted, not known to be empty",
        **_BROKEN,
        **_GONE_OR_OFF,
    },
    W.IDLE: {
        W.DEPLOYING: "granted, preloaded",
        W.STOPPING: "WrapperStarted, not known to be empty",
        **_BROKEN,
        **_GONE_OR_OFF,
    },
    W.DEPLOYING: {
        W.READY: "LLMDeployed, and no request waits for it",
        W.LEASED: "LLMDeployed",
        W.IDLE: "LLMDeployFailed",
        W.STOPPING: "ShutdownBegun, WrapperStarted, not known to be empty",
        **_BROKEN,
        **_GONE_OR_OFF,
    },
    W.READY: {
        W.LEASED: "granted",
        W.DEPLOYING: "evicted",
        W.IDLE: "LLMDied",
        W.STOPPING: "ShutdownBegun, WrapperStarted, not known to be empty",
        **_BROKEN,
        **_GONE_OR_OFF,
    },
    W.LEASED: {
        W.READY: "LeaseReleased, TimePassed",
        W.DEPLOYING: "LLMDied: deployed again for its lease",
        **_BROKEN,
        **_GONE,
    },
    W.STOPPING: {
        W.IDLE: "LLMStopped",
        **_BROKEN,
        **_GONE_OR_OFF,
    },
    W.FAILED: {
        W.IDLE: "WrapperStarted",
        W.STOPPING: "WrapperStarted, not known to be empty",
        **_GONE_OR_OFF,
    },
    W.RESTARTING: {
        W.IDLE: "WrapperStarted",
        W.DEPLOYING: "WrapperStarted, and a request waits for it",
        W.LEASED: "WrapperStarted with the LLM that a request waits for",
        W.STOPPING: "WrapperStarted, not known to be empty",
        W.FAILED: "WrapperFailed too often",
        **_GONE_OR_OFF,
    },
    W.LOST: {
        W.IDLE: "WrapperStarted",
        W.STARTING: "WrapperAdded again",
        W.STOPPING: "WrapperStarted, not known to be empty",
        W.OFF: "WrapperSwitchedOff",
    },
    W.OFF: {
        W.STARTING: "WrapperAdded again, after MachineUndrained",
        W.LOST: "MachineLost",
    },
}
"""For each status of a wrapper: the possible next statuses, with their main causes. In every status it can be
removed."""


def check_request_transition(request_id: str, old: R | None, new: R) -> None:
    """Check that a request may go from ``old`` (None: new) to ``new``. Raises InvariantBroken if not.

    A request may stay in its status unless it has ended.
    """
    allowed = new is FIRST_REQUEST_STATUS if old is None else new in REQUEST_TRANSITIONS[old]
    if not allowed and (old is not new or new.ended):
        raise InvariantBroken(f"request {request_id} can't go from {old} to {new}")


def check_wrapper_transition(wrapper_id: str, old: W | None, new: W) -> None:
    """Check that a wrapper may go from ``old`` (None: new) to ``new``, or stays. Raises InvariantBroken if not."""
    allowed = new is FIRST_WRAPPER_STATUS if old is None else new is old or new in WRAPPER_TRANSITIONS[old]
    if not allowed:
        raise InvariantBroken(f"wrapper {wrapper_id} can't go from {old} to {new}")


def as_markdown() -> str:
    """Return the tables as Markdown, for the states section of ``registry/DESIGN.md``."""
    lines = []
    for kind, table in (("a request", REQUEST_TRANSITIONS), ("a wrapper", WRAPPER_TRANSITIONS)):
        lines += ["", f"| {kind} that is | can become |", "|---|---|"]
        for status, row in table.items():
            moves = (f"`{after}` ({why})" for after, why in row.items())
            lines.append(f"| `{status}` | {' · '.join(moves) or 'nothing else'} |")
    return "\n".join([*lines, "", ""])
