"""Commands of the registry to a wrapper, in the imperative, and which event answers each."""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.records import (
    LLMSpec,
)


@dataclass(frozen=True, slots=True)
class DeployLLM:
    """Make the wrapper run this LLM instead of any other. Answer: LLMDeployed, LLMDeployFailed.

    ``request_id``: the request that the start is charged to; None for a preload.
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
    """Accept prompts with the lease's token, and no others. Answer: LeaseBound."""

    wrapper_id: str
    epoch: int
    request_id: str


@dataclass(frozen=True, slots=True)
class UnbindLease:
    """Refuse the token from now on and end its prompts in flight; tell the client ``how`` it ended. No answer."""

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
