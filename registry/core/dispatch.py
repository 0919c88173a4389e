"""Gives free wrappers to waiting requests. Runs after every event, until no request waits for a free wrapper.

The next request (tenants in turn, then priority, then arrival) gets the first of these:

1. a READY wrapper that runs its LLM: leased at once;
2. an IDLE wrapper: the fewest GPUs that fit, then the least memory, then the least recently used;
3. a wrapper that is already starting its LLM, and that no request waits for: wait for that start;
4. a READY wrapper whose LLM is evicted: the least recently used one whose LLM no queued request wants. If all LLMs are
   wanted, the one whose LLM is wanted latest in the queue. But (4a) a later request that wants exactly this LLM is
   served first, unless it would overtake requests that were overtaken too often or have waited too long;
5. a wrapper that is starting another LLM that no request waits for: start this LLM there instead.

Otherwise it waits, without delaying requests that can be served elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from registry.core.decision import Limits
from registry.core.indices import Pool, is_free
from registry.core.ledger import Ledger
from registry.core.policy import LOOK_AHEAD, Place, Rank, may_be_overtaken, victim
from registry.core.records import Lease, Measurement, MeasurementKey, Request, StoredToken, Wrapper, WrapperStatus
from registry.core.wrapper_commands import bind, deploy
from registry.wire.flags import Flag
from registry.wire.words import RequestStatus


class Dispatcher:
    """Assigns wrappers to requests. ``new_token`` makes what is stored of a new lease's token."""

    def __init__(self, ledger: Ledger, limits: Limits, new_token: Callable[[], StoredToken]) -> None:
        self._ledger = ledger
        self._limits = limits
        self._new_token = new_token

    def run(self, now_s: float) -> None:
        """Grant free wrappers to queued requests until no request waits for a free wrapper."""
        ledger = self._ledger
        while True:
            free = ledger.by_wrapper.free_sizes()
            # Measurements pinned to machines outside ``touched`` still have to wait: nothing has changed there.
            places = [
                place
                for place in (ledger.queue.places(ledger.touched) if free else ())
                if not free.isdisjoint(place.sizes) and self._any_free(place)
            ]
            found = ledger.queue.next(places)
            if found is None:
                break
            self._serve(*found, now_s)
        ledger.touched.clear()

    def lease(self, wrapper: Wrapper, request_id: str, now_s: float) -> None:
        """Create and bind the lease of a request whose LLM runs on this wrapper.

        The lease's deadline is set again at the hand-over, when its time starts.
        """
        token_id, token_sha256 = self._new_token()
        self._ledger.put_lease(
            Lease(
                request_id=request_id,
                wrapper_id=wrapper.wrapper_id,
                token_id=token_id,
                token_sha256=token_sha256,
                granted_s=now_s,
                deadline_s=now_s + self._limits.lease_max_s,
                idle_limit_s=self._limits.lease_idle_s,
                last_active_s=now_s,
            )
        )
        bind(self._ledger, wrapper, request_id)

    # --- the choice -------------------------------------------------------------------------------------

    def _any_free(self, place: Place) -> bool:
        """True when the place has a free wrapper. The caller has checked that a free wrapper has one of its sizes."""
        if place.machine_id is None and not place.not_on:
            return True
        free = self._ledger.by_wrapper
        return any(next(self._among(pool, place), None) for pool in (free.idle, free.ready, free.ownerless))

    def _serve(self, key: MeasurementKey, place: Place, now_s: float) -> None:
        """Give a wrapper to the next request of this measurement, or to one that may overtake it."""
        free = self._ledger.by_wrapper
        head = self._ledger.head(key)
        assert head is not None
        fingerprint = head.spec.fingerprint

        # 1-3: no LLM has to be evicted.
        for pool in (free.ready_with.get(fingerprint), free.idle, free.ownerless_with.get(fingerprint)):
            wrapper = None if pool is None else self._smallest(pool, place)
            if wrapper is not None:
                self._grant(head, wrapper, now_s)
                return

        # 4: evict an unused LLM, unless (4a) a later request wants exactly this one.
        evicted = victim(self._few(free.ready, place), self._wanted)
        if evicted is not None:
            overtaken, winner = self._in_front(evicted, head, now_s)
            for request in overtaken:
                self._ledger.count_overtaken(request)
            self._grant(winner, evicted, now_s)
            return

        # 5: no request waits for the LLM that is being started there.
        preempted = victim(self._few(free.ownerless, place), self._wanted)
        assert preempted is not None  # ``run`` has checked that a wrapper is free for this place
        self._grant(head, preempted, now_s)

    def _in_front(self, wrapper: Wrapper, head: Request, now_s: float) -> tuple[list[Request], Request]:
        """Return the requests that are overtaken, and the request that gets this READY wrapper.

        The turn belongs to ``head``: another request gets the wrapper only if that request may overtake ``head``.
        """
        assert wrapper.spec is not None
        ledger, overtaken = self._ledger, list[Request]()
        size = ledger.size(wrapper)
        places = [place for place in ledger.queue.places([wrapper.machine_id]) if place.allows(wrapper, size)]
        for n, key in enumerate(ledger.queue.line(places)):
            request = ledger.head(key)
            assert request is not None
            if n == 0 and request is not head:
                break  # this turn ignores priorities: it belongs to ``head``, the tenant's oldest request
            if request.spec == wrapper.spec:
                return overtaken, request
            if not may_be_overtaken(request, self._limits, now_s):
                break
            overtaken.append(request)
        return [], head

    def _wanted(self, wrapper: Wrapper) -> Rank | None:
        """Return the best rank among queued requests for a wrapper's LLM, None if there are none."""
        assert wrapper.spec is not None
        queued = self._ledger.by_request.queued_for.get(wrapper.spec.fingerprint)
        return None if queued is None else queued.first[0]

    def _smallest(self, pool: Pool, place: Place) -> Wrapper | None:
        if place.machine_id is None:
            wrapper_id = pool.smallest(place)
            return None if wrapper_id is None else self._ledger.wrappers[wrapper_id]
        return min(self._among(pool, place), key=lambda w: (w.gpus, w.last_used_s, w.wrapper_id), default=None)

    def _few(self, pool: Pool, place: Place) -> Iterator[Wrapper]:
        return islice(self._among(pool, place), LOOK_AHEAD)

    def _among(self, pool: Pool, place: Place) -> Iterator[Wrapper]:
        """Yield the wrappers of a pool that belong to this place, least recently used first."""
        ledger = self._ledger
        if place.machine_id is None:
            return (ledger.wrappers[wrapper_id] for wrapper_id in pool.oldest(place))
        there = (w for w in ledger.on_machine(place.machine_id) if w in pool and ledger.allows(place, w))
        return iter(sorted(there, key=lambda w: (w.last_used_s, w.wrapper_id)))

    # --- the grant --------------------------------------------------------------------------------------

    def _grant(self, request: Request, wrapper: Wrapper, now_s: float) -> None:
        ledger = self._ledger
        assert is_free(wrapper)
        measurement = ledger.measurements[request.measurement_key]
        ledger.queue.charge(measurement.key)
        ledger.put_request(
            replace(
                request,
                status=RequestStatus.DEPLOYING,
                wrapper_id=wrapper.wrapper_id,
                machine_id=wrapper.machine_id,
                deploying_s=now_s,
            )
        )
        stays = measurement.machine_id == wrapper.machine_id
        ledger.put_measurement(
            replace(
                measurement,
                machine_id=wrapper.machine_id,
                flags=self._flags(measurement, wrapper.machine_id),
                pinned_until_s=measurement.pinned_until_s if stays else None,
            )
        )
        wrapper = replace(wrapper, last_used_s=now_s)
        if wrapper.spec != request.spec:
            deploy(ledger, wrapper, request.spec, request.request_id)
        elif wrapper.status is WrapperStatus.READY:
            self.lease(wrapper, request.request_id, now_s)
        else:
            ledger.put_wrapper(replace(wrapper, request_id=request.request_id))

    def _flags(self, measurement: Measurement, machine_id: str) -> tuple[str, ...]:
        """Return the measurement's flags, plus those for a change of machine if it was served on another one before."""
        ledger = self._ledger
        before = ledger.served_on(measurement.key)
        if before is None or before == machine_id:
            return measurement.flags
        alike = ledger.gpu_type(before) == ledger.gpu_type(machine_id)
        flags = with_flag(measurement.flags, Flag.MACHINE_CHANGED if alike else Flag.MACHINE_TYPE_CHANGED)
        return with_flag(flags, Flag.MACHINE_DRAINED) if ledger.is_draining(before) else flags


def with_flag(flags: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return the flags with this one added, unless it is there already."""
    return flags if flag in flags else (*flags, flag)
