"""Which models may be deployed, and where they lie: ids of the Hugging Face hub, or folders below allowed roots."""

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
    """The operator's choice. ``roots`` and ``base_dir`` (what relative paths are relative to) are absolute."""

    huggingface: bool
    roots: tuple[Path, ...]
    base_dir: Path

    def locate(self, model: str, *, field: str = "model") -> str:
        """What to hand to the engine: the hub id as it is, or the absolute path of a local model.

        A local path need not exist here: it is the LLM Machine that loads it.

        Raises:
            InvalidField: a path outside the allowed folders, an id that is none, or a kind that is not allowed.
        """
        path = self._path(model)
        if path is not None and any(_below(path, root) for root in self.roots):
            return str(path)
        # vLLM takes an id for a path where there is such a folder: then it must be an allowed one.
        if path is None or not _HUB_ID.fullmatch(model) or os.path.exists(path) or os.path.exists(model):  # noqa: PTH110 - never raises
            raise InvalidField(field, f"{model!r} is neither a Hugging Face id nor below {_listed(self.roots)}")
        if not self.huggingface:
            raise InvalidField(field, f"{model!r}: Hugging Face ids are not allowed here, only {_listed(self.roots)}")
        return model

    def _path(self, model: str) -> Path | None:
        """The path that this is, taken as one; None when it can't be one."""
        if not model.isprintable():
            return None
        try:
            return Path(os.path.normpath(self.base_dir / Path(model).expanduser()))
        except RuntimeError:  # ~somebody, and nobody has that name
            return None


def _below(path: Path, root: Path) -> bool:
    # Both as written and with links followed: a link must not lead out of the root.
    return (
        path.is_relative_to(root)
        and path != root
        and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    )


def _listed(roots: Sequence[Path]) -> str:
    return "an allowed folder (" + (", ".join(map(str, roots)) or "none is configured") + ")"
