"""Maps the args of an llmconfig, written in Hugging Face's words or vLLM's own, to arguments of vLLM.

Words with an equivalent are translated, words without meaning on vLLM are dropped with a note, all others are refused
by name. The rules are in ``args.table``; this file applies them. It does not import vLLM, so that the ingress can check
an llmconfig at once. Null is the same as leaving a word out, as in transformers.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from deployments.models.args.rules import JSON, Dropped, Kind, Mapped, Refused, Rule
from deployments.models.args.table import DEPLOYMENT, PROMPTING, TASKS, Task
from deployments.models.remote_code import code_problem
from registry.core.records import LLMSpec
from registry.errors import InvalidField
from registry.wire.words import canonical_json

__all__ = [
    "JSON",
    "TASKS",
    "LLMArgs",
    "MappedArgs",
    "PromptArgs",
    "as_markdown",
    "map_deployment",
    "map_llmconfig",
    "map_prompting",
    "prompt_args",
    "task_of",
]

_DOCS = "docs/llm-args.md"
_TABLES: Mapping[str, Mapping[str, Rule]] = {"prompting": PROMPTING, "deployment": DEPLOYMENT}
_GPU_FACTORS = ("tensor_parallel_size", "pipeline_parallel_size")
# vLLM replaces a temperature between 0 (greedy) and this value by this value (sampling_params._MAX_TEMP).
_LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True, slots=True)
class MappedArgs:
    """Arguments in vLLM's words; ``notes`` says which of the client's words were translated or dropped."""

    values: Mapping[str, JSON]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptArgs:
    """What an llmconfig says about prompts: if the LLM answers with text, each prompt's body gets ``values``."""

    modeltyp: str
    task: Task
    uses_chat_template: bool
    values: Mapping[str, JSON]


@dataclass(frozen=True, slots=True)
class LLMArgs:
    """An llmconfig for vLLM: ``spec`` is the LLM to run, ``prompting`` is added to the body of every prompt."""

    spec: LLMSpec
    uses_chat_template: bool
    prompting: Mapping[str, JSON]
    notes: tuple[str, ...] = ()


def task_of(llmconfig: Mapping[str, object]) -> Task:
    """Return vLLM's task for an llmconfig that the ingress has accepted; text generation if it has no modeltyp."""
    modeltyp = llmconfig.get("modeltyp")
    return TASKS[modeltyp] if isinstance(modeltyp, str) else TASKS["text-generation"]


def prompt_args(llmconfig: str) -> PromptArgs:
    """Return what an llmconfig (JSON) that the ingress has accepted says about prompts.

    Raises:
        InvalidField: A word is refused here. The ingress that accepted it has another version.
    """
    given = json.loads(llmconfig)
    task, chat = task_of(given), bool(given.get("uses_chat_template"))
    values = map_prompting(given["args"]["prompting"], uses_chat_template=chat).values if task.generates else {}
    return PromptArgs(given.get("modeltyp", task.name), task, chat, values)


def map_prompting(args: Mapping[str, object], *, uses_chat_template: bool = True) -> MappedArgs:
    """Translate ``args.prompting`` to body fields of vLLM's /v1/completions and /v1/chat/completions.

    If ``uses_chat_template`` is False, words that only the chat endpoint supports are refused.

    Raises:
        InvalidField: A word is unknown or can't be done on vLLM, or a value is not allowed.
    """
    values, notes = _translate("prompting", args)
    for word in sorted(args):
        rule = PROMPTING[word]
        if isinstance(rule, Mapped) and rule.chat_only and rule.to in values and not uses_chat_template:
            raise InvalidField(f"args.prompting.{word}", "has no effect if uses_chat_template is false; leave it out")
    do_sample, temperature = values.pop("do_sample", None), values.get("temperature")
    if do_sample is False:
        for word in ("min_p", "temperature", "top_k", "top_p"):
            if values.pop(word, None) is not None:
                notes.append(f"args.prompting.{word} was dropped: do_sample is false, and greedy decoding ignores it")
        values["temperature"] = 0.0
        notes.append("args.prompting.do_sample was translated to temperature 0")
    elif do_sample and temperature == 0:
        raise InvalidField(
            "args.prompting.temperature",
            "0 means greedy decoding, but do_sample is true; raise temperature, or leave out both",
        )
    elif isinstance(temperature, float) and 0 < temperature < _LOWEST_TEMPERATURE:
        values["temperature"] = _LOWEST_TEMPERATURE
        notes.append(f"args.prompting.temperature was raised to {_LOWEST_TEMPERATURE}, vLLM's lowest value above 0")
    _check_order("prompting", args, values, "min_tokens", "max_tokens")
    return MappedArgs(values, tuple(notes))


def map_deployment(args: Mapping[str, object]) -> MappedArgs:
    """Translate ``args.deployment`` to fields of vLLM's EngineArgs, including ``revision``.

    Whether the LLM may run its own code (``trust_remote_code``) is not checked here.

    Raises:
        InvalidField: A word is unknown or not for clients, or a value is not allowed.
    """
    values, notes = _translate("deployment", args)
    if "pipeline_parallel_size" in values:
        values.setdefault("tensor_parallel_size", 1)
    _check_order("deployment", args, values, "max_num_seqs", "max_num_batched_tokens")
    return MappedArgs(values, tuple(notes))


def map_llmconfig(
    llmconfig: Mapping[str, object],
    *,
    field: str = "",
    located: str | None = None,
    allow_remote_code: Collection[str] = (),
) -> LLMArgs:
    """Translate a whole llmconfig. Equal meanings give equal results.

    The spec's fingerprint therefore does not depend on order or spelling. ``field`` is the place of the llmconfig in
    the client's body (``llms[0]``). ``located`` is the model's hub id or absolute folder (``ModelSources.locate``);
    with None the model is used as written, as a hub id. ``allow_remote_code`` is the setting: the code that models may
    bring. ``spec.gpus`` is the number of GPUs that the parallel sizes need. If they need at most one, it is 0, and the
    LLM uses all GPUs of its wrapper. Whether the model's source is allowed is not checked here.

    Raises:
        InvalidField: A field is missing or has an invalid value; its name begins with ``field``.
    """
    try:
        return _llm_args(llmconfig, located, allow_remote_code)
    except InvalidField as error:
        raise InvalidField(f"{field}.{error.field}" if field else error.field, error.problem) from None


def _llm_args(llmconfig: Mapping[str, object], located: str | None, allow_remote_code: Collection[str]) -> LLMArgs:
    task, model = _task(llmconfig.get("modeltyp")), _model(llmconfig.get("model"))
    uses_chat_template = llmconfig.get("uses_chat_template")
    if not isinstance(uses_chat_template, bool):
        raise InvalidField("uses_chat_template", f"is {_shown(uses_chat_template)}; give true or false")
    args = _object("args", llmconfig.get("args"))
    given = {section: _object(f"args.{section}", args.get(section)) for section in _TABLES}
    prompting = map_prompting(given["prompting"], uses_chat_template=uses_chat_template)
    deployment = map_deployment(given["deployment"])
    most, context = prompting.values.get("max_tokens"), deployment.values.get("max_model_len")
    if isinstance(most, int) and isinstance(context, int) and 0 < context < most:
        raise InvalidField(
            f"args.prompting.{_word_for('max_tokens', 'prompting', given['prompting'])}",
            f"is {most}, which is more than max_model_len {context}; lower it, or raise max_model_len",
        )
    if not task.generates:
        prompting = _without_meaning(prompting, task)
    engine = {**deployment.values, **dict(task.engine)}
    revision = _text(engine.pop("revision", None))
    if engine.get("trust_remote_code"):
        tokenizer_revision = _text(given["deployment"].get("tokenizer_revision"))
        problem = code_problem(located or model, revision, tokenizer_revision, allow_remote_code)
        if problem is not None:
            raise InvalidField("args.deployment.trust_remote_code", problem)
    gpus = math.prod(size for word in _GPU_FACTORS if isinstance(size := engine.get(word), int))
    spec = LLMSpec(
        model=model,
        modeltyp=task.name,
        revision=revision,
        engine_args=canonical_json(engine),
        gpus=gpus if gpus > 1 else 0,
    )
    return LLMArgs(spec, uses_chat_template, prompting.values, prompting.notes + deployment.notes)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _task(modeltyp: object) -> Task:
    task = TASKS.get(modeltyp) if isinstance(modeltyp, str) else None
    if task is None:
        raise InvalidField(
            "modeltyp", f"is {_shown(modeltyp)}; vLLM serves {', '.join(TASKS)}{_nearest(modeltyp, TASKS)}"
        )
    return task


def _model(model: object) -> str:
    good = isinstance(model, str) and 0 < len(model) <= 512 and model.isprintable() and model == model.strip()
    # vLLM would accept an address like s3://… and load from there.
    if not isinstance(model, str) or not good or "://" in model:
        raise InvalidField(
            "model", f"is {_shown(model)}; give the id of an LLM, like TinyLlama/TinyLlama-1.1B-Chat-v1.0"
        )
    return model


def _object(field: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise InvalidField(field, f"is {_shown(value)}; give an object, {{}} for none")
    return value


def _without_meaning(prompting: MappedArgs, task: Task) -> MappedArgs:
    """Return no prompting arguments, with a note if there were any: this LLM generates no text."""
    notes = (f"args.prompting was dropped: {task.name} writes no text",) if prompting.values else ()
    return MappedArgs({}, notes)


# --- the rules, carried out --------------------------------------------------------------------------------


def _translate(section: str, args: Mapping[str, object]) -> tuple[dict[str, JSON], list[str]]:
    """Translate the words of a section by their rules; the result does not depend on the order of ``args``."""
    values: dict[str, JSON] = {}
    source: dict[str, str] = {}
    notes: list[str] = []
    for word, rule, value in _given(section, args):
        field = f"args.{section}.{word}"
        match rule:
            case Mapped(to=to, kind=kind):
                read = _read(field, kind, value)
                if to in values and values[to] != read:
                    raise InvalidField(
                        field, f"differs from {source[to]}, but both are vLLM's {to}; give only one of them"
                    )
                values[to], source[to] = read, word
                if to != word:
                    notes.append(f"{field} was translated to {to}" + (f": {rule.caveat}" if rule.caveat else ""))
            case Dropped(why=why):
                notes.append(f"{field} has no meaning on vLLM and was dropped: {why}")
            case Refused(unless=unless) if unless in values:
                notes.append(f"{field} was dropped: {unless} is given and takes precedence")
            case Refused(neutral=neutral) if any(_same(value, item) for item in neutral):
                notes.append(f"{field} was dropped: {_shown(value)} has no effect")
            case Refused(why=why, neutral=neutral):
                only = f"; only {' or '.join(map(_shown, neutral))} is allowed" if neutral else ""
                raise InvalidField(field, f"is not possible: {why}{only}")
    for to, word in source.items():
        rule = _TABLES[section][word]
        if isinstance(rule, Mapped) and values[to] == rule.same_as_absent:
            del values[to]
    return values, notes


def _given(section: str, args: Mapping[str, object]) -> Iterator[tuple[str, Rule, object]]:
    """Yield the words that are not null with their rules, in a fixed order; refused words last."""
    table = _TABLES[section]
    if unknown := [str(word) for word in args if not isinstance(word, str) or word not in table]:
        raise _unknown(section, min(unknown))
    ordered = sorted(args, key=lambda word: (isinstance(table[word], Refused), word))
    yield from ((word, table[word], args[word]) for word in ordered if args[word] is not None)


def _unknown(section: str, word: str) -> InvalidField:
    shown = word if word.isidentifier() and len(word) <= 64 else _shown(word)
    elsewhere = next((other for other, table in _TABLES.items() if other != section and word in table), None)
    hint = f"; it belongs to args.{elsewhere}" if elsewhere else _nearest(word, _TABLES[section])
    return InvalidField(f"args.{section}.{shown}", f"is not a known argument{hint}; {_DOCS} lists all of them")


def _read(field: str, kind: Kind, value: object) -> JSON:
    read = kind.read(value)
    if read is not None:
        return read
    hint = _nearest(value, kind.words)
    if isinstance(value, str) and _unquoted(kind, value):
        hint = f", without quotes: {value.lower()}"
    raise InvalidField(field, f"is {_shown(value)}; give {kind.allowed}{hint}")


def _unquoted(kind: Kind, text: str) -> bool:
    """Whether ``text`` spells a number, true or false that would be allowed."""
    try:
        return len(text) <= 40 and kind.read(json.loads(text.lower())) is not None
    except (ValueError, RecursionError):
        return False


def _check_order(section: str, args: Mapping[str, object], values: Mapping[str, JSON], lower: str, upper: str) -> None:
    low, high = values.get(lower), values.get(upper)
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise InvalidField(
            f"args.{section}.{_word_for(lower, section, args)}",
            f"is {low}, which is more than {upper} {high}; lower it",
        )


def _word_for(to: str, section: str, args: Mapping[str, object]) -> str:
    """Return a word of the client that was translated to vLLM's ``to``."""
    rules = _TABLES[section]
    return next(word for word in sorted(args) if isinstance(rule := rules[word], Mapped) and rule.to == to)


def _same(value: object, other: JSON) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _nearest(value: object, words: Collection[str]) -> str:
    near = difflib.get_close_matches(value[:64], words, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: object) -> str:
    """Return a client's value as a short text on one line."""
    match value:
        case None:
            return "missing or null"
        case bool():
            return str(value).lower()
        case int() if abs(value) > 2**64:
            return "a number of more than 64 bits"
        case int() | float():
            return repr(value)
        case str() if len(value) > 64:
            return f"the text {value[:60]!r}…"
        case str():
            return f"the text {value!r}"
        case Mapping():
            return "an object" if value else "{}"
        case list():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


# --- the tables for people ---------------------------------------------------------------------------------


def as_markdown() -> str:
    """Return docs/llm-args.md; ``python -m deployments.models.args.mapping > docs/llm-args.md`` writes it."""
    parts = [_INTRODUCTION]
    parts += ["## modeltyp\n", "| modeltyp | served as | engine arguments |", "|---|---|---|"]
    parts += [
        f"| `{modeltyp}` | {task.name} | {', '.join(f'`{word}={value}`' for word, value in task.engine)} |"
        for modeltyp, task in TASKS.items()
    ]
    for section, table in _TABLES.items():
        parts += [
            f"\n## args.{section}\n\n### Taken\n",
            "| word | vLLM's word | allowed | remark |",
            "|---|---|---|---|",
        ]
        parts += [_taken(word, rule) for word, rule in table.items() if isinstance(rule, Mapped)]
        parts += ["\n### Dropped, with a note in the answer\n", "| words | why |", "|---|---|"]
        parts += _grouped({word: rule.why for word, rule in table.items() if isinstance(rule, Dropped)})
        parts += ["\n### Refused with 422\n", "| words | why |", "|---|---|"]
        parts += _grouped({word: _refusal(rule) for word, rule in table.items() if isinstance(rule, Refused)})
    return "\n".join(parts) + "\n"


_INTRODUCTION = """\
# The arguments of an llmconfig

Made from `deployments/models/args/table.py` by `python -m deployments.models.args.mapping`; a test keeps it current.

Arguments have the names of Hugging Face transformers or of vLLM (0.32). `null` is the same as leaving an argument out.
A name that is not listed here is refused; the error suggests the most similar one.

vLLM and transformers have different defaults:

| argument that is not given | vLLM | transformers |
|---|---|---|
| `do_sample`, `temperature` | samples as the LLM's `generation_config.json` says, else at 1 | greedy, by default |
| `top_k` | as `generation_config.json` says, else off | 50 |
| `max_new_tokens` | as `generation_config.json` says, else 16; with `uses_chat_template` all of the context | 20 |

Give `do_sample` and `max_new_tokens` if figures have to be comparable.
"""


def _taken(word: str, rule: Mapped) -> str:
    remarks = [rule.caveat] if rule.caveat else []
    if word == "do_sample":
        remarks.append("false is temperature 0, and temperature, top_p, top_k and min_p are dropped")
    if word == "trust_remote_code":
        remarks.append("true only for commits that the operator allows; `revision` names one")
    if rule.same_as_absent is not None:
        remarks.append(f"`{json.dumps(rule.same_as_absent)}` is the same as leaving it out")
    if rule.chat_only:
        remarks.append("only with uses_chat_template true")
    to = "temperature" if word == "do_sample" else rule.to
    return f"| `{word}` | `{to}` | {rule.kind.allowed} | {'; '.join(remarks)} |"


def _refusal(rule: Refused) -> str:
    neutral = f" (`{'`, `'.join(map(json.dumps, rule.neutral))}` is dropped)" if rule.neutral else ""
    return rule.why + (f" (ignored if {rule.unless} is given)" if rule.unless else "") + neutral


def _grouped(reasons: Mapping[str, str]) -> list[str]:
    """Return one table row for each reason, with all its words."""
    words: dict[str, list[str]] = {}
    for word, reason in reasons.items():
        words.setdefault(reason, []).append(f"`{word}`")
    return [f"| {', '.join(group)} | {reason} |" for reason, group in words.items()]


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
