"""A measurement that goes on: for a while it waits for the machine that it was served on, also when others are free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from registry.core.fit import ANY_GPU_TYPE, is_gpu_type, needs_of
from registry.core.indices import is_usable
from registry.core.ledger import Ledger
from registry.core.records import Limits, Measurement, MeasurementKey, NewRequest, RequestStatus


class Pins:
    """Binds measurements that go on to a machine, for ``sticky_s`` after their last LLM was given back.

    What is known of that is in the requests and in ``Measurement.pinned_until_s``, so it survives a restart. A pin does
    not keep anything free: others use the machine meanwhile.
    """

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits

    def begin(self, measurement: Measurement, requests: Sequence[NewRequest], now_s: float) -> Measurement:
        """Return a measurement that goes on with these requests, pinned to the machine that it was served on last.

        Unchanged if that was too long ago, if that machine can't be used now, or if it lacks what is asked for.
        """
        ledger, last = self._ledger, self._ledger.last_served(measurement.key)
        if last is None or last.ended_s is None or last.machine_id is None or ledger.is_draining(last.machine_id):
            return measurement
        until_s = last.ended_s + self._limits.sticky_s
        if now_s >= until_s or not self._all_fit(last.machine_id, measurement, requests):
            return measurement
        return replace(measurement, machine_id=last.machine_id, pinned_until_s=until_s)

    def kept(self, measurement: Measurement, requests: Sequence[NewRequest]) -> Measurement:
        """Return a measurement to which these requests are added: no longer pinned if they don't fit there.

        Only while it waits for the machine of before. Once it was given one, that stays.
        """
        head, pin = self._ledger.head(measurement.key), measurement.machine_id
        waits = head is not None and head.status is RequestStatus.QUEUED and measurement.pinned_until_s is not None
        if not waits or pin is None or self._all_fit(pin, measurement, requests):
            return measurement
        return replace(measurement, machine_id=None, pinned_until_s=None)

    def due(self, now_s: float) -> tuple[MeasurementKey, ...]:
        """Return the measurements whose pin is over. O(their number)."""
        over = takewhile(lambda entry: entry[0] <= now_s, self._ledger.pins)
        return tuple(key for _, key in over)

    def end(self, now_s: float) -> None:
        """End the pins that are over. A measurement that still waits may be served anywhere from now on."""
        ledger = self._ledger
        for key in self.due(now_s):
            measurement, head = ledger.measurements[key], ledger.head(key)
            waits = head is not None and head.status is RequestStatus.QUEUED
            machine_id = None if waits else measurement.machine_id
            ledger.put_measurement(replace(measurement, machine_id=machine_id, pinned_until_s=None))

    def _all_fit(self, machine_id: str, measurement: Measurement, requests: Sequence[NewRequest]) -> bool:
        """True when each LLM can run on a wrapper of a machine, and that has the measurement's type of GPU."""
        ledger, asked = self._ledger, measurement.gpu_type or ANY_GPU_TYPE
        there = [ledger.size(wrapper) for wrapper in ledger.on_machine(machine_id) if is_usable(wrapper)]
        suitable = [size for size in there if is_gpu_type(asked, size.gpu_type)]
        needs = [needs_of(new.spec, new.memory, self._limits) for new in requests]
        return all(any(each.met_by(size) for size in suitable) for each in needs)
