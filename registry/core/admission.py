"""Admission: refuses requests that the queue has no room for, and LLMs that no machine can run. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from registry.core.decision import Limits
from registry.core.events import NewRequest
from registry.core.fit import ANY_GPU_TYPE, Size, is_gpu_type, needs_of, why_too_large
from registry.core.indices import is_usable
from registry.core.ledger import Ledger
from registry.core.records import Measurement, Request, WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, QueueFull

_DEPARTURES = 32
"""How many of the latest departures from the queue are used to estimate the waiting time."""


class Admission:
    """Checks new requests against the queue's limits and the sizes of the wrappers; changes nothing in the ledger."""

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits
        self._departures_s: deque[float] = deque(maxlen=_DEPARTURES)

    def note_departures(self, count: int, now_s: float) -> None:
        """Record that ``count`` requests have left the queue, for the estimate in QueueFull."""
        self._departures_s.extend([now_s] * count)

    def check_room(self, tenant: str, count: int, now_s: float) -> None:
        """Refuse ``count`` requests that exceed the queue's limits. Raises InvalidField or QueueFull."""
        limits, queued = self._limits, self._ledger.by_request.queued
        most = min(limits.max_queued, limits.max_queued_per_tenant)
        if count > most:
            raise InvalidField(
                "llms", f"{count} LLMs are more than the limit of the queue ({most}); send several requests"
            )
        if self._ledger.by_request.queued_count + count > limits.max_queued:
            raise QueueFull("this registry", limits.max_queued, self._next_departure_s(now_s))
        if len(queued.get(tenant, ())) + count > limits.max_queued_per_tenant:
            # Tenants take turns, so the next departure is seldom this tenant's.
            own_s = self._next_departure_s(now_s)
            raise QueueFull(
                f"tenant {tenant!r}", limits.max_queued_per_tenant, None if own_s is None else own_s * len(queued)
            )

    def _next_departure_s(self, now_s: float) -> float | None:
        """Estimate the seconds until the next request leaves the queue; None before two have left."""
        left_s = self._departures_s
        if len(left_s) < 2:
            return None
        return (max(now_s, left_s[-1]) - left_s[0]) / (len(left_s) - 1)

    def check_fits(self, requests: Sequence[NewRequest], measurement: Measurement) -> None:
        """Refuse an LLM that no known wrapper can run. While no wrapper is known, every LLM is accepted.

        Raises LLMNeverFits, or InvalidField for an unknown GPU type.
        """
        ledger, limits, named = self._ledger, self._limits, measurement.measurement_id
        sizes = self._sizes_for(measurement)
        if ledger.by_wrapper.present and not sizes:
            raise InvalidField("gpuType", self._no_such_type(measurement))
        pin = measurement.machine_id
        on_pin = []
        if pin is not None and not ledger.is_draining(pin):
            on_pin = [ledger.size(w) for w in ledger.on_machine(pin) if is_usable(w)]
        together = ledger.needs_together(measurement.key)
        for n, new in enumerate(requests):
            field, model = f"llms[{n}].model", new.spec.model
            needs = needs_of(new.spec, new.memory, limits)
            together = together.joined_with(needs)
            if sizes and not any(needs.met_by(size) for size in sizes):
                raise LLMNeverFits(field, model, why_too_large(new.spec, new.memory, sizes, limits))
            if on_pin and not any(needs.met_by(size) for size in on_pin):
                why = why_too_large(new.spec, new.memory, on_pin, limits)
                bound = f"measurement {named} is bound to machine {pin}; use another measurementId"
                raise LLMNeverFits(field, model, f"{why}; {bound}")
            if sizes and not on_pin and not any(together.met_by(size) for size in sizes):
                raise LLMNeverFits(field, model, f"{_not_together(named)}; use another measurementId")

    def misfit(self, request: Request) -> str | None:
        """Return why no known wrapper can serve a queued request; None if one can, or if no wrapper is known."""
        measurement = self._ledger.measurements[request.measurement_key]
        sizes, needs = self._sizes_for(measurement), self._ledger.needs(request)
        if not sizes:
            return self._no_such_type(measurement) if self._ledger.by_wrapper.present else None
        if not any(needs.met_by(size) for size in sizes):
            return why_too_large(request.spec, request.memory, sizes, self._limits)
        together = self._ledger.needs_together(measurement.key)
        if measurement.machine_id is None and not any(together.met_by(size) for size in sizes):
            return _not_together(measurement.measurement_id)
        return None

    def fits_only_drained(self, request: Request) -> tuple[str, ...]:
        """Return the drained machines that a queued request fits on; () if it also fits on others, or on none."""
        ledger, key = self._ledger, request.measurement_key
        needs = ledger.needs_together(key)
        suitable = {size for size in self._sizes_for(ledger.measurements[key]) if needs.met_by(size)}
        if not all(size.draining for size in suitable):
            return ()
        there = (w for w in ledger.wrappers.values() if w.status is not WrapperStatus.LOST)
        return tuple(sorted({w.machine_id for w in there if ledger.size(w) in suitable}))

    def _sizes_for(self, measurement: Measurement) -> list[Size]:
        """Return the sizes of the wrappers with a measurement's GPU type, except LOST ones."""
        asked = measurement.gpu_type or ANY_GPU_TYPE
        return [size for size in self._ledger.by_wrapper.present if is_gpu_type(asked, size.gpu_type)]

    def _no_such_type(self, measurement: Measurement) -> str:
        types = sorted({size.gpu_type for size in self._ledger.by_wrapper.present if size.gpu_type is not None})
        there = f"there are {', '.join(types)}" if types else "none has a GPU whose type is known"
        return f"no machine here has {measurement.gpu_type!r}; {there}"


def _not_together(measurement_id: int) -> str:
    return f"no machine can run both this LLM and the others of measurement {measurement_id}"
