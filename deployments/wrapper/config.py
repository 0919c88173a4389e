"""The configuration of a wrapper, set when it is created."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deployments.models.sources import ModelSources
from registry.settings import EnergySettings, ModelSettings, WrapperSettings


@dataclass(frozen=True, slots=True)
class WrapperConfig:
    """The configuration of a wrapper, set when it is created.

    ``gpus``: number of GPUs that Ray assigns to the wrapper. ``cache_dir`` is absolute.
    ``finish_prompts``: prompts in flight are not cut when their lease expires. ``on_machine``:
    number of wrappers that share the machine, including this one. ``hosts``: the host names that are served.
    """

    wrapper_id: str
    gpus: int
    settings: WrapperSettings
    energy: EnergySettings
    sources: ModelSources
    cache_dir: Path
    models: ModelSettings = field(default_factory=ModelSettings)
    finish_prompts: bool = False
    on_machine: int = 1
    hosts: tuple[str, ...] = ()
