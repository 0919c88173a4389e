"""Folders of models, and the weight files in them that vLLM loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

Files: TypeAlias = Mapping[str, str]
"""The contents of files, by name."""

SHARDS = ["model-1.safetensors", "model-2.safetensors"]
OWN = ["consolidated-1.safetensors", "consolidated-2.safetensors"]


def _index(*files: str) -> str:
    return json.dumps({"weight_map": {f"weight{number}": file for number, file in enumerate(files)}})


_INDEX: Files = {"model.safetensors.index.json": _index(*SHARDS)}
_OWN_INDEX: Files = {"consolidated.safetensors.index.json": _index(*OWN)}
_BOTH: Files = {**dict.fromkeys([*SHARDS, *OWN], "weights"), **_INDEX, **_OWN_INDEX}

FOLDERS: Final[Sequence[tuple[Files, str, Sequence[str]]]] = [
    (dict.fromkeys([*SHARDS, "a.bin"], "weights"), "auto", SHARDS),
    ({**dict.fromkeys([*SHARDS, "other.safetensors"], "weights"), **_INDEX}, "auto", SHARDS),
    (dict.fromkeys(["a.bin", "a.pt", "training_args.bin"], "weights"), "auto", ["a.bin"]),
    (dict.fromkeys(["._model.safetensors", "model.safetensors"], "weights"), "auto", ["model.safetensors"]),
    (dict.fromkeys(["a.pt", "optimizer.pt"], "weights"), "auto", ["a.pt"]),
    (_BOTH, "auto", OWN),
    (_BOTH, "mistral", OWN),
    (_BOTH, "safetensors", SHARDS),
    ({"consolidated.safetensors": "weights"}, "auto", ["consolidated.safetensors"]),
    ({"consolidated.safetensors": "weights", "model.safetensors": "w"}, "auto", ["consolidated.safetensors"]),
    ({**dict.fromkeys([*OWN, "consolidated.safetensors"], "weights"), **_OWN_INDEX}, "auto", OWN),
]
"""Examples: files of a folder, ``load_format``, and the sorted names of the files that vLLM loads."""
