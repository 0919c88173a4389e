"""Pins a resumed measurement to its previous machine: it waits for that machine for a limited time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from registry.core.decision import Limits
from registry.core.events import NewRequest
from registry.core.fit import ANY_GPU_TYPE, is_gpu_type, needs_of
from registry.core.indices import is_usable
from registry.core.ledger import Ledger
from registry.core.records import Measurement, MeasurementKey
from registry.wire.words import RequestStatus


# D73: a measurement that continues stays on its machine
class Pins:
    """Pins resumed measurements to their previous machine, until ``sticky_s`` after their last LLM was released.

    The state is stored (in the requests and ``Measurement.pinned_until_s``) and survives a restart. A pin reserves
    nothing: others may use the machine meanwhile.
    """

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits

    def begin(self, measurement: Measurement, requests: Sequence[NewRequest], now_s: float) -> Measurement:
        """Pin a measurement that is resumed with these requests to its previous machine. Return its new record.

        Return it unchanged if it was never served, if ``sticky_s`` is over, or if that machine is
        draining or can't run one of the LLMs.
        """
        ledger, last = self._ledger, self._ledger.last_served(measurement.key)
        if last is None or last.ended_s is None or last.machine_id is None or ledger.is_draining(last.machine_id):
            return measurement
        until_s = last.ended_s + self._limits.sticky_s
        if now_s >= until_s or not self._all_fit(last.machine_id, measurement, requests):
            return measurement
        return replace(measurement, machine_id=last.machine_id, pinned_until_s=until_s)

    def kept(self, measurement: Measurement, requests: Sequence[NewRequest]) -> Measurement:
        """Unpin a running measurement if these new requests don't fit on its machine. Return its new record.

        Return it unchanged unless it was resumed and still waits for its previous machine.
        """
        head, pin = self._ledger.head(measurement.key), measurement.machine_id
        waits = head is not None and head.status is RequestStatus.QUEUED and measurement.pinned_until_s is not None
        if not waits or pin is None or self._all_fit(pin, measurement, requests):
            return measurement
        return replace(measurement, machine_id=None, pinned_until_s=None)

    def due(self, now_s: float) -> tuple[MeasurementKey, ...]:
        """Return the measurements whose pin is over at ``now_s``. O(their number)."""
        over = takewhile(lambda entry: entry[0] <= now_s, self._ledger.pins)
        return tuple(key for _, key in over)

    def end(self, now_s: float) -> None:
        """End the pins that are over. Measurements that still wait may be served on any machine from now on."""
        ledger = self._ledger
        for key in self.due(now_s):
            measurement, head = ledger.measurements[key], ledger.head(key)
            waits = head is not None and head.status is RequestStatus.QUEUED
            machine_id = None if waits else measurement.machine_id
            ledger.put_measurement(replace(measurement, machine_id=machine_id, pinned_until_s=None))

    def _all_fit(self, machine_id: str, measurement: Measurement, requests: Sequence[NewRequest]) -> bool:
        """True when each LLM fits on a usable wrapper of the machine with the measurement's GPU type."""
        ledger, asked = self._ledger, measurement.gpu_type or ANY_GPU_TYPE
        there = [ledger.size(wrapper) for wrapper in ledger.on_machine(machine_id) if is_usable(wrapper)]
        suitable = [size for size in there if is_gpu_type(asked, size.gpu_type)]
        needs = [needs_of(new.spec, new.memory, self._limits) for new in requests]
        return all(any(each.met_by(size) for size in suitable) for each in needs)
