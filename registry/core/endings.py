"""How a request loses what it holds: it ends, or it goes back to the queue to be tried elsewhere."""

from __future__ import annotations

from dataclasses import replace

from registry.core.ledger import Ledger, deploy, unbind
from registry.core.records import Limits, Request, RequestStatus, WrapperStatus


class Endings:
    """Ends requests and leases, and frees the wrappers that they held."""

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits

    def end(self, request: Request, status: RequestStatus, how: str, reason: str | None, now_s: float) -> None:
        """End a request in this status, and with it its lease, its hold on a wrapper and, if it is the last, the pin.

        ``how`` is what the holder of the lease is told, ``reason`` what everybody else reads.
        """
        ledger = self._ledger
        self._let_go(request, how, now_s)
        ledger.put_request(replace(request, status=status, reason=reason, ended_s=now_s))
        if ledger.head(request.measurement_key) is None:
            measurement = ledger.measurements[request.measurement_key]
            ledger.put_measurement(replace(measurement, machine_id=None, pinned_until_s=None))

    def requeue(self, request: Request, reason: str, how: str, now_s: float) -> None:
        """Let a request that was not handed over wait again, at its old place.

        Its measurement stays bound to the machine on which an earlier request of it was served, if there was one. If
        that was before it went on, only as long as it is pinned for that.
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

    def try_elsewhere(
        self, request: Request, wrapper_id: str, reason: str, now_s: float, *, permanent: bool = False
    ) -> None:
        """Queue a request again whose LLM failed on this wrapper; fail it when it makes no sense to go on."""
        request = replace(request, failed_on=(*request.failed_on, wrapper_id))
        self.requeue(request, reason, "failed", now_s)
        request = self._ledger.requests[request.request_id]
        too_often = len(request.failed_on) >= self._limits.deploy_attempts
        if permanent or too_often or self._ledger.is_exhausted(request):
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)

    def lose(self, request: Request, reason: str, now_s: float) -> None:
        """A request's wrapper is gone: it fails if it had been handed over, else it waits again."""
        if request.deployed_s is not None:
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)
        else:
            self.requeue(request, reason, "failed", now_s)

    def fail_exhausted(self, now_s: float) -> None:
        """Fail the requests that have been tried on every wrapper that is left."""
        for request_id in sorted(self._ledger.by_request.retried):
            request = self._ledger.requests[request_id]
            if self._ledger.is_exhausted(request):
                self.end(request, RequestStatus.FAILED, "failed", request.reason, now_s)

    def _let_go(self, request: Request, how: str, now_s: float) -> None:
        """End a request's lease and free its wrapper, as far as it holds any. An LLM that is starting goes on."""
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
                # The wrapper keeps the lease while its LLM is started again. Telling it makes the deploy that is under
                # way out of date, so it is commanded anew: the wrapper joins the start that is in progress.
                deploy(ledger, unbind(ledger, free, request, how), request.spec, None)
            case WrapperStatus.DEPLOYING:
                ledger.put_wrapper(free)
            case _:
                ledger.put_wrapper(replace(free, spec=None))  # its process is new, or about to be replaced
