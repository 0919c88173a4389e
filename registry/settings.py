"""Settings: one YAML file, overridden by the environment, as one frozen object.

``GREENPROMPT_<SECTION>__<FIELD>`` overrides a field, e.g. ``GREENPROMPT_HTTP__PORT=8001``. An unknown or invalid field
is an error that names it. Relative paths are relative to the current directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from registry.access_settings import AccessSettings, RateSettings
from registry.core.decision import Limits
from registry.energy_settings import EnergySettings, Section, SiteEnergySettings
from registry.environment import (
    EMPTY,
    ENV_PREFIX,
    StrictVariables,
    did_you_mean,
    empty_values,
    fields_of,
    problems_of,
    variables,
)
from registry.errors import BadSettings
from registry.http_settings import HTTPSettings
from registry.model_settings import ModelSettings, absolute
from registry.networks import within
from registry.strict_yaml import load_yaml
from registry.wire.http import is_loopback
from registry.wire.schemas import LLMConfig, TenantName

__all__ = ["EnergySettings", "ModelSettings", "Settings", "differing", "load_settings", "url_host"]

LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Loopback addresses for hosts that mean "all interfaces" and that clients can't connect to."""

OPERATOR_KEY = "operator.key"
"""Name of the file in ``state_dir`` with the API key of the machine's operator."""

LONGEST_MONTH_DAYS = 31

MOST_PROBLEMS = 8
"""Maximum number of a configuration's problems in one error."""


class RaySettings(Section):
    """The Ray cluster: a new local one (address null), or one that is already running."""

    address: str | None = Field(None, description="Address of a running cluster, or 'auto'; null: start a local one")
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description="Port of Ray's dashboard; null: 8265, or a free port if 8265 is in use"
    )
    num_gpus: int | None = Field(
        None, ge=0, description="Number of GPUs of the local cluster; null: all that Ray finds"
    )


class WrapperSettings(Section):
    """The wrappers of a machine: number and limits. Times in seconds."""

    per_machine: int = Field(1, ge=1, le=64, description="Number of wrappers per machine")
    on_head: bool = Field(True, description="Whether the head of the Ray cluster is also an LLM Machine")
    gpus_per_wrapper: int | None = Field(
        None, ge=1, description="GPUs of each wrapper; null: the machine's GPUs are divided evenly"
    )
    deploy_timeout_s: float = Field(1800, gt=0, description="Time limit for download and start of an LLM, seconds")
    start_timeout_s: float = Field(300, gt=0, description="Time limit for the start of a wrapper, seconds")
    prompt_max_s: float = Field(600, gt=0, description="Time limit for a prompt, seconds; then it is cut")
    stall_s: float | None = Field(
        None,
        gt=0,
        description="Seconds without a token after which an engine that has prompts is restarted; null: 60 with GPUs, "
        "300 without (there, one step of a large LLM can take minutes)",
    )
    fence_s: float = Field(
        30,
        gt=0,
        description="Seconds without contact with the registry after which a wrapper refuses new prompts, until the "
        "contact is back",
    )
    max_prompts_in_flight: int = Field(256, ge=1, description="Limit of prompts in flight per wrapper; others get 429")
    max_body_mib: int = Field(64, ge=1, le=1024, description="Longest body of a prompt, MiB; a longer one gets 413")
    kv_cache_gib: int | None = Field(None, ge=1, description="KV cache of an LLM without GPU, GiB; null: vLLM decides")
    preload: tuple[Annotated[str, StringConstraints(pattern=r"^\w+$")], ...] = Field(
        ("llama", "qwen2", "qwen3", "gemma3", "phi3"),
        description="Modules of vLLM (vllm.model_executor.models.…) to import in advance: their LLMs start sooner",
    )
    sleep_host_gib: float | None = Field(
        None, ge=0, description="GiB of main memory for sleeping LLMs, on each machine with GPUs; 0 or null: none"
    )
    run_as: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.-]*$", max_length=32)] | None = Field(
        None,
        description="Name of a user of each LLM Machine. Engines run as this user, who can't read the files of Ray's "
        "user, and have no network; Ray must run as root. null: engines run as Ray's user",
    )
    stop_timeout_s: float = Field(
        30,
        gt=0,
        description="Seconds after which Serve kills a wrapper that shuts down. Commands that stop an LLM have the "
        "same time limit. An engine that does not stop is killed after 5 s in any case",
    )


class LeaseSettings(Section):
    """Time limits of leases, and what happens to prompts in flight when a lease expires."""

    max_s: float = Field(3600, gt=0, description="Maximum length of a lease, seconds")
    idle_s: float = Field(600, gt=0, description="Maximum time without a prompt or a keep-alive, seconds")
    at_expiry: Literal["cut", "finish"] = Field(
        "cut",
        description="Whether prompts in flight are cut, or finished before the wrapper gets another lease. No new "
        "prompt begins in either case",
    )


class QueueSettings(Section):
    """Limits and weights of the queue."""

    max_queued: int = Field(100_000, ge=1, description="Maximum number of waiting requests; others get 429")
    max_queued_per_tenant: int = Field(100_000, ge=1, description="Maximum number of waiting requests of one tenant")
    max_overtakes: int = Field(4, ge=0, description="How many later requests, whose LLM runs already, may go first")
    max_overtake_s: float = Field(60, ge=0, description="Seconds after its arrival in which a request may be overtaken")
    deploy_attempts: int = Field(
        2, ge=1, description="A request fails after this many failed starts or deaths of its LLM"
    )
    wrapper_attempts: int = Field(3, ge=1, description="A wrapper is given up after this many failures in a row")
    tenant_weights: dict[TenantName, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Weight of a tenant in the queue: its turns per turn of a tenant that is not listed"
    )


class MeasurementSettings(Section):
    """Settings of whole measurements."""

    sticky_s: float = Field(
        600,
        ge=0,
        description="How long a measurement that gets new requests waits for its previous machine, seconds after the "
        "release of its last LLM. Later it may continue on another machine, and then gets a flag",
    )


class WatchSettings(Section):
    """Checks of wrappers and machines. Times in seconds."""

    period_s: float = Field(1.0, gt=0, description="Time between two report requests to a wrapper, seconds")
    report_timeout_s: float = Field(5.0, gt=0, description="Time limit for a report, seconds")
    failures: int = Field(3, ge=1, description="Reports missed in a row until a wrapper counts as failed")


class MachineLLM(Section):
    """An LLM that is deployed without a request, on the first wrapper of a machine."""

    machine: str = Field("*", description="Id of the machine; `*`: every machine that is not named")
    llm: LLMConfig = Field(description="The llmconfig, as in a POST")


class TenantBudget(Section):
    """A tenant's budget per calendar month (UTC), for its leases (hand-over to release) and the starts of its LLMs."""

    max_joules_per_month: float | None = Field(None, gt=0, description="Joules; null: no limit")
    max_gco2eq_per_month: float | None = Field(None, gt=0, description="Grams CO2eq; null: no limit")


class BudgetSettings(Section):
    """Budgets of tenants. From 80 % on, answers contain a warning; from 100 % on, new requests are refused."""

    tenants: dict[TenantName, TenantBudget] = Field({}, description="Budgets by name; other tenants have no limit")


class Settings(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    state_dir: Path = Field(
        Path("build/state"), validate_default=True, description="Folder for the database, logs, keys and a lock file"
    )
    cache_dir: Path = Field(
        Path("build/cache"), validate_default=True, description="Folder for compile caches, on each machine's own disk"
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL of the database; null: SQLite in state_dir")
    keep_days: float = Field(
        90, gt=0, description="Days until ended requests, events, energy windows and the audit are deleted"
    )
    http: HTTPSettings = HTTPSettings()
    access: AccessSettings = AccessSettings()
    rates: RateSettings = RateSettings()
    ray: RaySettings = RaySettings()
    wrappers: WrapperSettings = WrapperSettings()
    models: ModelSettings = ModelSettings()
    leases: LeaseSettings = LeaseSettings()
    queue: QueueSettings = QueueSettings()
    measurements: MeasurementSettings = MeasurementSettings()
    watch: WatchSettings = WatchSettings()
    energy: SiteEnergySettings = SiteEnergySettings()
    budgets: BudgetSettings = BudgetSettings()
    deploy: tuple[MachineLLM, ...] = Field(
        (),
        description="LLMs to deploy without a request, on a machine's first wrapper: when the wrapper has started, "
        "when it has stopped another LLM, and after an undrain",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings gives it
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the environment first, then the file, and nothing else."""
        return StrictVariables(settings_cls), init_settings

    @field_validator("state_dir", "cache_dir")
    @classmethod
    def _absolute_path(cls, path: Path) -> Path:
        return absolute(path)

    @model_validator(mode="after")
    def _fence_behind_the_watch(self) -> Settings:
        # A wrapper counts as failed after ``failures`` missed reports. It must not refuse prompts (fence) before that.
        watch = self.watch
        least_s = watch.failures * (watch.period_s + watch.report_timeout_s)
        if self.wrappers.fence_s < least_s:
            raise ValueError(
                f"wrappers.fence_s must be at least {least_s:g}: watch.failures x (watch.period_s + "
                "watch.report_timeout_s), after which a wrapper that does not answer counts as failed"
            )
        return self

    @model_validator(mode="after")
    def _closed_to_other_machines(self) -> Settings:
        hosts = {"host": self.http.host}
        if self.http.public_url is not None:
            hosts["public_url"] = urlsplit(self.http.public_url).hostname or ""
        for name, host in hosts.items():
            if not (self.access.keys or self.access.insecure or is_loopback(host)):
                raise ValueError(
                    f"access.keys must be true, because http.{name} {host!r} can be reached from other machines "
                    "(make keys with greenprompt keys create); access.insecure: true serves everybody who reaches it"
                )
        if self.access.trusted_clients and not self.http.haproxy:
            raise ValueError("access.trusted_clients needs http.haproxy: true, which knows where a call comes from")
        for network in self.access.trusted_clients:
            if any(within(network, proxies) for proxies in self.http.trusted_proxies):
                raise ValueError(
                    f"access.trusted_clients: {network} is in http.trusted_proxies: a proxy itself is never a client"
                )
        return self

    @model_validator(mode="after")
    def _a_month_is_kept(self) -> Settings:
        if self.budgets.tenants and self.keep_days < LONGEST_MONTH_DAYS:
            raise ValueError(
                f"keep_days must be at least {LONGEST_MONTH_DAYS}, because budgets.tenants has budgets per month"
            )
        return self

    @property
    def base_url(self) -> str:
        """Base URL of the ingress for clients, without a trailing slash."""
        return (self.http.public_url or f"http://{url_host(self.http.host)}:{self.http.port}").rstrip("/")

    @property
    def served_hosts(self) -> tuple[str, ...]:
        """Host names of the registry in lower case, as clients send them (IDNA)."""
        published = urlsplit(self.base_url).hostname or ""
        return published.encode("idna").decode(), self.http.host.lower(), *self.http.allowed_hosts

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the registry's database."""
        # In a URL, % and ? of a path would mean an escape and a query.
        return self.database_url or f"sqlite:///{quote(str(self.state_dir / 'registry.db'))}"

    @property
    def limits(self) -> Limits:
        """The settings that the allocator needs."""
        return Limits(
            lease_max_s=self.leases.max_s,
            lease_idle_s=self.leases.idle_s,
            **self.queue.model_dump(exclude={"tenant_weights"}),
            tenant_weights=tuple(sorted(self.queue.tenant_weights.items())),
            wrappers_per_machine=self.wrappers.per_machine,
            kv_cache_bytes=None if self.wrappers.kv_cache_gib is None else self.wrappers.kv_cache_gib * 2**30,
            sticky_s=self.measurements.sticky_s,
        )


def differing(one: BaseModel, other: BaseModel) -> list[str]:
    """Return the names of the fields that differ in two settings of one class: ``section.field``."""
    names = []
    for name in type(one).model_fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, BaseModel) and type(a) is type(b):
            names += [f"{name}.{inner}" for inner in differing(a, b)]
        elif a != b:
            names.append(name)
    return names


def load_settings(path: Path, **overrides: Any) -> Settings:
    """Read a configuration file.

    Args:
        path: YAML file; empty: all defaults.
        overrides: top-level sections or fields that replace those of the file (merged one level deep).

    Raises:
        BadSettings: the file can't be read or is not YAML; the file or the environment has an unknown or invalid field;
            or the current directory does not exist. The text names the field and its source.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise BadSettings("current directory", f"can't be used ({error.strerror}): change to another one") from error
    data = _read(path)
    _require_known(path, data)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            data[key] = data[key] | value
        else:
            data[key] = value
    try:
        return Settings(**data)
    except ValidationError as error:
        raise _unusable(path, error) from error


def _read(path: Path) -> dict[Any, Any]:
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings(str(path), f"can't be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        # The error's own text quotes the line, which may contain the database's password.
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadSettings(str(path), f"is not YAML: {error.problem}, in line {line}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSettings(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadSettings(str(path), "must be a mapping of sections")
    return data


def _unusable(path: Path, error: ValidationError) -> BadSettings:
    """Convert pydantic's errors to one BadSettings that names the fields and the sources of their values."""
    problems = []
    for each in error.errors():
        where = each["loc"][:-1] if each["type"] == "missing" else each["loc"]
        problems.append((_source(path, where), _in_our_words(each["type"], each["loc"], each["msg"])))
    return _all_of(problems)


def _source(path: Path, field: Sequence[int | str]) -> str:
    """Return the source of a field's value: a variable, or the file and the variables that set parts of it."""
    names = [str(part) for part in field]
    for name, parts in variables(os.environ):
        if names[: len(parts)] == parts:
            return name
    return " and ".join(
        [str(path), *(name for name, parts in variables(os.environ) if names and parts[: len(names)] == names)]
    )


def _in_our_words(kind: str, field: Sequence[int | str], message: str) -> str:
    names = [str(part) for part in field]
    said = message.removeprefix("Value error, ")
    if kind == "missing":
        said = "is missing"
    elif kind == "extra_forbidden":
        said = "there is no such field" + did_you_mean(names[-1], fields_of(Settings, names[:-1]))
    return f"{'.'.join(names) or 'configuration'}: {said}"


def _all_of(problems: Sequence[tuple[str, str]]) -> BadSettings:
    """Return one error for all (source, problem); its text contains the first MOST_PROBLEMS."""
    (source, said), *others = problems[:MOST_PROBLEMS]
    said = "; ".join([said, *(problem if other == source else f"{other}: {problem}" for other, problem in others)])
    more = len(problems) - MOST_PROBLEMS
    return BadSettings(source, f"{said} (and {more} more)" if more > 0 else said)


def _require_known(path: Path, data: dict[Any, Any]) -> None:
    """Refuse unknown sections and empty texts in the file, and variables that are no valid settings.

    Pydantic would treat some section names as its own arguments.

    Raises:
        BadSettings: names these sections, fields and variables.
    """
    there = f"there is no such section; there are {', '.join(Settings.model_fields)}"
    problems = [(str(path), f"{key}: {there}") for key in data if key not in Settings.model_fields]
    problems += ((str(path), f"{name}: {EMPTY}") for name in empty_values(data))
    problems += problems_of(Settings, os.environ)
    if problems:
        raise _all_of(problems)


def url_host(host: str) -> str:
    """Return a host as in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
