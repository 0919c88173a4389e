"""How a request loses what it holds: it ends, or it goes back to the queue to be tried elsewhere."""

from __future__ import annotations

from dataclasses import replace

from registry.ledger import Ledger
from registry.state import Limits, Request, RequestStatus, UnbindLease, Wrapper, WrapperStatus


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
        self._end_lease(request)
        ledger.put_request(replace(request, status=status, reason=reason, ended_s=now_s))
        wrapper = None if request.wrapper_id is None else ledger.wrappers.get(request.wrapper_id)
        if wrapper is not None and wrapper.request_id == request.request_id:
            self.free(wrapper, how, now_s)
        if ledger.head(request.measurement_id) is None:
            ledger.put_measurement(replace(ledger.measurements[request.measurement_id], machine_id=None))

    def free(self, wrapper: Wrapper, how: str, now_s: float) -> None:
        """Take a wrapper from the request that holds it. An LLM that is being started goes on starting."""
        ledger = self._ledger
        if wrapper.status is WrapperStatus.LEASED:
            assert wrapper.request_id is not None
            epoch = wrapper.epoch + 1
            ledger.emit(UnbindLease(wrapper.wrapper_id, epoch, wrapper.request_id, how))
            ledger.put_wrapper(
                replace(wrapper, status=WrapperStatus.READY, request_id=None, epoch=epoch, last_used_s=now_s)
            )
        elif wrapper.status is WrapperStatus.DEPLOYING:
            ledger.put_wrapper(replace(wrapper, request_id=None))
        else:
            ledger.put_wrapper(replace(wrapper, request_id=None, spec=None))

    def requeue(self, request: Request, reason: str) -> None:
        """Let a request that was not handed over wait again, at its old place; its wrapper is the caller's to free.

        Its measurement stays bound to the machine on which an earlier request of it was served, if there was one.
        """
        ledger = self._ledger
        self._end_lease(request)
        measurement = ledger.measurements[request.measurement_id]
        ledger.put_measurement(replace(measurement, machine_id=ledger.pin_without(measurement.measurement_id)))
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
        self.requeue(request, reason)
        request = self._ledger.requests[request.request_id]
        too_often = len(request.failed_on) >= self._limits.deploy_attempts
        if permanent or too_often or self._ledger.is_exhausted(request):
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)

    def lose(self, request: Request, reason: str, now_s: float) -> None:
        """A request's wrapper is gone: it fails if it had been handed over, else it waits again."""
        if request.deployed_s is not None:
            self.end(request, RequestStatus.FAILED, "failed", reason, now_s)
        else:
            self.requeue(request, reason)

    def fail_exhausted(self, now_s: float) -> None:
        """Fail the requests that have been tried on every wrapper that is left."""
        for request_id in sorted(self._ledger.by_request.retried):
            request = self._ledger.requests[request_id]
            if self._ledger.is_exhausted(request):
                self.end(request, RequestStatus.FAILED, "failed", request.reason, now_s)

    def _end_lease(self, request: Request) -> None:
        lease = self._ledger.leases.get(request.request_id)
        if lease is not None:
            self._ledger.end_lease(lease)
