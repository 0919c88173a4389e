"""Hostile checkpoints that only vLLM can judge: their start fails, nothing of them runs, and nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.host import EngineHost
from tests.engine.calls import complete
from tests.engine.host.started import failure, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


def config(**changed: Any) -> Callable[[Path], object]:
    """A configuration with these fields changed."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    code = f"cposix\nsystem\n(S'touch {folder.parent}/executed'\ntR."
    (folder / "pytorch_model.bin").write_bytes(code.encode())


def _overlap(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]
    header[tensors[0]] = header[tensors[1]]
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_pickle, id="weights that are a pickle (GHSA-rh4j-5rhw-hr54)"),
        pytest.param(_overlap, id="overlapping tensors"),
        pytest.param(config(num_hidden_layers=-1), id="layers below 0"),
        pytest.param(config(vocab_size=10**12), id="a vocabulary of 10^12"),
        pytest.param(config(num_attention_heads=0), id="0 heads"),
        pytest.param(config(quantization_config={"quant_method": "os.system"}), id="an unknown quantization"),
        pytest.param(config(auto_map={"AutoConfig": "own.C"}, model_type="own"), id="code (GHSA-8fr4-5q9j-m8gm)"),
    ],
)
async def test_a_hostile_checkpoint_does_not_start(
    host: EngineHost, llms: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """The reason is told, without a stack trace; the next LLM starts."""
    folder = tmp_path / "llm"
    shutil.copytree(llms / "a", folder)
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()")
    change(folder)
    error = await failure(host, folder)
    assert error.reason
    assert "Traceback (most recent" not in error.reason
    assert not (tmp_path / "executed").exists()


async def test_an_llm_starts_after_all_of_them(host: EngineHost, llms: Path) -> None:
    """The host is as before."""
    assert await complete(await start(host, llms / "a"))
