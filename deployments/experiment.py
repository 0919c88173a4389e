"""What ``greenprompt measure`` is to do: the experiment's file, its prompts, and the order of its LLMs."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from registry.api import MAX_LLMS_PER_REQUEST, GpuType, LLMArgs, LLMConfig, NonEmpty
from registry.errors import BadSettings
from registry.state import canonical_json
from registry.strict_yaml import load_json, load_yaml

MAX_CONCURRENCY = 1024
"""Most prompts at once: a thread each."""


def _all_different(llms: tuple[LLMConfig, ...]) -> tuple[LLMConfig, ...]:
    for n, llm in enumerate(llms):
        if llm in llms[:n]:
            raise ValueError(f"{llm.model} is there twice with the same args; repetitions ask an LLM again")
    return llms


class Experiment(BaseModel):
    """Every LLM is asked every prompt, in each repetition. Paths are relative to the current directory.

    An LLM is a model's name, or an llmconfig of the API; what it does not say is taken from ``modeltyp``,
    ``uses_chat_template`` and ``args``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modeltyp: NonEmpty = "text-generation"
    uses_chat_template: StrictBool = True
    args: LLMArgs = LLMArgs(prompting={}, deployment={})
    llms: Annotated[
        tuple[LLMConfig, ...], Field(min_length=1, max_length=MAX_LLMS_PER_REQUEST), AfterValidator(_all_different)
    ]
    prompts: Path = Field(description='JSONL, a line each: {"id": optional, "question"}')
    output: Path = Field(description="Folder of the results; the same experiment goes on there")
    repetitions: int = Field(1, ge=1, description="How often each LLM is asked each prompt, by a lease of its own")
    concurrency: int = Field(
        1,
        ge=1,
        le=MAX_CONCURRENCY,
        description="Prompts in flight; the joules of one of several at once are its share, an estimate",
    )
    warmup: int = Field(2, ge=0, description="Prompts of each lease before those that count")
    seed: int = Field(1, description="Of the order of LLMs")
    gpu_type: GpuType | None = Field(None, description="GPUs that the machine must have; null: any or none")
    grade: NonEmpty | None = Field(
        None, description="measurement: the registry sees to a quiet machine; null: not said"
    )
    prompt_timeout_s: float = Field(900, gt=0, description="Longest wait for an answer, longer than prompt_max_s")
    url: str = Field("http://127.0.0.1:8000", description="Base URL of the registry")

    @field_validator("llms", mode="before")
    @classmethod
    def _complete(cls, llms: Any, info: ValidationInfo) -> Any:
        """Each LLM with what it does not say itself."""
        if not isinstance(llms, list):
            return llms
        shared = {name: info.data[name] for name in ("modeltyp", "uses_chat_template", "args") if name in info.data}
        own = ({"model": llm} if isinstance(llm, str) else llm for llm in llms)
        return [shared | llm if isinstance(llm, dict) else llm for llm in own]


class Prompt(BaseModel):
    """One line of a prompts file."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    id: Annotated[str, StringConstraints(min_length=1)]
    question: Annotated[StrictStr, StringConstraints(min_length=1)]


@dataclass(frozen=True, slots=True)
class Plan:
    """An experiment with its prompts. ``llms`` are its llmconfigs by name: the model, numbered where there are more."""

    experiment: Experiment
    prompts: tuple[Prompt, ...]
    llms: Mapping[str, dict[str, Any]]

    @property
    def answers(self) -> int:
        """How many answers count when all is done."""
        return len(self.llms) * len(self.prompts) * self.experiment.repetitions

    def order(self, repetition: int) -> list[str]:
        """The LLMs of a repetition (from 1) in the order in which they are asked for: shuffled, by the seed alone."""
        names = sorted(self.llms)
        random.Random(f"{self.experiment.seed}/{repetition}").shuffle(names)
        return names

    def identity(self) -> dict[str, Any]:
        """All that makes it this experiment and no other, as plain JSON; where it runs and writes is no part of it."""
        said = self.experiment.model_dump(
            mode="json", include={"repetitions", "concurrency", "warmup", "seed", "gpu_type", "grade"}
        )
        asked = canonical_json({prompt.id: prompt.question for prompt in self.prompts})
        prompts = {"count": len(self.prompts), "sha256": hashlib.sha256(asked.encode(errors="replace")).hexdigest()}
        return {"llms": dict(self.llms), "prompts": prompts, **said}


def load_plan(path: Path | None, **overrides: Any) -> Plan:
    """The experiment of a file (None: of the overrides alone), with fields put over those of the file, and its prompts.

    Raises:
        BadSettings: the experiment or its prompts can't be used; it names the file and the field or line.
    """
    source = "the experiment" if path is None else str(path)
    data = {} if path is None else _yaml(path)
    try:
        experiment = Experiment.model_validate(data | overrides)
    except ValidationError as error:
        raise BadSettings(source, _first(error)) from None
    return Plan(experiment, load_prompts(experiment.prompts), _named(experiment.llms))


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file; without an ``id`` a prompt has the number of its line. Raises BadSettings."""
    prompts: dict[str, Prompt] = {}
    # Not splitlines(): it also ends lines at characters that JSON has inside of texts.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = load_json(line)
            prompt = Prompt.model_validate({"id": str(number), **data} if isinstance(data, dict) else data)
        except ValidationError as error:
            raise BadSettings(str(path), f"line {number}: {_first(error)}") from None
        except ValueError as error:
            raise BadSettings(str(path), f"line {number} is not JSON: {error}") from None
        if prompt.id in prompts:
            raise BadSettings(str(path), f"line {number}: id: {prompt.id!r} is another prompt's, too")
        prompts[prompt.id] = prompt
    if not prompts:
        raise BadSettings(str(path), "holds no prompts")
    return tuple(prompts.values())


def differences(there: Mapping[str, Any], asked: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """In which fields two identities differ, and how, in words."""
    for name in sorted({*there, *asked}):
        old, new = there.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{within}{name}.")
        elif old != new or (name in there) != (name in asked):
            yield f"{within}{name} is {_said(there, name)} there and {_said(asked, name)} here"


def _said(identity: Mapping[str, Any], name: str) -> str:
    return json.dumps(identity[name]) if name in identity else "absent"


def _named(llms: Sequence[LLMConfig]) -> dict[str, dict[str, Any]]:
    often = Counter(llm.model for llm in llms)
    seen: Counter[str] = Counter()
    named = {}
    for llm in llms:
        seen[llm.model] += 1
        name = llm.model if often[llm.model] == 1 else f"{llm.model}#{seen[llm.model]}"
        named[name] = llm.model_dump(mode="json")
    return named


def _yaml(path: Path) -> dict[str, Any]:
    try:
        data = load_yaml(_text(path))
    except yaml.YAMLError as error:
        raise BadSettings(str(path), f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BadSettings(str(path), "must be a mapping of fields")
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadSettings(str(path), f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadSettings(str(path), f"is not UTF-8: {error}") from None


def _first(error: ValidationError) -> str:
    """The first problem, with its field."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}{more}" if field else f"{first['msg']}{more}"
