from collections.abc import Iterator
from pathlib import Path

import pytest

from greenprompt_client.demo.tiny_llm import make_tiny_llm


@pytest.fixture(scope="package")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two tiny LLMs, a and b."""
    directory = tmp_path_factory.mktemp("llms")
    make_tiny_llm(directory / "a", seed=1)
    make_tiny_llm(directory / "b", seed=2)
    return directory


@pytest.fixture(scope="package", autouse=True)
def offline() -> Iterator[None]:
    """Nothing is looked for on a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
