"""All errors of the project, each with its code, HTTP status, and whether a retry can help.

An error's annotated names are its fields, as in a dataclass. ``__str__`` returns the text for people: what happened, to
which id, what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, dataclass_transform


def in_one_line(error: BaseException) -> str:
    """Return a library's error as one line: its type, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass_transform(eq_default=False)
class RegistryError(Exception):
    """Base of every error that this project raises on purpose; its subclasses are dataclasses.

    ``code``: stable and unique, for programs. ``http_status``: status of the answer. ``retryable``: whether the same
    call can succeed later.
    """

    code: ClassVar[str] = "registry_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    __match_args__: ClassVar[tuple[str, ...]] = ()

    # D109: errors declare their fields
    def __init_subclass__(cls) -> None:
        """Make ``__init__`` from the fields, unless the class has one, as the subclasses that Ray makes do."""
        if "__init__" in vars(cls):
            return
        dataclass(eq=False, repr=False)(cls)
        for name in cls.__match_args__:
            # Ray's subclass reads the fields of the original error by __getattr__, which Python calls only if the class
            # has no attribute of that name. A default is such an attribute, so it is removed.
            if name in vars(cls):
                delattr(cls, name)

    def __post_init__(self) -> None:
        # pickle, which Ray uses, rebuilds an error from its args.
        super().__init__(*(getattr(self, name) for name in self.__match_args__))


class InvalidField(RegistryError):
    """A field of a request body or a setting is missing or invalid."""

    code = "invalid_field"
    http_status = 422

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class LLMNeverFits(RegistryError):
    """No machine of the configured cluster can ever run this LLM."""

    code = "llm_never_fits"
    http_status = 422

    field: str
    model: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: LLM {self.model!r} fits on no machine: {self.reason}"


class UnknownRequest(RegistryError):
    """No request has this id."""

    code = "unknown_request"
    http_status = 404

    request_id: str

    def __str__(self) -> str:
        return f"no request has the id {self.request_id!r}; create one with POST /promptingservice/request"


class RequestForgotten(RegistryError):
    """The request with this id ended more than ``keep_days`` ago and was deleted."""

    code = "request_forgotten"
    http_status = 410

    request_id: str

    def __str__(self) -> str:
        return f"request {self.request_id} ended long ago, and its record was deleted; create a new request"


class RequestWithdrawn(RegistryError):
    """The ingress withdrew this request before it was accepted: its client had hung up or got an error (5xx)."""

    code = "request_withdrawn"
    http_status = 410

    request_id: str

    def __str__(self) -> str:
        return f"request {self.request_id} was withdrawn before it was accepted; create a new request"


class UnknownMeasurement(RegistryError):
    """No measurement has this id."""

    code = "unknown_measurement"
    http_status = 404

    measurement_id: int

    def __str__(self) -> str:
        return f"no request has the measurementId {self.measurement_id}"


class UnknownMachine(RegistryError):
    """No machine has this id. ``there``: text that lists the known ones."""

    code = "unknown_machine"
    http_status = 404

    machine_id: str
    there: str

    def __str__(self) -> str:
        return f"no machine has the id {self.machine_id!r}; {self.there}"


class IdempotencyConflict(RegistryError):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency_conflict"
    http_status = 409

    key: str

    def __str__(self) -> str:
        return f"Idempotency-Key {self.key!r} was used before with another body; use a new key"


class QueueFull(RegistryError):
    """The limit of queued requests is reached."""

    code = "queue_full"
    http_status = 429
    retryable = True

    scope: str
    limit: int
    retry_after_s: float | None = None

    def __str__(self) -> str:
        when = "when some have been served" if self.retry_after_s is None else f"in about {self.retry_after_s:.3g} s"
        return f"the queue of {self.scope} is full ({self.limit} requests); try again {when}"


class TooManyPolls(RegistryError):
    """The limit of GETs that wait for a change of status (``wait``) is reached."""

    code = "too_many_polls"
    http_status = 429
    retryable = True

    limit: int

    def __str__(self) -> str:
        return f"{self.limit} GETs already wait for a change of status; try again in a few seconds, or without `wait`"


class TenantBudgetUsed(RegistryError):
    """A tenant has used up its budget for this month. ``until``: start of the next month (ISO 8601 UTC)."""

    code = "tenant_budget_used"
    http_status = 429

    tenant: str
    used: str
    limit: str
    until: str

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant!r} has used {self.used} of the {self.limit} that it may use in this month (UTC); "
            f"accepted requests are still served; new ones are accepted from {self.until} on, or with a larger budget"
        )


class ShuttingDown(RegistryError):
    """The registry is shutting down and accepts no new requests."""

    code = "shutting_down"
    http_status = 503
    retryable = True

    def __str__(self) -> str:
        return "the registry is shutting down and accepts no new requests"


class RegistryUnavailable(RegistryError):
    """The registry actor does not answer, for instance because Ray is restarting it."""

    code = "registry_unavailable"
    http_status = 503
    retryable = True

    reason: str

    def __str__(self) -> str:
        return f"the registry does not answer at the moment ({self.reason}); try again in a few seconds"


class InternalError(RegistryError):
    """A bug in this project. The log has the details."""

    code = "internal_error"

    what: str

    def __str__(self) -> str:
        return f"the registry has a bug ({self.what}); its log has the details"


class StartFailed(RegistryError):
    """A registry could not be started or stopped, or ended before it was ready."""

    code = "start_failed"

    reason: str

    def __str__(self) -> str:
        return self.reason


class StoreUnavailable(RegistryError):
    """The database can't be read or written."""

    code = "store_unavailable"
    http_status = 503
    retryable = True

    reason: str

    def __str__(self) -> str:
        return f"the registry's database does not answer: {self.reason}"


class NoCredentials(RegistryError):
    """A prompt to the root of the registry has no lease token, or one that can't be read."""

    code = "no_credentials"
    http_status = 401

    def __str__(self) -> str:
        return (
            "the token of a lease is missing; send prompts to the url in the request's status, or to "
            "http://{address}:8000 with the address unchanged"
        )


class NoSuchLease(RegistryError):
    """The request has no token of a lease, an unknown one, or several different ones."""

    code = "no_such_lease"
    http_status = 403

    def __str__(self) -> str:
        return "no lease has this URL or token; use the url in the request's status"


class LeaseEnded(RegistryError):
    """The lease of this URL was released or has expired."""

    code = "lease_ended"
    http_status = 410

    how: str

    def __str__(self) -> str:
        return f"this lease has ended ({self.how}); request the LLM again"


class EngineStartFailed(RegistryError):
    """vLLM could not start the LLM. ``permanent``: it would fail the same way on every machine."""

    code = "engine_start_failed"
    http_status = 502

    model: str
    reason: str
    permanent: bool = False

    def __str__(self) -> str:
        return f"the engine could not start {self.model!r}: {self.reason}"


class EngineNotReady(RegistryError):
    """The lease is valid, but its LLM is not running at the moment, for instance because it is being restarted."""

    code = "engine_not_ready"
    http_status = 503
    retryable = True

    reason: str

    def __str__(self) -> str:
        return f"the LLM is not ready: {self.reason}"


class TooManyPrompts(RegistryError):
    """The limit of prompts in flight on this wrapper is reached."""

    code = "too_many_prompts"
    http_status = 429
    retryable = True

    limit: int

    def __str__(self) -> str:
        return f"{self.limit} prompts are in flight on this LLM; wait until some of them have ended"


class BudgetUsed(RegistryError):
    """A lease has used up its budget, idle time included."""

    code = "budget_used"
    http_status = 429

    unit: str
    used: float
    limit: float

    def __str__(self) -> str:
        return (
            f"this lease has used {self.used} {self.unit}, idle time included, and may use {self.limit} {self.unit}; "
            "it accepts no more prompts: release it, and request a new one with a larger budget"
        )


class RegistryUnheard(RegistryError):
    """The lease may be valid, but its wrapper has not heard from the registry for too long."""

    code = "registry_unheard"
    http_status = 503
    retryable = True

    reason: str

    def __str__(self) -> str:
        return f"no new prompts at the moment: {self.reason}; try again in a few seconds"


class StaleEpoch(RegistryError):
    """A command to a wrapper is older than one that it has already accepted."""

    code = "stale_epoch"
    http_status = 409

    wrapper_id: str
    given: int
    known: int

    def __str__(self) -> str:
        return f"wrapper {self.wrapper_id}: command of epoch {self.given} came after one of epoch {self.known}"


class WrapperUnreachable(RegistryError):
    """A wrapper did not answer in time, or its replica is gone."""

    code = "wrapper_unreachable"
    http_status = 503
    retryable = True

    wrapper_id: str
    reason: str

    def __str__(self) -> str:
        return f"wrapper {self.wrapper_id} does not answer: {self.reason}"


class WrapperUnheard(WrapperUnreachable):
    """A wrapper did not answer in time, perhaps only because the connection to it is being restored."""

    code = "wrapper_unheard"


class BadSettings(RegistryError):
    """The configuration can't be used; the program ends with exit status 2."""

    code = "bad_settings"
    http_status = 500

    source: str
    problem: str

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}"
