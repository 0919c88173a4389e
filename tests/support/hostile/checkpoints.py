"""Hostile checkpoints: what the files in a model's folder may be, and what must come of it before an engine starts."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deployments.models.folder import MOST_FILES
from deployments.models.small_files import CONFIG_BYTES, INDEX_BYTES, MOST_SHARDS
from tests.support.checkpoint_files import LLAMA, write_checkpoint

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TENSORS: Final = {"model.layers.0.w": ("BF16", (64, 64)), "lm_head.weight": ("BF16", (64, 64))}
SECRET: Final = "a secret of the operator"
"""Content of the file ``secret.txt`` beside the folder with the models."""

Change = Callable[[Path], object]


@dataclass(frozen=True)
class HostileCheckpoint:
    """A folder with a model. ``change`` is made to the files of a sound one.

    ``refused``: a pattern in the reason of the failed start. None: the engine has to judge it, and gets it.
    ``source``: the advisory after which it is made, else the sort of attack.
    """

    name: str
    source: str
    change: Change
    refused: str | None
    engine_args: str = "{}"
    code_allowed: bool = True
    """Whether the operator allows code of this folder."""

    def write(self, folder: Path) -> None:
        """Write the folder."""
        write_checkpoint(folder, LLAMA, TENSORS)
        self.change(folder)


def text(name: str, content: str | bytes) -> Change:
    """A file with this content."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changed: Any) -> Change:
    """A configuration with these fields changed."""
    return text(CONFIG, json.dumps({**LLAMA, **changed}))


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(name: str, target: str) -> Change:
    """A link in the place of a file."""
    return instead(name, lambda path: path.symlink_to(target))


def header(content: object, *, length: int | None = None, data: bytes = b"") -> Change:
    """Weights with this header, whose length may be said falsely."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text(WEIGHTS, (len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def tensor(*offsets: Any, dtype: Any = "BF16", shape: Any = (2,), name: str = "model.layers.0.w") -> Change:
    """Weights with one tensor."""
    return header({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def index(weight_map: Any, *files: str) -> Change:
    """An index of weights, and links from these files to the sound weights."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-0.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for file in files:
            (folder / file).symlink_to("model-0.safetensors")

    return change


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            unix.bind(path.name)
        finally:
            os.chdir(here)


def _many(folder: Path) -> None:
    for number in range(MOST_FILES + 1):
        (folder / f"f{number}").touch()


def _both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def _row(name: str, source: str, change: Change, refused: str | None = None, **more: Any) -> HostileCheckpoint:
    return HostileCheckpoint(name, source, change, refused, **more)


def _code(name: str, reference: Any, file: str = CONFIG) -> HostileCheckpoint:
    changed = {**LLAMA, "auto_map": {"AutoModel": reference}}
    return _row(
        name, "GHSA-8fr4-5q9j-m8gm", text(file, json.dumps(changed)), f"its code may not run: auto_map in {file} names",
        engine_args='{"trust_remote_code":true}',
    )  # fmt: skip


_TOO_LARGE, _ODD, _OUT = "its weights take", "is no regular file", "is a link that leads out of models.local_roots"

CONFIGS = [
    _row("a configuration of a list", "own: type", text(CONFIG, "[]")),
    _row("a configuration of text", "own: type", text(CONFIG, '"llama"')),
    _row("a configuration of a number", "own: type", text(CONFIG, "1e999")),
    _row("a configuration of null", "own: type", text(CONFIG, "null")),
    _row("a configuration of nothing", "own: type", text(CONFIG, "{}")),
    _row("an empty configuration", "own: form", text(CONFIG, ""), "config.json is not JSON"),
    _row("a configuration that breaks off", "own: form", text(CONFIG, '{"model_type": "lla'), "config.json is not JSON"),
    _row("a configuration of zero bytes", "own: form", text(CONFIG, b"\0" * 1000), "config.json is not JSON"),
    _row("a configuration in UTF-32 without its mark", "own: form", text(CONFIG, json.dumps(LLAMA).encode("utf-32-be"))),
    _row("a configuration of bytes that are no text", "own: form", text(CONFIG, b'{"model_type": "\xff\xfe"}'), "config.json is not JSON"),
    _row("a configuration 100000 deep", "own: depth", text(CONFIG, "[" * 100_000), "config.json is not JSON"),
    _row("a configuration with objects 900 deep", "own: depth", text(CONFIG, '{"text_config":' * 900 + "1" + "}" * 900)),
    _row("a configuration of 8 MiB and a byte", "own: size", text(CONFIG, b" " * (CONFIG_BYTES + 1)), "its config.json has 8,388,609 bytes"),
    _row("a configuration of a tokenizer of 8 MiB and a byte", "own: size", text("tokenizer_config.json", b" " * (CONFIG_BYTES + 1)), "its tokenizer_config.json has 8,388,609 bytes"),
    _row("a generation_config of 8 MiB and a byte", "own: size", text("generation_config.json", b" " * (CONFIG_BYTES + 1)), "its generation_config.json has 8,388,609 bytes"),
    _row("a chat template of 8 MiB and a byte", "GHSA-6fvq-23cw-5628", text("chat_template.jinja", b" " * (CONFIG_BYTES + 1)), "its chat_template.jinja has 8,388,609 bytes"),
    _row("fields of 20000 characters", "own: size", config(model_type="l" * 20_000)),
    _row("a million unknown fields", "own: size", text(CONFIG, json.dumps({f"f{number}": 1 for number in range(300_000)}))),
    _row("not-a-number for a size", "own: number", text(CONFIG, json.dumps(LLAMA).replace("64", "NaN"))),
    _row("infinity for a size", "own: number", text(CONFIG, json.dumps(LLAMA).replace("64", "-Infinity"))),
    _row("layers below 0", "own: number", config(num_hidden_layers=-(2**63))),
    _row("10^12 layers", "own: number", config(num_hidden_layers=10**12), _TOO_LARGE),
    _row("10^400 layers", "own: number", config(num_hidden_layers=10**400)),
    _row("layers of 5000 digits", "own: number", text(CONFIG, '{"num_hidden_layers": ' + "9" * 5000 + "}"), "config.json is not JSON"),
    _row("layers of text", "own: type", config(num_hidden_layers="2")),
    _row("layers of true", "own: type", config(num_hidden_layers=True)),
    _row("0 heads", "own: number", config(num_attention_heads=0)),
    _row("10^300 positions", "own: number", config(max_position_embeddings=10**300)),
    _row("10^14 positions", "own: number", config(max_position_embeddings=10**14), _TOO_LARGE),
    _row("heads of 10^14", "own: number", config(head_dim=10**14), _TOO_LARGE),
    _row("a vocabulary of 10^30", "own: number", config(vocab_size=10**30)),
    _row("a window of layers of 0", "own: number", config(sliding_window=4, sliding_window_pattern=0)),
    _row("a window below 0", "own: number", config(sliding_window=-4)),
    _row("a model_type of a list", "own: type", config(model_type=["llama"])),
    _row("a model_type of an object", "own: type", config(model_type={"a": 1})),
    _row("a model_type of a path", "own: path", config(model_type="../../etc")),
    _row("architectures of code", "own: code", config(architectures=["__import__('os').system('id')"])),
    _row("layer_types of objects", "own: type", config(layer_types=[{}, {}])),
    _row("layer_types of lists", "own: type", config(layer_types=[[], []])),
    _row("layer_types of text", "own: type", config(layer_types="full_attention")),
    _row("rope of a kind of a list", "own: type", config(rope_scaling={"rope_type": ["longrope"]})),
    _row("rope of a kind of an object", "own: type", config(rope_parameters={"type": {}})),
    _row("rope of 10^400 positions", "own: number", config(rope_scaling={"rope_type": "longrope", "original_max_position_embeddings": 10**400})),
    _row("rope of text", "own: type", config(rope_scaling="linear")),
    _row("a dtype of an object", "own: type", config(dtype={"a": 1})),
    _row("a dtype of code", "own: code", config(dtype="os.system")),
    _row("tied embeddings of text", "own: type", config(tie_word_embeddings="no")),
    _row("a text_config of a list", "own: type", config(text_config=[LLAMA])),
    _row("a quantization of text", "own: quantization", config(quantization_config="fp8")),
    _row("a quantization of a list", "own: quantization", config(quantization_config=["fp8"])),
    _row("a quantization by an object", "own: quantization", config(quantization_config={"quant_method": {"a": 1}})),
    _row("a quantization by an unknown method", "own: quantization", config(quantization_config={"quant_method": "os.system", "kv_cache_scheme": "x"})),
    _row("a quantization of 10^400 bits", "own: quantization", config(quantization_config={"quant_method": "gptq", "bits": 10**400})),
    _row("another model to load", "own: model", config(speculators_config={"verifier": {"name_or_path": "/etc"}}), "speculators_config in config.json"),
    _row("another configuration to load", "own: model", config(configuration_files=["../x.json"]), "configuration_files in config.json"),
    _row("absurd defaults of answers", "own: default", text("generation_config.json", json.dumps({"max_new_tokens": 10**30, "temperature": -1, "num_beams": 10**9, "stop_strings": ["a"] * 9999}))),
    _row("an adapter of another model", "own: adapter", text("adapter_config.json", json.dumps({"base_model_name_or_path": "/etc", "peft_type": "LORA", "r": 10**9}))),
]  # fmt: skip

WEIGHT_FILES = [
    _row("a header of 2^63 bytes", "own: length", header({}, length=2**63)),
    _row("a header of 2^64 - 1 bytes", "own: length", header({}, length=2**64 - 1)),
    _row("a header of 0 bytes", "own: length", header({}, length=0)),
    _row("a header longer than the file", "own: length", header({}, length=10_000)),
    _row("weights of nothing", "own: length", text(WEIGHTS, b"")),
    _row("weights of three bytes", "own: length", text(WEIGHTS, b"\1\0\0")),
    _row("a header that is no JSON", "own: form", header(b"{'a': 1}")),
    _row("a header of a list", "own: form", header([1, 2])),
    _row("a header of objects 100000 deep", "own: depth", header(b'{"a":' * 100_000)),
    _row("a tensor of text", "own: type", header({"model.layers.0.w": "BF16"})),
    _row("overlapping tensors", "own: offset", header({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [2, 6]}}, data=b"123456")),
    _row("offsets below 0", "own: offset", tensor(-(2**62), -8)),
    _row("offsets that run backwards", "own: offset", tensor(2**62, 0)),
    _row("offsets of 10^400", "own: offset", tensor(0, 10**400)),
    _row("offsets of 2^62", "own: offset", tensor(0, 2**62), _TOO_LARGE),
    _row("offsets with fractions", "own: offset", tensor(0.5, 1e300)),
    _row("offsets of not-a-number", "own: offset", header(b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, NaN]}}')),
    _row("offsets of text", "own: offset", tensor("0", "4")),
    _row("three offsets", "own: offset", tensor(0, 4, 8)),
    _row("a type of a list", "own: type", tensor(0, 4, dtype=["BF16"])),
    _row("an unknown type", "own: type", tensor(0, 4, dtype="torch.load")),
    _row("a shape below 0", "own: number", tensor(0, 4, shape=(-1, 2**62))),
    _row("a shape of text", "own: type", tensor(0, 4, shape="xy")),
    _row("a tensor of a layer of 5000 digits", "own: number", tensor(0, 4, name=f"model.layers.{'9' * 5000}.w")),
    _row("a tensor of the name of a path", "own: path", tensor(0, 4, name="../../etc/passwd")),
    _row("an index of a list", "own: type", index([1])),
    _row("an index of null", "own: type", index(None)),
    _row("an index of numbers", "own: type", index({"model.layers.0.w": 7})),
    _row("an index that names a file elsewhere", "own: path", index({"model.layers.0.w": "../../secret.txt"})),
    _row("an index that names an absolute path", "own: path", index({"model.layers.0.w": "/etc/passwd"})),
    _row("an index that names files that are not there", "own: path", index({"model.layers.0.w": "model-7.safetensors"})),
    _row("an index that names tensors that are not there", "own: path", index({"x": "model-0.safetensors"})),
    _row("an index of too many files", "own: size", index({f"t{number}": f"model-{number}.safetensors" for number in range(MOST_SHARDS + 1)}), "its weights are in 2049 files"),
    _row("an index above 64 MiB", "own: size", _both(lambda folder: (folder / WEIGHTS).unlink(), text(INDEX, b" " * (INDEX_BYTES + 1))), "its model.safetensors.index.json has 67,108,865 bytes"),
    _row("weights that are a pickle", "CVE-2025-32434", _both(lambda folder: (folder / WEIGHTS).unlink(), text("pytorch_model.bin", b"cposix\nsystem\n(S'touch executed'\ntR."))),
    _row("a pickle beside the weights", "GHSA-rh4j-5rhw-hr54", text("model.pt", b"cposix\nsystem\n(S'touch executed'\ntR.")),
    _row("a GGUF file beside the weights", "CVE-2025-0315", text("model.gguf", b"GGUF" + b"\xff" * 60)),
]  # fmt: skip

KINDS = [
    *(
        _row(f"a named pipe for {name}", "own: pipe", instead(name, os.mkfifo), f"its file {name} {_ODD}")
        for name in (CONFIG, WEIGHTS, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "x.bin", "modeling_x.py")
    ),
    *(
        _row(f"/dev/{device} for {name}", "own: device", link(name, f"/dev/{device}"), f"its file {name} {_ODD}")
        for device, name in (("zero", CONFIG), ("zero", WEIGHTS), ("full", "tokenizer.json"), ("tty", "generation_config.json"))
    ),
    _row("a socket for the configuration", "own: socket", instead(CONFIG, _bind), f"its file {CONFIG} {_ODD}"),
    _row("a folder for the configuration", "own: folder", instead(CONFIG, Path.mkdir), "its files can't be read"),
    _row("a folder for the weights", "own: folder", instead(WEIGHTS, Path.mkdir)),
    _row("a folder for the tokenizer", "own: folder", instead("tokenizer.json", Path.mkdir)),
    *(
        _row(f"a link out of the folder for {name}", "own: link", link(name, "../../secret.txt"), f"its file {name} {_OUT}")
        for name in (CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja", "README.md")
    ),
    _row("a link to /etc/passwd", "own: link", link("chat_template.jinja", "/etc/passwd"), _OUT),
    _row("a link to the environment of the process", "own: link", link("chat_template.jinja", "/proc/self/environ"), _OUT),
    _row("a link to a folder of the system", "own: link", link("1_Pooling", "/proc"), _OUT),
    _row("a link out of a subfolder", "own: link", _both(lambda folder: (folder / "1_Pooling").mkdir(), link("1_Pooling/config.json", "../../../secret.txt")), _OUT),
    _row("a link to itself", "own: link", link("tokenizer.json", "tokenizer.json")),
    _row("a configuration that is a link to itself", "own: link", link(CONFIG, CONFIG)),
    _row("a link to nothing", "own: link", link("tokenizer.json", "gone")),
    _row("a folder that is a link to the one above", "own: link", link("1_Pooling", "..")),
    _row("more than 10000 files", "own: size", _many, "more than 10000 files"),
    _row("a link to a file of the same folder", "own: link", link("tokenizer.json", CONFIG)),
]  # fmt: skip

CODE = [
    _code("code of another repository", "other/repo--modeling.Own"),
    _code("code of another repository for the tokenizer", "other/repo--tokenization.Own", "tokenizer_config.json"),
    _code("code of a folder above", "../modeling.Own"),
    _code("code of an absolute path", "/tmp/modeling.Own"),
    _code("code of a number", 7),
    _code("code of an address", "https://evil.example/modeling.Own"),
    _code("code with a line break", "modeling\n.Own"),
    _code("code in a list", [None, "other/repo--modeling.Own"]),
    _code("code in an object", {"a": {"b": "other/repo--modeling.Own"}}),
    _row("code that is not allowed", "GHSA-2pc9-4j83-qjmr", config(auto_map={"AutoModel": "modeling.Own"}), "trust_remote_code runs code", engine_args='{"trust_remote_code":true}', code_allowed=False),
]  # fmt: skip

ROWS = [*CONFIGS, *WEIGHT_FILES, *KINDS, *CODE]
NAMES: Final[Mapping[str, HostileCheckpoint]] = {row.name: row for row in ROWS}
