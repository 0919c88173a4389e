"""All errors of the project, each with its code, HTTP status, and whether a retry can help.

Fields are positional and go to ``super().__init__`` unchanged, so that every error can be pickled across Ray actors.
``__str__`` makes the text for people: what, which id, what to do.
"""

from __future__ import annotations

from typing import ClassVar


def in_one_line(error: BaseException) -> str:
    """Return a library's error as one line: its type, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class RegistryError(Exception):
    """Base of every error that this project raises on purpose.

    ``code``: stable and unique, for programs. ``http_status``: status of the answer. ``retryable``: whether the same
    call can succeed later. ``retry_after_s``: seconds until the earliest retry, None if not known.
    """

    code: ClassVar[str] = "registry_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None


class InvalidField(RegistryError):
    """A field of a request body or a setting is missing or invalid."""

    code = "invalid_field"
    http_status = 422

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class LLMNeverFits(RegistryError):
    """No machine of the configured cluster can ever run this LLM."""

    code = "llm_never_fits"
    http_status = 422

    def __init__(self, field: str, model: str, reason: str) -> None:
        super().__init__(field, model, reason)
        self.field, self.model, self.reason = field, model, reason

    def __str__(self) -> str:
        return f"{self.field}: LLM {self.model!r} fits on no machine: {self.reason}"


class UnknownRequest(RegistryError):
    """No request has this id."""

    code = "unknown_request"
    http_status = 404

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"no request has the id {self.request_id!r}; POST /promptingservice/request makes one"


class RequestForgotten(RegistryError):
    """The request with this id ended more than ``keep_days`` ago and was deleted."""

    code = "request_forgotten"
    http_status = 410

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"request {self.request_id} ended long ago, and nothing is kept of it any more; make a new one"


class UnknownMeasurement(RegistryError):
    """No measurement has this id."""

    code = "unknown_measurement"
    http_status = 404

    def __init__(self, measurement_id: int) -> None:
        super().__init__(measurement_id)
        self.measurement_id = measurement_id

    def __str__(self) -> str:
        return f"no request was made with the measurementId {self.measurement_id}"


class UnknownMachine(RegistryError):
    """No machine has this id. ``there``: text that lists the known ones."""

    code = "unknown_machine"
    http_status = 404

    def __init__(self, machine_id: str, there: str) -> None:
        super().__init__(machine_id, there)
        self.machine_id, self.there = machine_id, there

    def __str__(self) -> str:
        return f"no machine has the id {self.machine_id!r}; {self.there}"


class IdempotencyConflict(RegistryError):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency_conflict"
    http_status = 409

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"Idempotency-Key {self.key!r} was used before with another body; use a new key"


class QueueFull(RegistryError):
    """The limit of queued requests is reached."""

    code = "queue_full"
    http_status = 429
    retryable = True

    def __init__(self, scope: str, limit: int, retry_after_s: float | None = None) -> None:
        super().__init__(scope, limit, retry_after_s)
        self.scope, self.limit, self.retry_after_s = scope, limit, retry_after_s

    def __str__(self) -> str:
        when = "when some were served" if self.retry_after_s is None else f"in {self.retry_after_s:.3g} s or so"
        return f"the queue of {self.scope} is full ({self.limit} requests); try again {when}"


class TooManyPolls(RegistryError):
    """The limit of GETs that wait for a change of status (``wait``) is reached."""

    code = "too_many_polls"
    http_status = 429
    retryable = True

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.limit} GETs wait for a change of status already; try again in a few seconds, or without `wait`"


class TenantBudgetUsed(RegistryError):
    """A tenant has used up its budget for this month. ``until``: start of the next month (ISO 8601 UTC)."""

    code = "tenant_budget_used"
    http_status = 429

    def __init__(self, tenant: str, used: str, limit: str, until: str) -> None:
        super().__init__(tenant, used, limit, until)
        self.tenant, self.used, self.limit, self.until = tenant, used, limit, until

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant!r} has used {self.used} of the {self.limit} that it may use in this month (UTC); "
            f"what was accepted is served, new requests are taken from {self.until} on, or when its budget is raised"
        )


class ShuttingDown(RegistryError):
    """The registry is shutting down and takes no new requests."""

    code = "shutting_down"
    http_status = 503
    retryable = True

    def __str__(self) -> str:
        return "the registry is shutting down and takes no new requests"


class RegistryUnavailable(RegistryError):
    """The registry actor does not answer, e.g. because Ray is restarting it."""

    code = "registry_unavailable"
    http_status = 503
    retryable = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the registry does not answer at the moment ({self.reason}); try again in a few seconds"


class InternalError(RegistryError):
    """A bug in this project. The log has the details."""

    code = "internal_error"

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"the registry made an error ({self.what}); its log tells more"


class StartFailed(RegistryError):
    """A registry could not be started or ended, or ended before it was ready."""

    code = "start_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StoreUnavailable(RegistryError):
    """The database can't be read or written."""

    code = "store_unavailable"
    http_status = 503
    retryable = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the registry's database does not answer: {self.reason}"


class NoCredentials(RegistryError):
    """A prompt to the root of the registry has no lease token, or one that can't be read."""

    code = "no_credentials"
    http_status = 401

    def __str__(self) -> str:
        return (
            "the token of a lease is missing; prompt at the url in the request's status, or at "
            "http://{address}:8000 with its address as it is"
        )


class NoSuchLease(RegistryError):
    """The URL contains an unknown lease token."""

    code = "no_such_lease"
    http_status = 403

    def __str__(self) -> str:
        return "this URL belongs to no lease; use the url in the request's status"


class LeaseEnded(RegistryError):
    """The lease of this URL was released or has expired."""

    code = "lease_ended"
    http_status = 410

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how

    def __str__(self) -> str:
        return f"this lease has ended ({self.how}); request the LLM again"


class EngineStartFailed(RegistryError):
    """vLLM could not start the LLM. ``permanent``: it would fail the same way on every machine."""

    code = "engine_start_failed"
    http_status = 502

    def __init__(self, model: str, reason: str, permanent: bool = False) -> None:
        super().__init__(model, reason, permanent)
        self.model, self.reason, self.permanent = model, reason, permanent

    def __str__(self) -> str:
        return f"the engine could not start {self.model!r}: {self.reason}"


class EngineNotReady(RegistryError):
    """The lease is valid, but its LLM is not running at the moment (e.g. it is being restarted)."""

    code = "engine_not_ready"
    http_status = 503
    retryable = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the LLM is not ready: {self.reason}"


class TooManyPrompts(RegistryError):
    """The limit of prompts in flight on this wrapper is reached."""

    code = "too_many_prompts"
    http_status = 429
    retryable = True

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.limit} prompts are in flight on this LLM; wait for some of them to end"


class BudgetUsed(RegistryError):
    """A lease has used up its budget, idle time included."""

    code = "budget_used"
    http_status = 429

    def __init__(self, unit: str, used: float, limit: float) -> None:
        super().__init__(unit, used, limit)
        self.unit, self.used, self.limit = unit, used, limit

    def __str__(self) -> str:
        return (
            f"this lease has used {self.used} {self.unit}, idle time included, and may use {self.limit} {self.unit}; "
            "no more prompts are taken: give it back, and ask for another one with a larger budget"
        )


class RegistryUnheard(RegistryError):
    """The lease may be valid, but its wrapper has not heard from the registry for too long."""

    code = "registry_unheard"
    http_status = 503
    retryable = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"no new prompts at the moment: {self.reason}; try again in a few seconds"


class StaleEpoch(RegistryError):
    """A command to a wrapper is older than one that it has already accepted."""

    code = "stale_epoch"
    http_status = 409

    def __init__(self, wrapper_id: str, given: int, known: int) -> None:
        super().__init__(wrapper_id, given, known)
        self.wrapper_id, self.given, self.known = wrapper_id, given, known

    def __str__(self) -> str:
        return f"wrapper {self.wrapper_id}: command of epoch {self.given} came after one of epoch {self.known}"


class WrapperUnreachable(RegistryError):
    """A wrapper did not answer in time, or its replica is gone."""

    code = "wrapper_unreachable"
    http_status = 503
    retryable = True

    def __init__(self, wrapper_id: str, reason: str) -> None:
        super().__init__(wrapper_id, reason)
        self.wrapper_id, self.reason = wrapper_id, reason

    def __str__(self) -> str:
        return f"wrapper {self.wrapper_id} does not answer: {self.reason}"


class WrapperUnheard(WrapperUnreachable):
    """A wrapper did not answer in time, but may be well: the connection to it is being restored."""

    code = "wrapper_unheard"

    def __init__(self, wrapper_id: str, reason: str) -> None:
        super().__init__(wrapper_id, reason)


class BadSettings(RegistryError):
    """The configuration can't be used; the program ends with exit status 2."""

    code = "bad_settings"
    http_status = 500

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(source, problem)
        self.source, self.problem = source, problem

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}"
