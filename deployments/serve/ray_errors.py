"""Finds an error of ours inside the error that Ray delivers."""

from __future__ import annotations

from registry.errors import RegistryError


def own_error(error: Exception) -> RegistryError | None:
    """Return the RegistryError that a call of an actor or replica raised; None if it raised something else.

    Ray raises an error of a class that it creates, a subclass of RayTaskError and of the original error's class.
    The original error is its ``cause``.
    """
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, RegistryError) else None
