"""How much memory an LLM takes at least, from what its checkpoint says: weights, and the KV cache of one sequence.

Counted as vLLM 0.32 does, and always downwards: activations, CUDA graphs and rounding to blocks come on top. What a
checkpoint does not tell, or what depends on more than it tells, is None: not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from registry.core.records import LLMMemory

GPU_SHARE: Final = 0.92
"""What vLLM 0.32 takes of a GPU's memory unless told otherwise (``CacheConfig.gpu_memory_utilization``)."""

_FLOAT_BYTES: Final[Mapping[str, int]] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that vLLM converts to the LLM's dtype when it loads a checkpoint that is not quantized."""

_DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
_KV_DTYPE_BYTES: Final[Mapping[str, int]] = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}

_LAYER: Final = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.")
_HEAD: Final = re.compile(r"(?:language_model\.)?lm_head\.")

_PLAIN_ATTENTION: Final = frozenset(
    {
        "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe", "internlm2",
        "internlm3", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
        "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "stablelm", "starcoder2",
    }
)  # fmt: skip
"""``model_type`` of LLMs that keep keys and values of every layer, and nothing else; others may do otherwise."""

_LATENT_ATTENTION: Final = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2"})
"""``model_type`` of LLMs that keep one latent vector per layer (MLA), whole on each GPU of a tensor-parallel group."""

_WINDOW_PATTERN: Final[Mapping[str, int]] = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""Every n-th layer looks at the whole context, where ``config.json`` leaves the number to transformers' default."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says of itself.

    ``config`` is its ``config.json``. ``body`` and ``head`` are bytes by safetensors' type (``BF16`` …): of the
    weights that are always loaded, and of the language-modelling head, which some LLMs do without.
    """

    config: Mapping[str, Any]
    body: Mapping[str, int] = field(default_factory=dict)
    head: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the config that describes the text LLM of a multimodal one, else all of it."""
        return text_config(self.config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that describes the text LLM."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def part_of(tensor: str, config: Mapping[str, Any]) -> str | None:
    """Where a tensor belongs: ``body``, ``head``, or None, since vLLM loads it for speculative decoding only."""
    if _HEAD.match(tensor):
        return "head"
    layer, layers = _LAYER.match(tensor), text_config(config).get("num_hidden_layers")
    return None if layer and isinstance(layers, int) and int(layer[1]) >= layers else "body"


def memory_of(
    checkpoint: Checkpoint, engine_args: Mapping[str, Any], *, generates: bool = True, gpus: int | None = None
) -> LLMMemory | None:
    """The least memory that an LLM takes with these engine arguments of vLLM's, None if it is not known.

    Args:
        checkpoint: What it says of itself.
        engine_args: As ``deployments.models.args.mapping`` makes them.
        generates: It writes text: it has its head and keeps keys and values.
        gpus: GPUs of the wrapper that it is to run on; None: that is not decided yet.
    """
    weights_bytes = _weights_bytes(checkpoint, engine_args, generates)
    if weights_bytes is None:
        return None
    stages, parallel = engine_args.get("pipeline_parallel_size", 1), engine_args.get("tensor_parallel_size")
    if parallel is None and gpus is not None:
        parallel = max(1, gpus // stages)
    spread = None if parallel is None else stages * parallel
    if "kv_cache_memory_bytes" in engine_args:  # goes before the share, and is as large as the client likes
        reserved_bytes = engine_args["kv_cache_memory_bytes"] * (spread or 1)  # of each GPU
        return LLMMemory(weights_bytes, gpus=spread, kv_reserved_bytes=reserved_bytes)
    tokens = _context_tokens(checkpoint.text, engine_args) if generates else None
    kv_cache_bytes = None if tokens is None else _kv_cache_bytes(checkpoint, engine_args, tokens, parallel or 1)
    return LLMMemory(
        weights_bytes,
        kv_cache_bytes,
        None if kv_cache_bytes is None else tokens,
        engine_args.get("gpu_memory_utilization", GPU_SHARE),
        spread,
    )


# --- weights -----------------------------------------------------------------------------------------------


def _weights_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any], generates: bool) -> int | None:
    multimodal = checkpoint.text is not checkpoint.config
    if (
        not checkpoint.body
        or engine_args.get("load_format") == "mistral"  # other files than those that were looked at
        or engine_args.get("cpu_offload_gb")  # not all of it is on the GPUs
        or (engine_args.get("quantization") and not _is_quantized(checkpoint))  # vLLM makes it smaller
        or (multimodal and (engine_args.get("language_model_only") or engine_args.get("limit_mm_per_prompt")))
    ):
        return None
    parts = [checkpoint.body]
    if generates and not checkpoint.text.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings")):
        parts.append(checkpoint.head)
    target = None if _is_quantized(checkpoint) else _dtype_bytes(checkpoint, engine_args)
    total = 0
    for stored, size_bytes in ((stored, size) for part in parts for stored, size in part.items()):
        wide = _FLOAT_BYTES.get(stored)
        total += size_bytes if wide is None or target is None else size_bytes * target // wide
    return total


def _is_quantized(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("quantization_config") or checkpoint.text.get("quantization_config"))


def _dtype_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any]) -> int:
    """Bytes of a number of the LLM's dtype: as asked, else its own, where vLLM takes 16 bits in place of 32."""
    asked = _DTYPE_BYTES.get(str(engine_args.get("dtype")))
    if asked is not None:
        return asked
    own = next((config[key] for config in (checkpoint.text, checkpoint.config) for key in ("dtype", "torch_dtype")
                if config.get(key)), None)  # fmt: skip
    return min(2, _DTYPE_BYTES.get(str(own), 2))


# --- KV cache ----------------------------------------------------------------------------------------------


def _context_tokens(text: Mapping[str, Any], engine_args: Mapping[str, Any]) -> int | None:
    """How long a sequence may get; None: not known, or vLLM makes it as long as memory allows."""
    asked = engine_args.get("max_model_len")
    if asked is not None:
        return asked if isinstance(asked, int) and asked > 0 else None
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    own = text.get("max_position_embeddings")
    if isinstance(rope, Mapping) and {rope.get("rope_type"), rope.get("type")} & {"longrope", "su"}:
        own = text.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return _count(own)


def _kv_cache_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any], tokens: int, parallel: int) -> int | None:
    """What one sequence of so many tokens fills, on all GPUs of a tensor-parallel group together."""
    text = checkpoint.text
    layers, number_bytes = _count(text.get("num_hidden_layers")), _kv_number_bytes(checkpoint, engine_args)
    if layers is None or number_bytes is None:
        return None
    if text.get("model_type") in _LATENT_ATTENTION:
        latent, rotated = _count(text.get("kv_lora_rank")), _count(text.get("qk_rope_head_dim"))
        if latent is None or rotated is None:
            return None
        return layers * tokens * (latent + rotated) * number_bytes * parallel
    heads = _count(text.get("num_key_value_heads", text.get("num_attention_heads")))
    head_size = _head_size(text)
    full = _full_layers(text, layers)
    if text.get("model_type") not in _PLAIN_ATTENTION or heads is None or head_size is None or full is None:
        return None
    # More GPUs than heads: each GPU has one, so that some are there several times.
    per_token = 2 * max(heads, parallel) * head_size * number_bytes
    window = _count(text.get("sliding_window")) or tokens
    return per_token * (full * tokens + (layers - full) * min(tokens, window))


def _kv_number_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any]) -> int | None:
    """Bytes of a number in the KV cache; None: a quantized checkpoint may bring a type of its own."""
    asked = engine_args.get("kv_cache_dtype", "auto")
    if asked != "auto":
        return _KV_DTYPE_BYTES.get(asked)
    quantization = checkpoint.config.get("quantization_config") or checkpoint.text.get("quantization_config") or {}
    if quantization.get("kv_cache_scheme") or quantization.get("quant_method") in ("modelopt", "quark"):
        return None
    return _dtype_bytes(checkpoint, engine_args)


def _head_size(text: Mapping[str, Any]) -> int | None:
    hidden, heads = _count(text.get("hidden_size")), _count(text.get("num_attention_heads"))
    divided = None if hidden is None or heads is None else hidden // heads
    return _count(text.get("head_dim")) or divided


def _full_layers(text: Mapping[str, Any], layers: int) -> int | None:
    """How many layers keep the whole sequence; the others keep a window of it. At least, where it is not told."""
    kinds = text.get("layer_types")
    if kinds is not None:
        known = isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}
        return kinds.count("full_attention") if known and len(kinds) == layers else None
    if _count(text.get("sliding_window")) is None or text.get("use_sliding_window") is False:
        return layers
    every = text.get("sliding_window_pattern", _WINDOW_PATTERN.get(str(text.get("model_type"))))
    if every is None:
        return 0
    return layers // every if isinstance(every, int) and every > 0 else None


def _count(value: object) -> int | None:
    """A number that can be counted with, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
