"""Decides whether a model may run its own code (``trust_remote_code``); finds code and models from other places."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from deployments.models.small_files import CONFIG_BYTES, CONFIGS, read_small

_OWN_CLASS = re.compile(r"[A-Za-z0-9_]+(?:[/-][A-Za-z0-9_]+)*\.[A-Za-z_][A-Za-z0-9_]*")
"""``module.Class`` of the model's own folder. Not ``owner/repo--module.Class``, and no path that leads out of it."""


# D120: the code of a model is allowed by commit
def code_problem(
    located: str, revision: str | None, tokenizer_revision: str | None, allowed: Collection[str]
) -> str | None:
    """Return why a model may not run its own code; None if it may.

    Args:
        located: Its hub id, or the absolute path of its folder.
        revision: The revision that is loaded; None: the default branch.
        tokenizer_revision: The revision of its tokenizer; None: that of the model.
        allowed: The setting ``models.allow_remote_code``.
    """
    if Path(located).is_absolute():
        if located in allowed:
            return None
    elif commits := _commits(located, allowed):
        if revision not in commits:
            return (
                f"runs code that comes with the LLM, which is allowed only at the commit {' or '.join(commits)}; "
                "give it as args.deployment.revision"
            )
        if tokenizer_revision not in (None, revision):
            return "runs code that comes with the tokenizer, too; leave out args.deployment.tokenizer_revision"
        return None
    return "runs code that comes with the LLM, which is not allowed for this one; leave it out or ask the operator"


def _commits(model: str, allowed: Collection[str]) -> list[str]:
    pins = (entry.rpartition("@") for entry in allowed if not entry.startswith("/"))
    return sorted(commit for name, _, commit in pins if name == model)


# D121: code of another repository never runs
def foreign_code(folder: str) -> str | None:
    """Return why the code that a model's configuration names must not run; None if all of it is in its own folder.

    Reads all configurations in the folder and its subfolders: ``auto_map`` may be in those of the model, the tokenizer
    and the processors. May block on a slow disk.

    Raises:
        FileTooLarge: One of these files is too large to be read.
        OSError: One of them can't be read.
    """
    for file in sorted(file for pattern in CONFIGS for file in Path(folder).rglob(pattern)):
        try:
            config = json.loads(read_small(file, CONFIG_BYTES))
        except (ValueError, RecursionError):
            return f"{file.name} is not JSON, so it can't be checked which code it names"
        for reference in _references(config):
            if reference is not None and not (isinstance(reference, str) and _OWN_CLASS.fullmatch(reference)):
                return f"auto_map in {file.name} names {str(reference)[:200]!r}, which is not code of its own folder"
    return None


# D121: no other model is loaded in the place of the one that was named
def foreign_model(folder: str) -> str | None:
    """Return why a model's ``config.json`` would make the engine load something else; None if it would not.

    With ``speculators_config``, vLLM loads the model and tokenizer that this field names, a hub id or a path. With
    ``configuration_files``, transformers reads another file in place of ``config.json``, and it may have that field.
    None, too, if there is no ``config.json``. May block on a slow disk.

    Source: vllm/transformers_utils/config.py, ``maybe_override_with_speculators``.

    Raises:
        FileTooLarge: The file is too large to be read.
        OSError: It can't be read.
    """
    file = Path(folder) / "config.json"
    if not file.exists():
        return None
    try:
        config = json.loads(read_small(file, CONFIG_BYTES))
    except (ValueError, RecursionError):
        return "config.json is not JSON, so it can't be checked which model it names"
    for field in ("speculators_config", "configuration_files"):
        if isinstance(config, Mapping) and field in config:
            return f"{field} in config.json may name another model to load; name a model without this field"
    return None


def _references(config: object) -> Iterator[object]:
    """Yield the classes named by each ``auto_map``, at any depth of a configuration."""
    unread = [config]
    while unread:
        each = unread.pop()
        if isinstance(each, Mapping):
            if "auto_map" in each:
                yield from _leaves(each["auto_map"])
            unread.extend(each.values())
        elif isinstance(each, list):
            unread.extend(each)


def _leaves(value: object) -> Iterator[object]:
    unread = [value]
    while unread:
        each = unread.pop()
        if isinstance(each, Mapping):
            unread.extend(each.values())
        elif isinstance(each, list):
            unread.extend(each)
        else:
            yield each
