"""The plan of ``greenprompt measure``: the experiment's file, its prompts, and the order of its LLMs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from greenprompt_client.measure.prompt_files import Prompt, load_prompts, read_text
from registry.errors import BadSettings
from registry.strict_yaml import load_yaml
from registry.wire.http import base_url_of
from registry.wire.schemas import (
    MAX_ID,
    MAX_LLMS_PER_REQUEST,
    Budget,
    GpuType,
    LLMArgs,
    LLMConfig,
    NonEmpty,
    TenantName,
)
from registry.wire.words import POOLING_TYPES, Grade, Priority, canonical_json

MAX_CONCURRENCY = 1024
"""Most concurrent prompts: each needs a thread."""

_OPTIONS = {"llms": "--llm MODEL", "prompts": "--prompts FILE", "output": "--output FOLDER"}
"""Options of ``greenprompt measure`` for the fields that every experiment needs."""

MAX_REPETITIONS = 10_000
MAX_WARMUP = 10_000
MAX_PROMPT_TIMEOUT_S = 7 * 86_400.0

# D88: an experiment may grow
GROWS = ("llms", "prompts", "repetitions")
"""Fields that may grow in an experiment that has begun. All other fields in ``Plan.identity`` must stay the same."""


def _all_different(llms: tuple[LLMConfig, ...]) -> tuple[LLMConfig, ...]:
    for n, llm in enumerate(llms):
        if llm in llms[:n]:
            raise ValueError(f"{llm.model} occurs twice with the same args; use repetitions to ask an LLM again")
    return llms


def _writes_text(llm: LLMConfig) -> LLMConfig:
    if llm.modeltyp in POOLING_TYPES:
        raise ValueError(f"{llm.modeltyp} writes no text, but greenprompt measure needs answers to prompts")
    return llm


def _a_path(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("give a path that is not empty")
    return value


def _sendable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which can't be sent") from None
    return text


def _a_base_url(text: str) -> str:
    try:
        base_url_of(text)
    except BadSettings as error:
        raise ValueError(str(error)) from None
    return text


_Name = Annotated[NonEmpty, AfterValidator(_sendable)]
_LLM = Annotated[LLMConfig, AfterValidator(_writes_text)]
_Path = Annotated[Path, BeforeValidator(_a_path)]


class Experiment(BaseModel):
    """Every LLM answers every prompt in each repetition. Paths are relative to the current directory.

    An LLM is a model name or an llmconfig of the API; missing fields are taken from ``modeltyp``,
    ``uses_chat_template`` and ``args``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modeltyp: _Name = "text-generation"
    uses_chat_template: StrictBool = True
    args: LLMArgs = LLMArgs(prompting={}, deployment={})
    llms: Annotated[
        tuple[_LLM, ...], Field(min_length=1, max_length=MAX_LLMS_PER_REQUEST), AfterValidator(_all_different)
    ]
    prompts: _Path = Field(
        description='File: JSONL or a JSON array; of texts in quotes, or of objects with "question" and perhaps "id"'
    )
    question_field: NonEmpty = Field("question", description="Field of a prompt that contains the question")
    output: _Path = Field(description="Folder for the results; the same experiment continues there")
    repetitions: StrictInt = Field(
        1, ge=1, le=MAX_REPETITIONS, description="How often each LLM answers each prompt; one lease per repetition"
    )
    concurrency: StrictInt = Field(
        1,
        ge=1,
        le=MAX_CONCURRENCY,
        description="Number of prompts in flight; if > 1, the joules of a prompt are its estimated share of a total",
    )
    warmup: StrictInt = Field(2, ge=0, le=MAX_WARMUP, description="Warm-up prompts per lease; they are not counted")
    seed: StrictInt = Field(1, ge=0, le=MAX_ID, description="Random seed for the order of the LLMs")
    measurement_id: StrictInt | None = Field(None, gt=0, le=MAX_ID, description="null: a new one")
    tenant: TenantName | None = Field(None, description="Name of the tenant; null: default")
    priority: Priority | None = Field(None, description="low, normal or high within the tenant; null: normal")
    gpu_type: GpuType | None = Field(None, description="GPUs that the machine must have; null: no condition")
    grade: Grade | None = Field(None, description="measurement: warm LLM, machine at rest; null: standard")
    like: _Name | None = Field(
        None, description="Id of an earlier request; LLM, software and kind of machine must be the same"
    )
    max_joules: Budget | None = Field(None, description="Energy that each lease may use, joules; null: no limit")
    max_gco2eq: Budget | None = Field(
        None, description="Emissions that each lease may cause, grams CO2eq; null: no limit"
    )
    prompt_timeout_s: StrictInt | StrictFloat = Field(
        900,
        gt=0,
        le=MAX_PROMPT_TIMEOUT_S,
        description="Maximum wait for an answer, seconds; should be more than prompt_max_s",
    )
    url: Annotated[str, AfterValidator(_a_base_url)] = Field(
        "http://127.0.0.1:8000", description="Base URL of the registry"
    )

    @field_validator("llms", mode="before")
    @classmethod
    def _complete(cls, llms: Any, info: ValidationInfo) -> Any:
        """Complete each LLM with the shared fields."""
        if not isinstance(llms, list):
            return llms
        shared = {name: info.data[name] for name in ("modeltyp", "uses_chat_template", "args") if name in info.data}
        own = ({"model": llm} if isinstance(llm, str) else llm for llm in llms)
        return [shared | llm if isinstance(llm, dict) else llm for llm in own]


@dataclass(frozen=True, slots=True)
class Plan:
    """An experiment with its prompts.

    ``llms`` maps names (the model, numbered if it occurs several times) to llmconfigs. ``orders`` are the LLM orders of
    repetitions that an earlier run has begun.
    """

    experiment: Experiment
    prompts: tuple[Prompt, ...]
    llms: Mapping[str, dict[str, Any]]
    orders: Mapping[int, Sequence[str]] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """Number of counted answers when everything is done."""
        return len(self.llms) * len(self.prompts) * self.experiment.repetitions

    def order(self, repetition: int) -> list[str]:
        """Return the LLMs of a repetition (from 1) in the order of their use: shuffled by the seed.

        A repetition that has begun keeps its order; added LLMs follow at its end.
        """
        names = sorted(self.llms)
        random.Random(f"{self.experiment.seed}/{repetition}").shuffle(names)
        begun = [name for name in self.orders.get(repetition, ()) if name in self.llms]
        return begun + [name for name in names if name not in begun]

    def going_on(self, llms: Mapping[str, Mapping[str, Any]], orders: Mapping[int, Sequence[str]]) -> Plan:
        """Return the plan with the names and orders of an earlier run."""
        return replace(self, llms=_named(self.experiment.llms, llms), orders=orders)

    def identity(self) -> dict[str, Any]:
        """Return the fields that define the experiment, as plain JSON.

        Paths, URL, tenant, priority, budgets and timeouts are not among them.
        """
        said = self.experiment.model_dump(
            mode="json", include={"repetitions", "concurrency", "warmup", "seed", "gpu_type", "grade", "like"}
        )
        questions = {prompt.id: prompt.question for prompt in self.prompts}
        sha256 = hashlib.sha256(canonical_json(questions).encode()).hexdigest()
        return {"llms": dict(self.llms), "prompts": {"count": len(questions), "sha256": sha256}, **said}


def load_plan(
    path: Path | None,
    *,
    prompting_args: Mapping[str, Any] | None = None,
    deployment_args: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Plan:
    """Return the experiment of a file (None: only the overrides), with ``overrides`` applied, and its prompts.

    ``prompting_args`` and ``deployment_args`` override single arguments in the ``args`` of every LLM.

    Raises:
        BadSettings: The experiment or its prompts are invalid; names the file and the field or line.
    """
    source = "the experiment" if path is None else str(path)
    data = ({} if path is None else _yaml(path)) | overrides
    for section, values in (("prompting", prompting_args), ("deployment", deployment_args)):
        if values:
            data["args"] = _with_args(data.get("args", {"prompting": {}, "deployment": {}}), section, values)
            if isinstance(data.get("llms"), list):
                data["llms"] = [_llm_with_args(llm, section, values) for llm in data["llms"]]
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        raise BadSettings(source, _first(error)) from None
    prompts = load_prompts(experiment.prompts, experiment.question_field)
    return Plan(experiment, prompts, _named(experiment.llms))


def _with_args(args: Any, section: str, values: Mapping[str, Any]) -> Any:
    """Return args with values added to one of their two sections; invalid args are returned unchanged."""
    if isinstance(args, LLMArgs):
        args = args.model_dump()
    if not isinstance(args, dict) or not isinstance(args.get(section, {}), dict):
        return args
    return args | {section: args.get(section, {}) | values}


def _llm_with_args(llm: Any, section: str, values: Mapping[str, Any]) -> Any:
    return llm | {"args": _with_args(llm["args"], section, values)} if isinstance(llm, dict) and "args" in llm else llm


def arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of several ``word=value`` texts. Raises BadSettings, also for a duplicate word."""
    said: dict[str, Any] = {}
    for word, value in map(argument, texts):
        if word in said:
            raise BadSettings(word, "occurs twice")
        said[word] = value
    return said


def argument(text: str) -> tuple[str, Any]:
    """Return the word and the value of ``word=value``; the value is parsed as YAML. Raises BadSettings."""
    word, equals, value = text.partition("=")
    if not word or not equals:
        raise BadSettings(text, "give an argument as word=value, as in max_new_tokens=64")
    try:
        return word, load_yaml(value)
    except yaml.YAMLError as error:
        raise BadSettings(text, getattr(error, "problem", None) or " ".join(str(error).split())) from None


def growth(there: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was added to an experiment that has begun, as text."""
    for name in GROWS:
        old, new = there.get(name), asked.get(name)
        if name == "llms":
            old, new = len(old or ()), len(new or ())
        if name == "prompts":
            old, new = (old or {}).get("count"), (new or {}).get("count")
        if old != new:
            yield f"{name}: {old} → {new}"


def identity_differences(there: Mapping[str, Any], asked: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Yield the differences between two identities, as text; growth that is allowed is no difference."""
    for name in sorted({*there, *asked}):
        old, new = there.get(name), asked.get(name)
        if within == "llms." and name not in there:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from identity_differences(old, new, f"{within}{name}.")
        elif not within and name == "repetitions" and isinstance(old, int) and isinstance(new, int):
            if new < old:
                yield f"repetitions is {old} in the folder and {new} now"
        elif old != new or (name in there) != (name in asked):
            yield f"{within}{name} is {_said(there, name)} in the folder and {_said(asked, name)} now"


def _said(identity: Mapping[str, Any], name: str) -> str:
    return json.dumps(identity[name]) if name in identity else "absent"


def _named(
    llms: Sequence[LLMConfig], known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return llmconfigs by name. Known ones keep their names; a second one of the same model is called ``model#2``."""
    known = known or {}
    named: dict[str, dict[str, Any]] = {}
    for llm in llms:
        config = llm.model_dump(mode="json")
        name = next((name for name, other in known.items() if other == config), None)
        number = 1
        while name is None:
            tried = llm.model if number == 1 else f"{llm.model}#{number}"
            name = None if tried in named or tried in known else tried
            number += 1
        named[name] = config
    return named


def _yaml(path: Path) -> dict[str, Any]:
    try:
        data = load_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise BadSettings(str(path), f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BadSettings(str(path), "must be a mapping of fields")
    if odd := [name for name in data if not isinstance(name, str)]:
        raise BadSettings(str(path), f"{odd[0]!r} is not the name of a field")
    return data


def _first(error: ValidationError) -> str:
    """Return the first problem, with its field; if fields of the experiment are missing, all of them."""
    found = error.errors()
    if absent := [str(each["loc"][0]) for each in found if each["type"] == "missing" and len(each["loc"]) == 1]:
        options = " ".join(_OPTIONS[name] for name in absent)
        are = "is missing" if len(absent) == 1 else "are missing"
        return f"{', '.join(absent)} {are}: add to the command {options}, or name an experiment file that has them"
    first = found[0]
    field = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}{more}" if field else f"{first['msg']}{more}"
