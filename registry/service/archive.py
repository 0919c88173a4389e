"""What has ended is in the store; memory holds what is unfinished, and what ended last.

So memory and start-up cost what is unfinished, however long the history is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from registry.core.allocator import Allocator
from registry.core.records import Changes, Measurement, MeasurementKey, Request
from registry.errors import RequestForgotten, UnknownMeasurement, UnknownRequest
from registry.store.store import Store

KEPT = 1000
"""Measurements that are over and still in memory: most questions are about those that ended last."""


class Archive:
    """Reads requests and measurements, wherever they are, and keeps memory small. Each method may ask the store.

    Every method raises StoreUnavailable when the database does not answer.
    """

    def __init__(self, store: Store, allocator: Allocator, kept: int = KEPT) -> None:
        self._store = store
        self._allocator = allocator
        self._kept = kept
        self._over: OrderedDict[MeasurementKey, None] = OrderedDict()
        """Measurements in memory of which nothing is unfinished, those that ended first in front."""

    # --- reading ----------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        """The request with this id. Raises UnknownRequest, RequestForgotten."""
        request = self.find_request(request_id)
        if request is not None:
            return request
        if self._store.was_forgotten(request_id):
            raise RequestForgotten(request_id)
        raise UnknownRequest(request_id)

    def find_request(self, request_id: str) -> Request | None:
        """The request with this id, None if there is none."""
        try:
            return self._allocator.request(request_id)
        except UnknownRequest:
            return next(iter(self._store.requests([request_id])), None)

    def find_requests(self, request_ids: Iterable[str]) -> tuple[Request, ...]:
        """The requests with these ids, those that there are."""
        return self._store.requests(request_ids)

    def measurement(self, key: MeasurementKey) -> Measurement:
        """The measurement with this key. Raises UnknownMeasurement."""
        measurement = self._find_measurement(key)
        if measurement is None:
            raise UnknownMeasurement(key[1])
        return measurement

    def requests_of(self, key: MeasurementKey, *, after_seq: int = 0, limit: int | None = None) -> tuple[Request, ...]:
        """The first ``limit`` requests of a measurement with a ``seq`` above ``after_seq``, in order. O(limit).

        Every decision is written down before it is answered, so what the store says is as true as memory.
        """
        return self._store.requests_of(key, after_seq=after_seq, limit=limit)

    def _find_measurement(self, key: MeasurementKey) -> Measurement | None:
        try:
            return self._allocator.measurement(key)
        except UnknownMeasurement:
            return self._store.measurement(key)

    # --- memory -----------------------------------------------------------------------------------------

    def recall(self, key: MeasurementKey) -> None:
        """Have in memory what a decision about a measurement needs to know, if there is such a measurement."""
        if not self._allocator.knows(key) and (measurement := self._store.measurement(key)) is not None:
            last = self._store.last_served(key)
            self._allocator.recall(measurement, () if last is None else (last,))
            self._note([key])

    def recall_request(self, request_id: str | None) -> None:
        """Have an ended request in memory, if there is one with this id, until the next event."""
        request = None if request_id is None else self.find_request(request_id)
        if request is not None:
            self.recall(request.measurement_key)
            self._allocator.recall(self.measurement(request.measurement_key), (request,))

    def note(self, changes: Changes) -> None:
        """An event has changed something: drop from memory what ended earlier than the last KEPT measurements."""
        self._note(dict.fromkeys(request.measurement_key for request in changes.requests))
        while len(self._over) > self._kept:
            self._allocator.drop_measurement(self._over.popitem(last=False)[0])

    def forgotten(self, request_ids: Iterable[str]) -> None:
        """The store has forgotten ended requests. Drop them, and measurements of which it has none any more."""
        for request_id in request_ids:
            request = self._allocator.drop_request(request_id)
            if request is None:
                continue
            key = request.measurement_key
            if key in self._over and self._store.measurement(key) is None:
                del self._over[key]
                self._allocator.drop_measurement(key)

    def _note(self, keys: Iterable[MeasurementKey]) -> None:
        for key in keys:
            self._over.pop(key, None)
            if self._allocator.is_over(key):
                self._over[key] = None
