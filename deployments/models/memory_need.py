"""Estimates, from its checkpoint, the least memory that an LLM needs: weights, and the KV cache of one sequence.

Counted as vLLM 0.32 does, as a lower bound: activations, CUDA graphs and rounding to blocks are not included. None
means unknown: the checkpoint alone does not determine the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from registry.core.records import LLMMemory

GPU_SHARE: Final = 0.92
"""Share of a GPU's memory that vLLM 0.32 uses by default (``CacheConfig.gpu_memory_utilization``)."""

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
"""``model_type`` of LLMs that cache keys and values of every layer, and nothing else. Other caches are unknown."""

_LATENT_ATTENTION: Final = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2"})
"""``model_type`` of LLMs that cache one latent vector per layer (MLA), whole on each GPU of a tensor-parallel group."""

_WINDOW_PATTERN: Final[Mapping[str, int]] = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""Every n-th layer attends to the whole context; used if ``config.json`` leaves n to transformers' default."""


_FIELDS: Final = frozenset(
    {
        "dtype", "head_dim", "hidden_size", "kv_lora_rank", "layer_types", "max_position_embeddings", "model_type",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
        "qk_rope_head_dim", "quantization_config", "rope_parameters", "rope_scaling", "sliding_window",
        "sliding_window_pattern", "tie_word_embeddings", "torch_dtype", "use_sliding_window",
    }
)  # fmt: skip
_MOST: Final = 2**48
"""Largest number that is read from a ``config.json``, far above the size of any model."""

_ROPE_FIELDS: Final = frozenset({"rope_type", "type", "original_max_position_embeddings"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's metadata.

    ``config`` is its ``config.json``, or the ``needed_fields`` of it. ``body`` and ``head`` are bytes by safetensors
    type (``BF16`` …): of the weights that are always loaded, and of the language-modelling head, which some LLMs do
    not need.
    """

    config: Mapping[str, Any]
    body: Mapping[str, int] = field(default_factory=dict)
    head: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the config that describes the text LLM of a multimodal model, else the whole config."""
        return text_config(self.config)


# D122: of a configuration only these fields are kept
def needed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``config.json`` that this module reads: the others may be very long.

    Raises:
        TypeError, ValueError: One of them has a type or a size that no engine would load.
    """
    needed = {name: value for name, value in config.items() if name in _FIELDS}
    if isinstance(text := config.get("text_config"), Mapping):
        needed["text_config"] = needed_fields({**text, "text_config": None})
    if isinstance(quantization := config.get("quantization_config"), Mapping) and quantization:
        scheme, method = bool(quantization.get("kv_cache_scheme")), quantization.get("quant_method")
        needed["quantization_config"] = {"kv_cache_scheme": scheme, "quant_method": method}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := config.get(name), Mapping):
            needed[name] = {key: value for key, value in rope.items() if key in _ROPE_FIELDS}
    _require_sound(needed)
    return needed


def _require_sound(needed: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if a field has a type or a size that no engine would load."""
    ropes = [rope for name in ("rope_scaling", "rope_parameters") if isinstance(rope := needed.get(name), Mapping)]
    kinds = [rope.get(key) for rope in ropes for key in ("rope_type", "type")]
    layers = needed.get("layer_types")
    kinds += [needed.get("model_type"), *(layers if isinstance(layers, list) else [layers])]
    if any(not isinstance(kind, str | None) for kind in kinds):
        raise TypeError("config.json names a kind of model, layer or rope that is no text")
    if not isinstance(needed.get("quantization_config") or {}, Mapping):
        raise TypeError("quantization_config in config.json is no object")
    numbers = (value for fields in (needed, *ropes) for value in fields.values() if isinstance(value, int))
    if any(abs(number) > _MOST for number in numbers):
        raise ValueError(f"config.json has a number above {_MOST}")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a ``config.json`` that describes the text LLM, else all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def part_of(tensor: str, config: Mapping[str, Any]) -> str | None:
    """Return the part that a tensor belongs to: ``body``, ``head``, or None (needed only for speculative decoding)."""
    if _HEAD.match(tensor):
        return "head"
    layer, layers = _LAYER.match(tensor), text_config(config).get("num_hidden_layers")
    return None if layer and isinstance(layers, int) and int(layer[1]) >= layers else "body"


def memory_of(
    checkpoint: Checkpoint, engine_args: Mapping[str, Any], *, generates: bool = True, gpus: int | None = None
) -> LLMMemory | None:
    """Return the least memory that an LLM needs with these vLLM engine arguments, None if unknown.

    Args:
        checkpoint: Its metadata.
        engine_args: As ``deployments.models.args.mapping`` makes them.
        generates: The LLM generates text, so it needs its head and a KV cache.
        gpus: Number of GPUs of the wrapper that will run it; None: not decided yet.
    """
    weights_bytes = _weights_bytes(checkpoint, engine_args, generates)
    if weights_bytes is None:
        return None
    stages, parallel = engine_args.get("pipeline_parallel_size", 1), engine_args.get("tensor_parallel_size")
    if parallel is None and gpus is not None:
        parallel = max(1, gpus // stages)
    spread = None if parallel is None else stages * parallel
    if "kv_cache_memory_bytes" in engine_args:  # takes precedence over the share; the client may choose any size
        reserved_bytes = engine_args["kv_cache_memory_bytes"] * (spread or 1)  # per GPU
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
        or engine_args.get("load_format") == "mistral"  # uses other files than those that were read
        or engine_args.get("cpu_offload_gb")  # part of it is in host memory
        or (engine_args.get("quantization") and not _is_quantized(checkpoint))  # vLLM quantizes it while loading
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
    """Return the bytes per number of the requested dtype, else of the LLM's own (vLLM loads 32-bit types as 16-bit)."""
    asked = _DTYPE_BYTES.get(str(engine_args.get("dtype")))
    if asked is not None:
        return asked
    own = next((config[key] for config in (checkpoint.text, checkpoint.config) for key in ("dtype", "torch_dtype")
                if config.get(key)), None)  # fmt: skip
    return min(2, _DTYPE_BYTES.get(str(own), 2))


# --- KV cache ----------------------------------------------------------------------------------------------


def _context_tokens(text: Mapping[str, Any], engine_args: Mapping[str, Any]) -> int | None:
    """Return the longest possible sequence in tokens; None if unknown, or if vLLM fits it to the memory."""
    asked = engine_args.get("max_model_len")
    if asked is not None:
        return asked if isinstance(asked, int) and asked > 0 else None
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    own = text.get("max_position_embeddings")
    if isinstance(rope, Mapping) and {rope.get("rope_type"), rope.get("type")} & {"longrope", "su"}:
        own = text.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return _count(own)


def _kv_cache_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any], tokens: int, parallel: int) -> int | None:
    """Return the bytes of one sequence of ``tokens`` tokens, on all GPUs of a tensor-parallel group together."""
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
    # With more GPUs than heads each GPU has one head, so some heads exist several times.
    per_token = 2 * max(heads, parallel) * head_size * number_bytes
    window = _count(text.get("sliding_window")) or tokens
    return per_token * (full * tokens + (layers - full) * min(tokens, window))


def _kv_number_bytes(checkpoint: Checkpoint, engine_args: Mapping[str, Any]) -> int | None:
    """Return the bytes per number in the KV cache; None if a quantized checkpoint may define its own type."""
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
    """Return how many layers cache the whole sequence; the others cache a window.

    Returns 0, a lower bound, if there is a window but no known pattern of layers; None if
    ``layer_types`` or the pattern is not understood.
    """
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
    """Return ``value`` if it is an int > 0, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
