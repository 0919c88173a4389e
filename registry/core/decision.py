"""The records of a decision: state before it, changes, commands, and the settings that it depends on."""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.commands import Effect
from registry.core.records import (
    Lease,
    Machine,
    Measurement,
    Request,
    Wrapper,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records, as the store loads them. The order within each tuple has no meaning."""

    machines: tuple[Machine, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What one event changed: records to write, ids to remove. Each record appears at most once.

    ``ended_leases`` are request ids, ``removed_wrappers`` wrapper ids.
    """

    machines: tuple[Machine, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()
    ended_leases: tuple[str, ...] = ()
    removed_wrappers: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when there is nothing to write."""
        return not (
            self.machines
            or self.wrappers
            or self.measurements
            or self.requests
            or self.leases
            or self.ended_leases
            or self.removed_wrappers
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one event: write ``changes`` first, then run ``effects`` in their order."""

    changes: Changes = Changes()
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings that decisions depend on.

    * ``lease_max_s``, ``lease_idle_s``: maximum length of a lease, and of its idle time; seconds > 0.
    * ``deploy_attempts``: a request fails after so many failed starts of its LLM, or after so many deaths of its LLM
      during a lease; ≥ 1.
    * ``wrapper_attempts``: consecutive failures after which a wrapper is given up, ≥ 1.
    * ``max_overtakes``, ``max_overtake_s``: how often, and for how many seconds after its arrival, a request may be
      overtaken by requests whose LLM is already running.
    * ``max_queued``, ``max_queued_per_tenant``: maximum number of queued requests.
    * ``tenant_weights``: (tenant, weight > 0); tenants that are not listed have weight 1.
    * ``wrappers_per_machine``: wrappers that share the main memory of a machine without GPUs, ≥ 1.
    * ``kv_cache_bytes``: KV cache of each of these wrappers, None: no separate limit.
    * ``sticky_s``: a resumed measurement waits for its previous machine for so many seconds (≥ 0) after the release
      of its last LLM.
    """

    lease_max_s: float = 3600.0
    lease_idle_s: float = 600.0
    deploy_attempts: int = 2
    wrapper_attempts: int = 3
    max_overtakes: int = 4
    max_overtake_s: float = 60.0
    max_queued: int = 100_000
    max_queued_per_tenant: int = 100_000
    tenant_weights: tuple[tuple[str, float], ...] = ()
    wrappers_per_machine: int = 1
    kv_cache_bytes: int | None = None
    sticky_s: float = 600.0
