"""Checks whether measurements stay on their machines, using only what is written to the database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from registry.core.decision import Changes
from registry.core.records import LLMSpec, Measurement, MeasurementKey, Request, Wrapper, WrapperStatus
from registry.wire.words import RequestStatus
from tests.simulation.machines import Node

BROKEN = (WrapperStatus.LOST, WrapperStatus.FAILED, WrapperStatus.OFF)


@dataclass
class Record:
    """A machine. ``usable_since_s``: since when all its wrappers are usable, UTC seconds; None: they are not."""

    draining: bool = False
    removed: bool = False
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    usable_since_s: float | None = None

    def look(self, now_s: float) -> None:
        """Update ``usable_since_s`` after a commit."""
        usable = self.wrappers and not any(wrapper.status in BROKEN for wrapper in self.wrappers.values())
        if self.draining or self.removed or not usable:
            self.usable_since_s = None
        elif self.usable_since_s is None:
            self.usable_since_s = now_s
        self.removed = False


class Moves:
    """Watches commits. ``stayed``: how often a measurement got a lease on the same machine as its previous one."""

    def __init__(self, nodes: Mapping[str, Node], *, sticky_s: float) -> None:
        self._nodes = nodes
        self._sticky_s = sticky_s
        self._machines: dict[str, Record] = {}
        self._served: dict[MeasurementKey, Request] = {}
        self._asked: dict[MeasurementKey, dict[int, LLMSpec]] = {}
        """The LLMs of each measurement, by the sequence number of their requests."""
        self.stayed = 0

    def judge(self, changes: Changes, now_s: float) -> Iterator[str]:
        """Yield the changes of machine that have no valid reason. ``now_s``: time of the commit, UTC seconds."""
        self._note(changes, now_s)
        measurements = {measurement.key: measurement for measurement in changes.measurements}
        for request in changes.requests:
            self._asked.setdefault(request.measurement_key, {})[request.seq] = request.spec
        for request in changes.requests:
            last = self._served.get(request.measurement_key)
            if request.deployed_s is None and request.status is RequestStatus.DEPLOYING and last is not None:
                measurement = measurements.get(request.measurement_key)
                if last.machine_id == request.machine_id:
                    self.stayed += 1
                elif measurement is not None and not self._is_explained(last, request, measurement, now_s):
                    record = self._machines[str(last.machine_id)]
                    yield f"{request.request_id} is on {request.machine_id}; {last.request_id} was on {record}"
            if request.deployed_s is not None and (last is None or last.seq <= request.seq):
                self._served[request.measurement_key] = request

    def _note(self, changes: Changes, now_s: float) -> None:
        for machine in changes.machines:
            self._machines.setdefault(machine.machine_id, Record()).draining = machine.draining
        for wrapper in changes.wrappers:
            self._machines.setdefault(wrapper.machine_id, Record()).wrappers[wrapper.wrapper_id] = wrapper
        for wrapper_id in changes.removed_wrappers:
            for record in self._machines.values():
                record.removed |= record.wrappers.pop(wrapper_id, None) is not None
        for record in self._machines.values():
            record.look(now_s)

    def _is_explained(self, last: Request, request: Request, measurement: Measurement, now_s: float) -> bool:
        """Whether the previous machine was unusable since then, can't run the LLMs, or need not be kept any longer."""
        assert last.machine_id is not None
        assert last.ended_s is not None
        record, node = self._machines[last.machine_id], self._nodes[last.machine_id]
        broken = record.usable_since_s is None or record.usable_since_s >= last.ended_s
        in_one_go = measurement.seq <= last.seq
        late = not in_one_go and now_s >= last.ended_s + self._sticky_s
        since = [spec for seq, spec in self._asked[request.measurement_key].items() if seq > last.seq]
        specs = [request.spec] if in_one_go else since
        unsuitable = measurement.gpu_type not in (None, node.gpu_type) or any(spec.gpus > node.gpus for spec in specs)
        return broken or late or unsuitable
