"""Settings for models: which may be deployed, which of them may run their own code, and what prompts may load."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from registry.energy_settings import Section

_HUB_ID = r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?"
_PINNED = re.compile(rf"{_HUB_ID}@[0-9a-f]{{40}}", re.ASCII)
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")


class ModelSettings(Section):
    """Which models may be deployed, which of them may run their own code, and which media prompts may load."""

    huggingface: bool = Field(True, description="Whether models of the Hugging Face hub are allowed")
    local_roots: tuple[Path, ...] = Field((), description="Folders that contain the local models that are allowed")
    allow_remote_code: tuple[str, ...] = Field(
        (),
        description="Models whose own code may run (trust_remote_code): `owner/model@commit` with all 40 digits of the "
        "commit, or the absolute path of a local model's folder",
    )
    cache_dir: Path | None = Field(
        None, description="Folder for models of the hub, on the local disk of every machine; null: as HF_HUB_CACHE says"
    )
    cache_max_gib: float | None = Field(
        None, gt=0, description="Limit of cache_dir, GiB: the models used least recently are removed; null: no limit"
    )
    allowed_media_domains: tuple[str, ...] = Field(
        (),
        description="Hosts from which LLM Machines may load images, audio and video that prompts name by http(s) URL",
    )
    media_max_mib: Annotated[int, Field(ge=1)] = Field(
        32,
        description="Largest image, audio or video of a prompt, MiB: length of its `data:` URL or size of its download",
    )

    @field_validator("local_roots")
    @classmethod
    def _absolute_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(Path(os.path.normpath(absolute(root))) for root in roots)

    @field_validator("cache_dir")
    @classmethod
    def _absolute_cache(cls, path: Path | None) -> Path | None:
        return None if path is None else absolute(path)

    @field_validator("allow_remote_code")
    @classmethod
    def _pinned_code(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_code_entry, entries))

    @field_validator("allowed_media_domains")
    @classmethod
    def _plain_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"{host!r} is no host: write the whole name in small letters, without scheme, port, path or *, "
                    "as in images.example.com"
                )
        return hosts

    @model_validator(mode="after")
    def _limits_its_own(self) -> ModelSettings:
        if self.cache_max_gib is not None and self.cache_dir is None:
            raise ValueError("cache_max_gib needs cache_dir: nothing is removed from a cache that other programs use")
        return self


# D120: the code of a model is allowed by commit
def _code_entry(entry: str) -> str:
    """Return an entry of ``allow_remote_code``, with a path made absolute. Raises ValueError with the remedy."""
    if entry.startswith(("/", "~")):
        return os.path.normpath(absolute(Path(entry)))
    if _PINNED.fullmatch(entry):
        return entry
    model, at, commit = entry.partition("@")
    problem = f"{commit!r} is no commit" if at else "it names no commit, so its authors could change the code that runs"
    raise ValueError(
        f"{entry!r}: {problem}. Read the model's code at one commit, then write {model}@<commit> with all 40 digits of "
        f"it (0-9, a-f); `git ls-remote` of its repository prints the newest. For a local model, "
        "write the absolute path of its folder"
    )


def absolute(path: Path) -> Path:
    """Return the absolute path, with ``~`` resolved: other processes have other current directories.

    Raises:
        ValueError: The path contains a NUL character, or names a home directory that does not exist.
    """
    if "\0" in str(path):
        raise ValueError("a path can't contain a NUL character")
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home directory") from error
