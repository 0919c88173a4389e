"""Decides which models may be deployed and where they are: Hugging Face ids, or folders below allowed roots."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.errors import InvalidField

_HUB_ID = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelSources:
    """The sources that the operator allows. ``roots`` and ``base_dir`` (the base of relative paths) are absolute."""

    huggingface: bool
    roots: tuple[Path, ...]
    base_dir: Path

    def locate(self, model: str, *, field: str = "model") -> str:
        """Return the engine's argument: the hub id unchanged, or the absolute path of a local model.

        A local path need not exist here, because the LLM Machine loads it.

        Raises:
            InvalidField: A path outside the allowed folders, an invalid id, or a kind of source that is not allowed.
        """
        path = self._path(model)
        if path is not None and any(_below(path, root) for root in self.roots):
            return str(path)
        # An id that is also an existing folder is refused: vLLM would load the folder, which is not allowed.
        if path is None or not _HUB_ID.fullmatch(model) or os.path.exists(path) or os.path.exists(model):  # noqa: PTH110 - never raises
            raise InvalidField(field, f"{model!r} is neither a Hugging Face id nor below {_listed(self.roots)}")
        if not self.huggingface:
            raise InvalidField(field, f"{model!r}: Hugging Face ids are not allowed here, only {_listed(self.roots)}")
        return model

    def _path(self, model: str) -> Path | None:
        """Return ``model`` read as a path; None if it can't be one."""
        if not model.isprintable():
            return None
        try:
            return Path(os.path.normpath(self.base_dir / Path(model).expanduser()))
        except RuntimeError:  # ~name, and no user has that name
            return None


def _below(path: Path, root: Path) -> bool:
    # Check the path as written and with links resolved: a link must not lead out of the root.
    return (
        path.is_relative_to(root)
        and path != root
        and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    )


def _listed(roots: Sequence[Path]) -> str:
    return "an allowed folder (" + (", ".join(map(str, roots)) or "none is configured") + ")"
