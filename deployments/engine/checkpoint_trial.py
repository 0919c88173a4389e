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
from types import MappingProxyType
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

TEMPLATE_CHARS: Final = 256 * 1024
"""Longest chat template, characters. Real ones have less than 50,000. vLLM parses a template in its event loop."""


class Chat(NamedTuple):
    """A chat, its tools, and further arguments of its rendering."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    more: Mapping[str, Any] = MappingProxyType({})


_USER: Final = {"role": "user", "content": "What does a prompt cost?"}
_SYSTEM: Final = {"role": "system", "content": "Be brief."}
_ASSISTANT: Final = {"role": "assistant", "content": "Some joules.", "reasoning_content": "They ask for a cost."}
_TOOL: Final = {"type": "function", "function": {"name": "joules", "parameters": {"type": "object", "properties": {}}}}
_CALL: Final = {"id": "call12345", "type": "function", "function": {"name": "joules", "arguments": {"of": "a prompt"}}}
_CALLED: Final[list[dict[str, Any]]] = [
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "joules", "tool_call_id": "call12345", "content": "7"},
]
_PARTS: Final = {"role": "user", "content": [{"type": "text", "text": "What does a prompt cost?"}]}
_LONG: Final = {"role": "user", "content": "What does a prompt cost? " * 400}
_CHATS: Final = (
    Chat([_USER]),
    Chat([_SYSTEM, _USER]),
    Chat([_USER, _ASSISTANT, _USER]),
    Chat([_USER], [_TOOL]),
    Chat([_USER, *_CALLED], [_TOOL]),
    Chat([_SYSTEM, *[_USER, _ASSISTANT] * 16, _USER]),
    Chat([_LONG]),
    Chat([_PARTS]),
    Chat([{"role": "developer", "content": "Be brief."}, _USER]),
    Chat([_USER, _ASSISTANT], None, {"add_generation_prompt": False}),
    Chat([_USER], None, {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    Chat([_USER], None, {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}),
    Chat([_USER], None, {"documents": [{"title": "Costs", "text": "Seven joules."}]}),
)
"""The most common kinds of chat; a template may have a branch for each."""

_TEXTS: Final = tuple(
    piece * (2000 // len(piece)) for piece in ("a", " ", "0", "\n", "a ", "!?", "\u00e4", "\U0001f600")
)
"""Texts for which a regular expression of the tokenizer may take very long."""

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
        for text in (_USER["content"], *_TEXTS):
            loaded.encode(text)
        templates = _templates(loaded)
        longest = max(map(len, templates), default=0)
        if longest > TEMPLATE_CHARS:
            return f"can't be used: the template has {longest:,} characters, and at most {TEMPLATE_CHARS:,} are read"
        for chat in _CHATS if templates else ():
            _write(loaded, chat)
    except MemoryError:
        return f"take more than {memory_bytes / 2**30:g} GiB of memory"
    except Exception as error:
        log.info("a tokenizer's trial ended with an error", folder=tokenizer.folder, reason=str(error))
    return None


def _templates(tokenizer: Any) -> list[str]:
    """Return the chat templates of a tokenizer. It may have one, or several by name."""
    found = getattr(tokenizer, "chat_template", None) or ()
    return [text for text in (found.values() if isinstance(found, dict) else (found,)) if isinstance(text, str)]


def _write(tokenizer: Any, chat: Chat) -> None:
    """Render one chat and tokenize it. A template may reject one kind of chat and accept others. Raises MemoryError."""
    arguments = {"tokenize": False, "add_generation_prompt": True, **chat.more}
    try:
        tokenizer.encode(tokenizer.apply_chat_template(chat.messages, tools=chat.tools, **arguments))
    except MemoryError:
        raise
    except Exception as error:
        log.info("a chat template refuses a chat", roles=[each["role"] for each in chat.messages], reason=str(error))
