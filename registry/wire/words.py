"""The enumerations in the registry's HTTP bodies: statuses, priorities, grades, kinds of energy windows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum


class RequestStatus(StrEnum):
    """The status of a request for one LLM; its value is ``status`` in HTTP bodies."""

    QUEUED = "queued"
    DEPLOYING = "deploying"
    DEPLOYED = "deployed"
    RELEASED = "released"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True when the request holds nothing and its status can't change any more."""
        return self in _ENDED


_ENDED = frozenset({RequestStatus.RELEASED, RequestStatus.EXPIRED, RequestStatus.CANCELLED, RequestStatus.FAILED})


MAX_PROMPT_ID = 1024
"""Maximum length of a prompt id that a client chooses, in characters after percent-encoding."""


class Priority(StrEnum):
    """Rank of a measurement inside its tenant's queue."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Grade(StrEnum):
    """How carefully a lease is prepared for measuring energy.

    measurement: the LLM is handed over after a warm-up, on a machine at rest. With every grade, the prefix cache is
    empty at the start of the lease.
    """

    STANDARD = "standard"
    MEASUREMENT = "measurement"


class Role(StrEnum):
    """What an API key allows.

    client: requests for LLMs, and its own tenant's leases, measurements and reports. viewer: machines, LLMs and health,
    nothing else. operator: machines, keys, audit, and the requests of all tenants, but no lease's address.
    """

    CLIENT = "client"
    VIEWER = "viewer"
    OPERATOR = "operator"


POOLING_TYPES = frozenset(
    {"feature-extraction", "embedding", "sentence-similarity", "text-classification", "text-ranking", "score"}
)
"""Values of an llmconfig's ``modeltyp`` whose LLMs answer with numbers, not with text."""


KEY_PREFIX = "gp_"
"""How every API key begins, so that people and secret scanners recognise one. Its id follows, and then its secret."""

JWT_MARK = "#"
"""Between issuer and subject in the id of an identity by JWT: no issuer's URL contains it, and no id of an API key."""


def canonical_json(value: Mapping[str, object]) -> str:
    """Return a JSON object as text with sorted keys and no spaces. Equal objects give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class WindowKind(StrEnum):
    """What a wrapper did during an energy window.

    prompt: one prompt of a lease. lease: a whole lease. idle: the time of a lease without prompts, or of a machine
    without a lease. load: the start of an LLM. wake: its waking from sleep. Both include the warm-up, and are charged
    to the request that the LLM was started for, if any.
    """

    PROMPT = "prompt"
    LEASE = "lease"
    IDLE = "idle"
    LOAD = "load"
    WAKE = "wake"
