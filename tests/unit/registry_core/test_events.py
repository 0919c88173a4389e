"""What may not change of the events, whatever becomes of the code: their names."""

from __future__ import annotations

from typing import get_args

from registry.core.events import Event

NAMES = {
    "LeaseRequested",
    "LeaseReleased",
    "LeaseLapsed",
    "LeaseTokenLost",
    "LeaseUsed",
    "LeaseBound",
    "LeaseFlagged",
    "LLMDeployed",
    "LLMDeployFailed",
    "LLMStopped",
    "LLMDied",
    "WrapperAdded",
    "WrapperStarted",
    "WrapperFailed",
    "WrapperRemoved",
    "WrapperSwitchedOff",
    "MachineJoined",
    "MachineLost",
    "MachineDrained",
    "MachineUndrained",
    "TimePassed",
    "ShutdownBegun",
}
"""As they are in the databases of earlier releases, and in what clients have read. Names may be added."""


def test_names_of_events_never_change() -> None:
    """Each event is stored and answered under the name that it has had since it exists."""
    assert {event.__name__ for event in get_args(Event)} == NAMES
