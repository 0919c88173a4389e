"""Decides whether a token may prompt: only that of the bound lease, until the lease ends. No I/O.

The wrapper checks every prompt here, so a lease ends even if the registry is down. After ``fence_s``
seconds without a message from the registry, the registry may have ended the lease. The gate then
refuses new prompts until the next message (the fence).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable

from registry.contract.messages import LeaseGrant, Moment
from registry.errors import EngineNotReady, LeaseEnded, NoSuchLease, RegistryUnheard

REMEMBERED_TOKENS = 1000
"""Number of ended leases for which the gate remembers how they ended."""


class LeaseGate:
    """The lease that is bound to a wrapper.

    ``clock`` returns monotonic seconds; they are comparable only within this process, whose id is
    ``process``.

    New prompts are accepted for ``fence_s`` seconds after the last time at which the registry is known to have
    confirmed the lease. ``commanded`` is False until the registry's first command; before it, an
    unknown token may be valid.
    ``on_change`` is called at each bind and each end, with the new lease or None and the time.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        fence_s: float,
        process: str,
        on_change: Callable[[LeaseGrant | None, float], None] | None = None,
    ) -> None:
        self.commanded = False
        self._clock = clock
        self._fence_s = fence_s
        self._process = process
        self._on_change = on_change
        self._believed_in: str | None = None
        self._believed_at_s = 0.0
        self._grant: LeaseGrant | None = None
        self._deadline_s = 0.0
        self._last_used_s = 0.0
        self._in_flight = 0
        self._ended: OrderedDict[bytes, str] = OrderedDict()
        """How leases ended, by the hash of their token: a token that is nearly right takes no longer to look up."""

    @property
    def moment(self) -> Moment:
        """The time now."""
        return Moment(self._process, self._clock())

    @property
    def grant(self) -> LeaseGrant | None:
        """The bound lease; None if it has ended."""
        self._end_if_over()
        return self._grant

    @property
    def idle_for_s(self) -> float | None:
        """Seconds since the lease was last used, 0.0 while a prompt is in flight, None without a lease."""
        if self.grant is None:
            return None
        return 0.0 if self._in_flight else self._clock() - self._last_used_s

    def left_s(self, grant: LeaseGrant) -> float:
        """Seconds until the deadline of this lease; 0.0 once it has ended."""
        held = self.grant is not None and self.grant.token == grant.token
        return max(0.0, self._deadline_s - self._clock()) if held else 0.0

    @property
    def in_flight(self) -> int:
        """The number of prompts being answered."""
        return self._in_flight

    def bind(self, grant: LeaseGrant) -> None:
        """Accept this lease's token and no other. If it is bound already, its times are renewed."""
        current = self.grant  # reading it ends an expired lease as expired, before this bind could end it as released
        if current is not None and current.token != grant.token:
            self._end("released")
        self.commanded = True
        self._ended.pop(_sha256(grant.token.encode()), None)
        self._grant = grant
        self._deadline_s = self._clock() + grant.ends_in_s
        self._last_used_s = self._clock()
        self.believe(grant.request_id, grant.as_of)
        self._tell(grant, self._clock())

    def believe(self, request_id: str | None, as_of: Moment | None) -> None:
        """Note that the registry, at ``as_of`` or later, believed this request (None: no request) to have the lease.

        ``as_of`` counts and not the current time, because the message may have been delayed. A
        timestamp of another process is ignored.
        """
        if as_of is None or as_of.process != self._process:
            return
        same = request_id == self._believed_in
        self._believed_at_s = max(self._believed_at_s, as_of.at_s) if same else as_of.at_s
        self._believed_in = request_id

    # D33: the fence
    def require_heard(self) -> None:
        """Raise RegistryUnheard if the registry may have ended the bound lease without this wrapper knowing."""
        if self._grant is None:
            return
        if self._believed_in != self._grant.request_id:
            raise RegistryUnheard("this wrapper waits for the registry to confirm the lease")
        unheard_s = self._clock() - self._believed_at_s
        if unheard_s >= self._fence_s:
            raise RegistryUnheard(f"this wrapper has not heard from the registry for {unheard_s:.0f} s")

    def unbind(self, how: str) -> None:
        """Refuse the bound lease's token from now on, and remember ``how`` it ended. No effect without a lease."""
        if self.grant is not None:
            self._end(how)

    def touch(self) -> None:
        """Note that the lease is used now."""
        self._last_used_s = self._clock()

    def check(self, token: str) -> LeaseGrant:
        """Return the lease of this token.

        Raises:
            LeaseEnded: its lease has ended; ``how`` says how (released, expired, withdrawn …).
            NoSuchLease: no lease that the gate remembers had this token.
            EngineNotReady: nothing is remembered, because no command of the registry has come yet.
        """
        self._end_if_over()
        # D7: the token is a part of the address, or in a header (D115)
        given = token.encode()
        if self._grant is not None and hmac.compare_digest(self._grant.token.encode(), given):
            return self._grant
        how = self._ended.get(_sha256(given))
        if how is not None:
            raise LeaseEnded(how)
        if not self.commanded:
            raise EngineNotReady("its wrapper has just started and waits for the registry's first command")
        raise NoSuchLease

    def enter(self) -> None:
        """Note that a prompt of the bound lease begins."""
        self._in_flight += 1
        self.touch()

    def leave(self, grant: LeaseGrant) -> None:
        """Note that a prompt of this lease is over. This does not extend a lease that was bound later."""
        self._in_flight -= 1
        if self._grant is not None and self._grant.token == grant.token:
            self.touch()

    # D3: a lease ends by the wrapper's own clock
    def _end_if_over(self) -> None:
        if self._grant is None:
            return
        idle_ends_s = math.inf if self._in_flight else self._last_used_s + self._grant.idle_limit_s
        ends_s = min(self._deadline_s, idle_ends_s)
        if self._clock() >= ends_s:
            self._end("expired", ends_s)

    def _end(self, how: str, ended_s: float | None = None) -> None:
        assert self._grant is not None  # callers have checked
        self._ended[_sha256(self._grant.token.encode())] = how
        if len(self._ended) > REMEMBERED_TOKENS:
            self._ended.popitem(last=False)
        self._grant = None
        self._tell(None, self._clock() if ended_s is None else ended_s)

    def _tell(self, grant: LeaseGrant | None, since_s: float) -> None:
        if self._on_change is not None:
            self._on_change(grant, since_s)


def _sha256(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
