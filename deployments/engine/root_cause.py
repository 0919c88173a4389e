"""Finds the error that ended an engine among those that its processes have logged."""

from __future__ import annotations

from typing import Final

_RECORD, _FIELD = "\x1e", "\x1f"  # characters that no error message contains
ERROR_FORMAT: Final = f"{_RECORD}%(message)s{_FIELD}"
"""Format of an error in the log file; its traceback follows."""
_TRACEBACK = "Traceback (most recent call last):"
_GENERAL_TYPES = ("ValueError", "RuntimeError", "Exception", "OSError", "ValidationError")


def root_cause(errors: str) -> str | None:
    """Return the error that ended an engine, from all errors that its processes have logged.

    That is the first error whose message says that an engine failed to start, else the first of all:
    vLLM's later errors only say that another process failed.

    Args:
        errors: Records in ERROR_FORMAT: separator, message, separator, traceback.

    Returns:
        The message of the exception, with its type if that is informative; None if there is no traceback.
    """
    causes = []
    for record in errors.split(_RECORD)[1:]:
        message, _, traceback = record.partition(_FIELD)
        if _TRACEBACK in traceback:
            causes.append(("failed to start" in message, _exception_text(traceback)))
    if not causes:
        return None
    return next((text for decisive, text in causes if decisive), causes[0][1])


def _exception_text(traceback: str) -> str:
    """Return the text after the last frame of a traceback."""
    lines = traceback.rstrip().splitlines()
    last_frame = max(index for index, line in enumerate(lines) if line.startswith("  File ") or _TRACEBACK in line)
    words = [line for line in lines[last_frame + 1 :] if not line.startswith("    ")]
    kind, separator, text = "\n".join(words).partition(": ")
    name = kind.rpartition(".")[2]
    return text if separator and name in _GENERAL_TYPES else name + separator + text
