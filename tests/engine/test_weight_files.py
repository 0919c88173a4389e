"""The weight files that we count, hash and read ahead are those that vLLM's loader opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.weight_folders import FOLDERS, Files

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("files", "load_format", "loaded"), FOLDERS)
def test_vllm_loads_these(tmp_path: Path, files: Files, load_format: str, loaded: Sequence[str]) -> None:
    """What the unit test of ``weights_of`` expects is what vLLM itself chooses."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    for name, content in files.items():
        (tmp_path / name).write_text(content)
    loader = DefaultModelLoader(LoadConfig(load_format=load_format))
    _, chosen, _, _ = loader._prepare_weights(str(tmp_path), None, None, True, None)
    assert sorted(Path(file).name for file in chosen) == loaded
