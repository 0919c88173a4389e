"""Tries a checkpoint's tokenizer and chat template in a process with limits, before they are used for prompts.

Both contain code by the checkpoint's author that runs in the wrapper's process; code that never ends would block the
wrapper and its lease. The trial checks only that they return, not what they return.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

# D85: a checkpoint is tried within limits
WALL_S: Final = 20.0
"""Time limit of the trial, seconds; a large tokenizer takes one or two seconds."""

IMPORT_S: Final = 120.0
"""Added to the limit if the process has to import vLLM first, seconds."""

CPU_S: Final = 20
"""Limit of processor time, seconds."""

MEMORY_BYTES: Final = 4 * 2**30
"""Limit of address space, bytes, beyond what the process uses when the trial begins."""

_USER: Final = {"role": "user", "content": "What does a prompt cost?"}
_SYSTEM: Final = {"role": "system", "content": "Be brief."}
_ASSISTANT: Final = {"role": "assistant", "content": "Some joules."}
_TOOL: Final = {"type": "function", "function": {"name": "joules", "parameters": {"type": "object", "properties": {}}}}
_CHATS: Final = (
    ([_USER], None),
    ([_SYSTEM, _USER], None),
    ([_USER, _ASSISTANT, _USER], None),
    ([_USER], [_TOOL]),
)
"""The most common kinds of chat, as (messages, tools); a template may have a branch for each."""
_SUFFIXES: Final = (".json", ".jinja", ".model", ".txt", ".py")

log = structlog.get_logger("deployments.engine.checkpoint_trial")

Run = Callable[[Callable[[], str | None]], str | None]
"""Calls a function in a separate process and returns its result, within a time limit.

The limit is WALL_S, plus IMPORT_S if the process has to import vLLM.

Raises:
    TimeoutError: It did not end in time.
    RuntimeError: The process ended without an answer.
"""


class TrialFailed(Exception):
    """The tokenizer or chat template of a checkpoint can't be used; the text says why."""


class Tokenizer(NamedTuple):
    """The tokenizer in ``folder``, at ``revision``. ``own_code``: it may bring its own Python code."""

    folder: str
    revision: str | None = None
    own_code: bool = False


def tokenizer_of(model: str, revision: str | None, engine_args: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer for these vLLM engine arguments; None if no code of the checkpoint runs for it."""
    if engine_args.get("skip_tokenizer_init") or engine_args.get("tokenizer_mode") == "mistral":
        return None
    own_code = bool(engine_args.get("trust_remote_code"))
    return Tokenizer(engine_args.get("tokenizer") or model, revision, own_code)


class CheckpointTrial:
    """Tries each tokenizer until it has passed once, and again if its files have changed."""

    def __init__(self) -> None:
        self._passed: set[tuple[Tokenizer, tuple[tuple[str, int], ...]]] = set()

    def passes(self, tokenizer: Tokenizer, run: Run, limit_s: float = WALL_S) -> None:
        """Check that a tokenizer and its chat template end within the limits. Blocks; see ``Run``.

        ``limit_s``: the time limit of ``run``, seconds; the error names it.

        Raises:
            TrialFailed: They do not end within the limits, or the process that tries them ends.
        """
        key = tokenizer, _stamp(tokenizer.folder)
        if key in self._passed:
            return
        what = "its tokenizer and chat template"
        try:
            problem = run(partial(attempt, tokenizer, CPU_S, MEMORY_BYTES))
        except TimeoutError:
            problem = f"do not end within {limit_s:g} s"
        except RuntimeError as error:
            problem = f"end the process that tries them, or take more than {CPU_S} s of processor time: {error}"
        if problem is not None:
            raise TrialFailed(f"{what} {problem}")
        self._passed.add(key)


def _stamp(folder: str) -> tuple[tuple[str, int], ...]:
    """Return name and modification time of the files that may belong to a tokenizer; empty if this is not a folder."""
    try:
        files = [file for file in Path(folder).iterdir() if file.suffix in _SUFFIXES]
        return tuple(sorted((file.name, file.stat().st_mtime_ns) for file in files))
    except OSError:
        return ()


def _limit(cpu_s: int, memory_bytes: int) -> None:
    """Limit the processor time (then the kernel kills this process) and the memory that it may use from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    last_s = int(used.ru_utime + used.ru_stime) + cpu_s
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most_bytes = pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (last_s, last_s))
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def attempt(tokenizer: Tokenizer, cpu_s: int, memory_bytes: int) -> str | None:
    """Load the tokenizer, render chats with its template and tokenize them; runs in the process with limits.

    Returns:
        None if all of it ends; else the problem. An exception other than MemoryError is no problem
        here, because vLLM, or the first prompt, reports it better.
    """
    from vllm.tokenizers import get_tokenizer

    _limit(cpu_s, memory_bytes)
    try:
        loaded: Any = get_tokenizer(tokenizer.folder, revision=tokenizer.revision, trust_remote_code=tokenizer.own_code)
        loaded.encode(_USER["content"])
        for messages, tools in _CHATS if getattr(loaded, "chat_template", None) else ():
            _write(loaded, messages, tools)
    except MemoryError:
        return f"take more than {memory_bytes / 2**30:g} GiB of memory"
    except Exception as error:
        log.info("a tokenizer's trial ended with an error", folder=tokenizer.folder, reason=str(error))
    return None


def _write(tokenizer: Any, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> None:
    """Render one chat and tokenize it. A template may reject one kind of chat and accept others. Raises MemoryError."""
    try:
        tokenizer.encode(
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        )
    except MemoryError:
        raise
    except Exception as error:
        log.info("a chat template refuses a chat", roles=[each["role"] for each in messages], reason=str(error))
