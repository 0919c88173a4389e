"""Writes checkpoints whose files have only headers and no weights, so that a test fails if code reads the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "U8": 1}

LLAMA: dict[str, object] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def write_checkpoint(
    folder: Path, config: Mapping[str, object], *files: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Path:
    """Write a folder with a ``config.json`` and safetensors files. ``tensors``: (type, shape) by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{n}.safetensors" for n in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        write_header(folder / name, tensors)
    if len(files) != 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write the header of a safetensors file: eight bytes of length, then JSON. Source: the format's README."""
    header: dict[str, object] = {}
    at = 0
    for name, (kind, shape) in tensors.items():
        size = BYTES[kind]
        for length in shape:
            size *= length
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
