"""Finds an error of ours inside the error that Ray delivers."""

from __future__ import annotations

from registry.errors import RegistryError


def own_error(error: Exception) -> RegistryError | None:
    """Return the RegistryError that a call of an actor or replica raised; None if it raised something else.

    Ray delivers it as the ``cause`` of an error of a class that Ray makes, which is a subclass of both.
    """
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, RegistryError) else None
