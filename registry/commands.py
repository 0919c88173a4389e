"""The commands to wrappers: each is one effect with a new epoch, and the wrapper's record as it is from then on."""

from __future__ import annotations

from dataclasses import replace

from registry.ledger import Ledger
from registry.state import (
    BindLease,
    DeployLLM,
    LLMSpec,
    Request,
    RestartWrapper,
    StopLLM,
    UnbindLease,
    Wrapper,
    WrapperStatus,
)


def deploy(ledger: Ledger, wrapper: Wrapper, spec: LLMSpec, request_id: str | None) -> None:
    """Have a wrapper run this LLM, for a request or (None) for whoever comes."""
    wrapper = replace(
        wrapper, status=WrapperStatus.DEPLOYING, spec=spec, request_id=request_id, epoch=wrapper.epoch + 1
    )
    ledger.put_wrapper(wrapper)
    ledger.emit(DeployLLM(wrapper.wrapper_id, wrapper.epoch, spec))


def bind(ledger: Ledger, wrapper: Wrapper, request_id: str) -> None:
    """Have a wrapper accept the lease of this request."""
    wrapper = replace(wrapper, status=WrapperStatus.LEASED, request_id=request_id, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(BindLease(wrapper.wrapper_id, wrapper.epoch, request_id))


def unbind(ledger: Ledger, wrapper: Wrapper, request: Request, how: str) -> Wrapper:
    """Have a wrapper end the lease of this request, and say ``how``; what it does next is the caller's to write."""
    wrapper = replace(wrapper, epoch=wrapper.epoch + 1)
    ledger.emit(UnbindLease(wrapper.wrapper_id, wrapper.epoch, request.request_id, how))
    return wrapper


def stop(ledger: Ledger, wrapper: Wrapper) -> None:
    """Have a wrapper emptied."""
    wrapper = replace(wrapper, status=WrapperStatus.STOPPING, spec=None, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(StopLLM(wrapper.wrapper_id, wrapper.epoch))


def restart(ledger: Ledger, wrapper: Wrapper) -> None:
    """Have a wrapper's process replaced."""
    wrapper = replace(wrapper, status=WrapperStatus.RESTARTING, epoch=wrapper.epoch + 1)
    ledger.put_wrapper(wrapper)
    ledger.emit(RestartWrapper(wrapper.wrapper_id, wrapper.epoch))
