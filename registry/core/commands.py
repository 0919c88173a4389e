"""Commands of the registry to a wrapper, in the imperative, and which event answers each.

Every command can also be answered by WrapperFailed: the wrapper did not answer, or an internal
error occurred. A superseded command has no answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.records import (
    LLMSpec,
)


@dataclass(frozen=True, slots=True)
class DeployLLM:
    """Make the wrapper run this LLM instead of any other. Answer: LLMDeployed, LLMDeployFailed.

    ``request_id``: the request that the start is charged to; None: no request (e.g. a preload).
    """

    wrapper_id: str
    epoch: int
    spec: LLMSpec
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class StopLLM:
    """Stop the wrapper's LLM. Answer: LLMStopped."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BindLease:
    """Accept prompts with the lease's token, and no others. Answer: LeaseBound, or LLMDied if no LLM runs."""

    wrapper_id: str
    epoch: int
    request_id: str


@dataclass(frozen=True, slots=True)
class UnbindLease:
    """Refuse the token from now on and end its prompts in flight. Answer: no event.

    ``how``: how the lease ended; clients that use the token get it in the error.
    """

    wrapper_id: str
    epoch: int
    request_id: str
    how: str


@dataclass(frozen=True, slots=True)
class RestartWrapper:
    """Replace the wrapper's process. Answer: WrapperStarted."""

    wrapper_id: str
    epoch: int


Effect = DeployLLM | StopLLM | BindLease | UnbindLease | RestartWrapper
