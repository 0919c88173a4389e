"""Errors about who calls, what the caller may do, and how often."""

from __future__ import annotations

from registry.errors import RegistryError


class KeyNeeded(RegistryError):
    """The request has no API key, or a text in its place that is not a key."""

    code = "key_needed"
    http_status = 401

    given: bool = False

    def __str__(self) -> str:
        if self.given:
            return "the header Authorization is no API key (Bearer gp_…; send it once); an operator makes keys"
        return "an API key is needed, as in the header Authorization: Bearer gp_…; an operator makes one"


class KeyRefused(RegistryError):
    """The API key is unknown, was revoked, or has expired. ``key_id``: empty for one that is unknown."""

    code = "key_refused"
    http_status = 401

    problem: str
    key_id: str = ""

    def __str__(self) -> str:
        return f"the API key is refused: {self.problem}; an operator makes another one"


class JWTRefused(RegistryError):
    """The JWT is invalid or has expired, or it gives no role or tenant.

    ``key_id``: see ``JWTIdentities``; empty unless the issuer signed the JWT for this registry.
    """

    code = "jwt_refused"
    http_status = 401

    problem: str
    key_id: str = ""

    def __str__(self) -> str:
        return f"the JWT is refused: {self.problem}; get another one from its issuer, or use an API key"


class JWTNotChecked(RegistryError):
    """A JWT can't be checked at the moment, because its key is not known, and its issuer can't be asked right now."""

    code = "jwt_not_checked"
    http_status = 503
    retryable = True

    problem: str
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"the JWT can't be checked at the moment: {self.problem}; use an API key, or try again in "
            f"{self.retry_after_s:.3g} s"
        )


class NotAllowed(RegistryError):
    """The role of the API key or JWT does not allow this call."""

    code = "not_allowed"
    http_status = 403

    role: str
    needed: str

    def __str__(self) -> str:
        return f"the role {self.role} does not allow this: it needs the role {self.needed}"


class OtherTenant(RegistryError):
    """The header X-Tenant names another tenant than that of the API key or JWT."""

    code = "other_tenant"
    http_status = 403

    tenant: str

    def __str__(self) -> str:
        return f"X-Tenant: the API key or JWT does not belong to tenant {self.tenant!r}; leave the header out"


class UnknownKey(RegistryError):
    """No API key has this id."""

    code = "unknown_key"
    http_status = 404

    key_id: str

    def __str__(self) -> str:
        return f"no API key has the id {self.key_id!r}; GET /keys and 'greenprompt keys list' show all ids"


class KeysNotUsed(RegistryError):
    """The registry is used without API keys."""

    code = "keys_not_used"
    http_status = 409

    def __str__(self) -> str:
        return "this registry is used without API keys; to use them, set access.keys: true"


class TooManyCalls(RegistryError):
    """A key, a tenant or an address has called more often than the settings in `rates` allow."""

    code = "too_many_calls"
    http_status = 429
    retryable = True

    caller: str
    setting: str
    limit: int
    retry_after_s: float
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.caller} has reached the limit {self.setting}: {self.limit}; {self.remedy}, and try again in "
            f"{self.retry_after_s:.3g} s"
        )


class TooManyWrongKeys(RegistryError):
    """So many wrong API keys or JWTs came from this address that unknown keys are not looked up for a while."""

    code = "too_many_wrong_keys"
    http_status = 429
    retryable = True

    limit: int
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"too many wrong API keys or JWTs came from this address (rates.wrong_keys_per_minute: {self.limit}); "
            f"check yours, and try again in {self.retry_after_s:.3g} s"
        )
