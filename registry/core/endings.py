"""Ends requests, or puts them back into the queue, and frees what they hold."""

from __future__ import annotations

from dataclasses import replace

from registry.core.decision import Limits
from registry.core.ledger import Ledger
from registry.core.records import Request, WrapperStatus
from registry.core.wrapper_commands import deploy, unbind
from registry.wire.words import RequestStatus


class Endings:
    """Ends requests and leases, and frees the wrappers that they held."""

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits

    def end(self, request: Request, status: RequestStatus, how: str, reason: str | None, now_s: float) -> None:
        """End a request in this status; end its lease and free its wrapper. Unpin a measurement that is finished.

        ``how``: how the lease ended; prompts to its address get it in the error. ``reason``: stored with
        the request.
        """
        ledger = self._ledger
        self._let_go(request, how, now_s)
        ledger.put_request(replace(request, status=status, reason=reason, ended_s=now_s))
        if ledger.head(request.measurement_key) is None:
            measurement = ledger.measurements[request.measurement_key]
            ledger.put_measurement(replace(measurement, machine_id=None, pinned_until_s=None))

    def requeue(self, request: Request, reason: str, how: str, now_s: float) -> None:
        """Put a request whose LLM was never handed over back into the queue, at its old place.

        Its measurement stays pinned to the machine that has served it since the measurement began or
        was resumed. If no machine has, only a pin with a time limit (``pinned_until_s``) stays.
        """
        ledger = self._ledger
        self._let_go(request, how, now_s)
        measurement = ledger.measurements[request.measurement_key]
        pin = ledger.pin_without(measurement.key)
        if pin is None and measurement.pinned_until_s is not None:
            pin = measurement.machine_id
        ledger.put_measurement(replace(measurement, machine_id=pin))
        ledger.put_request(
            replace(
                request,
                status=RequestStatus.QUEUED,
                reason=reason,
                wrapper_id=None,
                machine_id=None,
                deploying_s=None,
            )
        )

    # D11: a failed start is the LLM's fault until shown otherwise
    def try_elsewhere(
        self, request: Request, wrapper_id: str, reason: str, now_s: float, *, permanent: bool = False
    ) -> None:
        """Put a request back into the queue after its LLM failed on this wrapper.

        Fail the request instead if the failure is ``permanent``, after ``deploy_attempts`` failures, or
        if no wrapper is left to try.
        """
        request = replace(request, failed_on=(*request.failed_on, wrapper_id))
        self.requeue(request, reason, "failed", now_s)
        request = self._ledger.requests[request.request_id]
        too_often = len(request.failed_on) >= self._limits.deploy_attempts
        if permanent or too_often or self._ledger.is_exhausted(request):
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)

    def lose(self, request: Request, reason: str, now_s: float) -> None:
        """Handle the loss of a request's wrapper or token: fail the request if it was handed over, else requeue it."""
        if request.deployed_s is not None:
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)
        else:
            self.requeue(request, reason, "failed", now_s)

    def fail_exhausted(self, now_s: float) -> None:
        """Fail the queued requests whose LLM has failed on every wrapper that is left."""
        for request_id in sorted(self._ledger.by_request.retried):
            request = self._ledger.requests[request_id]
            if self._ledger.is_exhausted(request):
                self.end(request, RequestStatus.FAILED, "failed", request.reason, now_s)

    def _let_go(self, request: Request, how: str, now_s: float) -> None:
        """End a request's lease and free its wrapper, if it has them. An LLM that is starting continues to start."""
        ledger = self._ledger
        lease = ledger.leases.get(request.request_id)
        if lease is not None:
            ledger.end_lease(lease)
        wrapper = None if request.wrapper_id is None else ledger.wrappers.get(request.wrapper_id)
        if wrapper is None or wrapper.request_id != request.request_id:
            return
        free = replace(wrapper, request_id=None, last_used_s=now_s)
        match wrapper.status:
            case WrapperStatus.LEASED:
                ledger.put_wrapper(replace(unbind(ledger, free, request, how), status=WrapperStatus.READY))
            case WrapperStatus.DEPLOYING if lease is not None:
                # The wrapper keeps the lease while its LLM is restarted. The UnbindLease supersedes the DeployLLM in
                # progress, so a new DeployLLM follows; the wrapper then continues the start that is in progress.
                deploy(ledger, unbind(ledger, free, request, how), request.spec, None)
            case WrapperStatus.DEPLOYING:
                ledger.put_wrapper(free)
            case _:
                ledger.put_wrapper(replace(free, spec=None))  # its process is new or will be replaced
