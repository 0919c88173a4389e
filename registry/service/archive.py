"""Keeps ended requests and measurements in the store, and only unfinished and recently ended ones in memory.

So memory and start-up time depend on the number of unfinished requests, not on the length of the history.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from registry.core.allocator import Allocator
from registry.core.decision import Changes
from registry.core.records import Measurement, MeasurementKey, Request
from registry.errors import RequestForgotten, UnknownMeasurement, UnknownRequest
from registry.store.store import Store

KEPT = 1000
"""Maximum number of finished measurements in memory. They are kept because most queries are about recent ones."""


# D80: what has ended is read from the store
class Archive:
    """Reads requests and measurements from memory or the store, and keeps memory small.

    Every method may read the store, and raises StoreUnavailable if the database does not answer.
    """

    def __init__(self, store: Store, allocator: Allocator, kept: int = KEPT) -> None:
        self._store = store
        self._allocator = allocator
        self._kept = kept
        self._over: OrderedDict[MeasurementKey, None] = OrderedDict()
        """Finished measurements in memory, sorted by their last change, oldest first."""

    # --- reading ----------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        """Return the request with this id. Raises UnknownRequest, or RequestForgotten if it was deleted."""
        request = self.find_request(request_id)
        if request is not None:
            return request
        if self._store.was_forgotten(request_id):
            raise RequestForgotten(request_id)
        raise UnknownRequest(request_id)

    def find_request(self, request_id: str) -> Request | None:
        """Return the request with this id, None if there is none."""
        try:
            return self._allocator.request(request_id)
        except UnknownRequest:
            return next(iter(self._store.requests([request_id])), None)

    def find_requests(self, request_ids: Iterable[str]) -> tuple[Request, ...]:
        """Return the requests with these ids; unknown ids are ignored."""
        return self._store.requests(request_ids)

    def measurement(self, key: MeasurementKey) -> Measurement:
        """Return the measurement with this key. Raises UnknownMeasurement."""
        measurement = self._find_measurement(key)
        if measurement is None:
            raise UnknownMeasurement(key[1])
        return measurement

    def requests_of(self, key: MeasurementKey, *, after_seq: int = 0, limit: int | None = None) -> tuple[Request, ...]:
        """Return the first ``limit`` (None: all) requests of a measurement with ``seq`` > ``after_seq``. O(limit).

        Reads the store, which is as current as memory: every decision is committed before it is answered.
        """
        return self._store.requests_of(key, after_seq=after_seq, limit=limit)

    def _find_measurement(self, key: MeasurementKey) -> Measurement | None:
        try:
            return self._allocator.measurement(key)
        except UnknownMeasurement:
            return self._store.measurement(key)

    # --- memory -----------------------------------------------------------------------------------------

    def recall(self, key: MeasurementKey) -> None:
        """Load a measurement, and its last request that was handed over, into memory, if they exist."""
        if not self._allocator.knows(key) and (measurement := self._store.measurement(key)) is not None:
            last = self._store.last_served(key)
            self._allocator.recall(measurement, () if last is None else (last,))
            self._note([key])

    def recall_request(self, request_id: str | None) -> None:
        """Load the request with this id into memory, where it stays at least until the next event.

        Nothing happens if the id is None or unknown.
        """
        request = None if request_id is None else self.find_request(request_id)
        if request is not None:
            self.recall(request.measurement_key)
            self._allocator.recall(self.measurement(request.measurement_key), (request,))

    def note(self, changes: Changes) -> None:
        """Note the measurements that an event changed. Drop finished ones from memory except the latest ``kept``."""
        self._note(dict.fromkeys(request.measurement_key for request in changes.requests))
        while len(self._over) > self._kept:
            self._allocator.drop_measurement(self._over.popitem(last=False)[0])

    def forgotten(self, request_ids: Iterable[str]) -> None:
        """Drop from memory the requests that the store has deleted, and measurements without any request left."""
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
