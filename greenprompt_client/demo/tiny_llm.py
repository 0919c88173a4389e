"""Makes tiny LLMs that run anywhere, for the demo and the tests, without a download.

A tiny LLM is a Llama with about 0.15 million random parameters and its own byte-level tokenizer. It answers any text
with nonsense, but passes through every step of a real LLM. ``python -m greenprompt_client.demo.tiny_llm DIRECTORY …``
makes some.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_MARK = "tiny_llm.json"  # written last: a directory that has it is complete
_FORMAT = 1  # increase it if a change below changes the files
_VOCABULARY, _CONTEXT, _HIDDEN, _INNER, _LAYERS, _HEADS = 512, 2048, 64, 128, 2, 2
_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"  # tokens 0, 1 and 2
_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "max_position_embeddings": _CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SENTENCES = (
    "What does a prompt cost the climate, and on which LLM?",
    "The registry hands a machine to one measurement at a time and takes it back when the lease ends.",
    "Every joule is either measured by a hardware counter or labelled as an estimate.",
    "A warm LLM answers at once; a cold one is loaded first, and the client is told how far it is.",
    "Nobody waits while a wrapper is idle that could serve them.",
    "user: assistant: system: please explain the carbon intensity of the grid in a few words.",
)


def make_tiny_llm(path: str | Path, *, seed: int = 0) -> Path:
    """Make the tiny LLM of this seed at ``path``, unless it exists already.

    The same seed gives the same files; other seeds give other weights and another tokenizer. A directory of an
    interrupted run or another seed at ``path`` is replaced. Blocks for about a second.

    Args:
        path: Directory to create, with its parents.
        seed: Any integer ≥ 0.

    Returns:
        ``path``, as a Path.

    Raises:
        FileExistsError: ``path`` exists and is not a tiny LLM, so replacing it could destroy something.
    """
    target = Path(path)
    wanted = {"format": _FORMAT, "seed": seed}
    if _mark_of(target) == wanted:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / "llm"
        _save(made, seed)
        (made / _MARK).write_text(json.dumps(wanted), encoding="utf-8")
        if target.exists():
            _check_ours(target)
            shutil.rmtree(target)
        made.rename(target)
    return target


def _mark_of(target: Path) -> object:
    try:
        return json.loads((target / _MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _check_ours(target: Path) -> None:
    """Raise FileExistsError if a directory contains files that don't belong to a tiny LLM."""
    ours = {
        _MARK, "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    if not target.is_dir() or any(entry.name not in ours for entry in target.iterdir()):
        raise FileExistsError(f"{target} exists and is not a tiny LLM; choose another directory or remove it")


def _save(directory: Path, seed: int) -> None:
    # Does not use torch and transformers: importing them takes ten times as long as everything here.
    directory.mkdir()
    random = np.random.default_rng(seed)
    # Ten times the usual standard deviation: random weights then clearly prefer some tokens, so that a greedy answer
    # is the same at any batch size.
    weights = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else random.normal(0.0, 0.2, shape).astype(np.float32)
        for name, shape in _shapes().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", _CONFIG)
    _write_json(
        directory / "generation_config.json", {key: _CONFIG[key] for key in _CONFIG if key.endswith("token_id")}
    )
    _save_tokenizer(directory, seed)


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor, in a fixed order."""
    layer = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_HIDDEN, _HIDDEN),
        "self_attn.v_proj": (_HIDDEN, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for index in range(_LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}


def _save_tokenizer(directory: Path, seed: int) -> None:
    """Save a byte-level BPE tokenizer: encoding and decoding any UTF-8 text leaves it unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    first = seed % len(_SENTENCES)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*_SENTENCES, *[_SENTENCES[first]] * 3], trainer)
    bpe.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BOS,
            "eos_token": _EOS,
            "pad_token": _PAD,
            "model_max_length": _CONTEXT,
        },
    )
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def main(paths: list[str]) -> int:
    """Make a tiny LLM at every path; its seed is computed from the last part of the path."""
    if not paths:
        print("usage: python -m greenprompt_client.demo.tiny_llm DIRECTORY …", file=sys.stderr)
        return 2
    for path in paths:
        print(make_tiny_llm(path, seed=zlib.crc32(Path(path).name.encode())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
