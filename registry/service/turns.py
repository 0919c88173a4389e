"""Finds reports of a wrapper, and results of commands, that are older than the newest command to it."""

from __future__ import annotations

from registry.core.commands import Effect


class Turns:
    """Counts the commands to each wrapper, and holds the newest command while it is in progress."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        """By wrapper: number of commands sent to it, plus the number of times that it was created."""
        self._in_progress: dict[str, Effect] = {}
        """By wrapper: its newest command, while in progress; dropped when the wrapper is created again."""

    def commanded(self, effect: Effect) -> None:
        """Record a new command to a wrapper: results of earlier commands are out of date now."""
        self._count(effect.wrapper_id)
        self._in_progress[effect.wrapper_id] = effect

    # D47: a command's result does not count for a wrapper that was created later
    def created(self, wrapper_id: str) -> None:
        """Record that a wrapper is created (again): results of earlier commands are out of date now."""
        self._count(wrapper_id)
        self._in_progress.pop(wrapper_id, None)

    def ended(self, effect: Effect) -> None:
        """Record that a command has ended. Ignored if it was superseded."""
        if self.is_newest(effect):
            del self._in_progress[effect.wrapper_id]

    def is_newest(self, effect: Effect) -> bool:
        """True while this command is in progress and no newer one has superseded it."""
        return self._in_progress.get(effect.wrapper_id) is effect

    def quiet(self, wrapper_id: str, own: Effect | None = None) -> int | None:
        """Return the wrapper's command count, or None while a command other than ``own`` is in progress.

        If equal before and after a call, no other command was in progress in between. Superseded commands are ignored:
        they may end long afterwards, and their result changes nothing.
        """
        in_progress = self._in_progress.get(wrapper_id)
        return self._counts.get(wrapper_id, 0) if in_progress in (None, own) else None

    def _count(self, wrapper_id: str) -> None:
        self._counts[wrapper_id] = self._counts.get(wrapper_id, 0) + 1
