"""Gives a wrapper a command: changes its record, with a new epoch, and emits the effect."""

from __future__ import annotations

from dataclasses import replace

from registry.core.commands import BindLease, DeployLLM, RestartWrapper, StopLLM, UnbindLease
from registry.core.ledger import Ledger
from registry.core.records import LLMSpec, Request, Wrapper, WrapperStatus

# D1: each command has a newer epoch, which supersedes all older commands


# D6: one command swaps an LLM
def deploy(ledger: Ledger, wrapper: Wrapper, spec: LLMSpec, request_id: str | None) -> None:
    """Command a wrapper to run this LLM, for a request or (None) for no request, e.g. as a preload."""
    wrapper = replace(
        wrapper, status=WrapperStatus.DEPLOYING, spec=spec, request_id=request_id, epoch=wrapper.epoch + 1
    )
    ledger.put_wrapper(wrapper)
    ledger.emit(DeployLLM(wrapper.wrapper_id, wrapper.epoch, spec, request_id))


def bind(ledger: Ledger, wrapper: Wrapper, request_id: str) -> None:
    """Command a wrapper to accept the lease of this request."""
    wrapper = replace(wrapper, status=WrapperStatus.LEASED, request_id=request_id, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(BindLease(wrapper.wrapper_id, wrapper.epoch, request_id))


def unbind(ledger: Ledger, wrapper: Wrapper, request: Request, how: str) -> Wrapper:
    """Command a wrapper to end the lease of this request. Return its new record, which the caller has to store.

    ``how``: how the lease ended, as clients see it.
    """
    wrapper = replace(wrapper, epoch=wrapper.epoch + 1)
    ledger.emit(UnbindLease(wrapper.wrapper_id, wrapper.epoch, request.request_id, how))
    return wrapper


def stop(ledger: Ledger, wrapper: Wrapper) -> None:
    """Command a wrapper to stop its LLM."""
    wrapper = replace(wrapper, status=WrapperStatus.STOPPING, spec=None, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(StopLLM(wrapper.wrapper_id, wrapper.epoch))


def restart(ledger: Ledger, wrapper: Wrapper) -> None:
    """Command the replacement of a wrapper's process."""
    wrapper = replace(wrapper, status=WrapperStatus.RESTARTING, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(RestartWrapper(wrapper.wrapper_id, wrapper.epoch))
