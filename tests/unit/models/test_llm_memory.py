"""How much memory LLMs take, against figures that their makers have published."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.models.memory_need import GPU_SHARE, Checkpoint, memory_of, needed_fields, part_of
from registry.core.records import LLMMemory

GIB = 2**30

# config.json of the hub's repositories, as far as it matters; parameters as their model cards count them.
LLAMA_3_8B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8"},
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "torch_dtype": "float32",
    "hidden_size": 3584,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}


def of(config: dict[str, Any], args: dict[str, Any] | None = None, **more: Any) -> LLMMemory:
    """The memory of an LLM of this config with a thousand numbers of 16 bits; the needed fields give the same."""
    memory = memory_of(Checkpoint(config, {"BF16": 2000}), args or {}, **more)
    assert memory is not None
    assert memory_of(Checkpoint(needed_fields(config), {"BF16": 2000}), args or {}, **more) == memory
    return memory


def kv(config: dict[str, Any], args: dict[str, Any] | None = None, **more: Any) -> int | None:
    return of(config, args, **more).kv_cache_bytes


@pytest.mark.parametrize(
    ("config", "parameters", "weights_bytes", "kv_cache_bytes", "tokens"),
    [
        # 2 (K, V) · 8 heads · 128 · 2 bytes · 32 layers = 128 KiB a token; "Llama 3 8B", 8.03 B parameters, 8k context.
        (LLAMA_3_8B, 8_030_261_248, 16_060_522_496, 1 * GIB, 8192),
        # 2 · 4 · 128 · 2 · 28 = 56 KiB a token; 7.61 B parameters (model card of Qwen2.5-7B).
        (QWEN_2_5_7B, 7_615_616_512, 15_231_233_024, 56 * 1024 * 32768, 32768),
        # 2 · 8 · 128 · 2 · 32 = 128 KiB a token; 46.7 B parameters in all, not 8 · 7 B (Mixtral of Experts, 2024).
        (MIXTRAL_8X7B, 46_702_792_704, 93_405_585_408, 4 * GIB, 32768),
    ],
    ids=["Llama-3-8B", "Qwen2.5-7B", "Mixtral-8x7B"],
)
def test_published_figures(
    config: dict[str, Any], parameters: int, weights_bytes: int, kv_cache_bytes: int, tokens: int
) -> None:
    """Two bytes for a parameter in bfloat16, and a KV cache of as many bytes a token as grouped heads make."""
    memory = memory_of(Checkpoint(config, {"BF16": 2 * parameters}), {})
    assert memory == LLMMemory(weights_bytes, kv_cache_bytes, tokens, GPU_SHARE)


def test_a_latent_kv_cache_is_small_and_whole_on_every_gpu() -> None:
    """DeepSeek-V3 keeps (512 + 64) · 2 bytes · 61 layers = 70.272 KB a token, on each GPU of a tensor-parallel group.

    Source: Insights into DeepSeek-V3 (ISCA 2025), table 1.
    """
    per_token = 70_272
    assert kv(DEEPSEEK_V3, {"max_model_len": 1000}) == 1000 * per_token
    assert kv(DEEPSEEK_V3, {"max_model_len": 1000, "tensor_parallel_size": 8}) == 8 * 1000 * per_token
    assert kv(DEEPSEEK_V3, {"max_model_len": 1000}, gpus=4) == 4 * 1000 * per_token
    assert kv(DEEPSEEK_V3, {"max_model_len": 1000, "kv_cache_dtype": "fp8"}) == 500 * per_token


def test_layers_for_speculative_decoding_are_not_loaded() -> None:
    """DeepSeek-V3's layer 61 predicts a second token (14 B parameters): vLLM leaves it out unless told otherwise."""
    assert part_of("model.layers.60.mlp.gate.weight", DEEPSEEK_V3) == "body"
    assert part_of("model.layers.61.mlp.gate.weight", DEEPSEEK_V3) is None
    assert part_of("model.embed_tokens.weight", DEEPSEEK_V3) == "body"
    assert part_of("lm_head.weight", DEEPSEEK_V3) == "head"
    assert part_of("vision_tower.encoder.layers.99.fc.weight", DEEPSEEK_V3) == "body"
    assert part_of("language_model.model.layers.9.fc.weight", {"text_config": {"num_hidden_layers": 9}}) is None
    assert part_of("model.layers.9.fc.weight", {}) == "body"


def test_sliding_layers_keep_a_window() -> None:
    """Of Gemma 2's 42 layers every second keeps 4096 tokens: 2 · 8 · 256 · 2 bytes a token and layer.

    Source: Gemma 2 (2024), section 2: local and global attention in every other layer.
    """
    per_layer = 2 * 8 * 256 * 2
    assert kv(GEMMA_2_9B) == per_layer * (21 * 8192 + 21 * 4096)
    assert kv(GEMMA_2_9B, {"max_model_len": 1024}) == per_layer * 42 * 1024


@pytest.mark.parametrize(
    ("more", "full"),
    [
        ({"layer_types": ["full_attention"] * 32}, 32),
        ({"layer_types": ["full_attention"] * 8 + ["sliding_attention"] * 24, "sliding_window": 128}, 8),
        ({"sliding_window": 128}, 0),
        ({"sliding_window": 128, "sliding_window_pattern": 4}, 8),
        ({"sliding_window": 128, "use_sliding_window": False}, 32),
        ({"layer_types": ["full_attention"] * 8 + ["linear_attention"] * 24}, None),
        ({"layer_types": ["full_attention"]}, None),
        ({"sliding_window": 128, "sliding_window_pattern": "LLLG"}, None),
    ],
)
def test_which_layers_slide_is_read_and_not_guessed(more: dict[str, Any], full: int | None) -> None:
    """By the list of layers, else by pattern, else as few whole ones as there may be; None for what is not known."""
    per_layer = 2 * 8 * 128 * 2
    expected = None if full is None else per_layer * (full * 8192 + (32 - full) * 128)
    assert kv({**LLAMA_3_8B, **more}) == expected


def test_heads_are_not_split() -> None:
    """Eight heads on sixteen GPUs are there twice; on four GPUs once."""
    once = kv(LLAMA_3_8B)
    assert once is not None
    assert kv(LLAMA_3_8B, {"tensor_parallel_size": 4}) == once
    assert kv(LLAMA_3_8B, {"tensor_parallel_size": 16}) == 2 * once
    assert kv(LLAMA_3_8B, {"pipeline_parallel_size": 2, "tensor_parallel_size": 8}) == once


@pytest.mark.parametrize(
    ("args", "gpus", "spread"),
    [
        ({}, None, None),
        ({}, 4, 4),
        ({}, 0, 1),
        ({"tensor_parallel_size": 1}, 4, 1),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, None, 4),
        ({"pipeline_parallel_size": 2}, 8, 8),
        ({"tensor_parallel_size": 2, "kv_cache_memory_bytes": 10}, None, 2),
    ],
)
def test_it_is_spread_as_the_engine_will(args: dict[str, Any], gpus: int | None, spread: int | None) -> None:
    """Over as many GPUs as are asked for, else over all of the wrapper's, once it is known which."""
    assert of(LLAMA_3_8B, args, gpus=gpus).gpus == spread


@pytest.mark.parametrize(
    ("config", "args", "tokens"),
    [
        ({}, {}, 8192),
        ({}, {"max_model_len": 100}, 100),
        ({}, {"max_model_len": -1}, None),
        ({"max_position_embeddings": None}, {}, None),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, {}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 2048}}, {}, 2048),
        ({"rope_scaling": {"rope_type": "llama3"}}, {}, 8192),
        ({}, {"kv_cache_memory_bytes": 1}, None),
    ],
)
def test_the_context_is_as_long_as_asked_else_the_llms_own(
    config: dict[str, Any], args: dict[str, Any], tokens: int | None
) -> None:
    """Where vLLM fits the length to the memory, or nobody tells it, the KV cache is not known."""
    memory = of({**LLAMA_3_8B, **config}, args)
    assert memory.context_tokens == tokens
    assert (memory.kv_cache_bytes is None) == (tokens is None)


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA_3_8B, "model_type": "jamba"},
        {**LLAMA_3_8B, "num_hidden_layers": None},
        {**LLAMA_3_8B, "num_key_value_heads": None},
        {**LLAMA_3_8B, "hidden_size": None},
        {**LLAMA_3_8B, "num_attention_heads": True},
        {**DEEPSEEK_V3, "kv_lora_rank": None},
        {**LLAMA_3_8B, "quantization_config": {"quant_method": "modelopt"}},
        {**LLAMA_3_8B, "quantization_config": {"quant_method": "x", "kv_cache_scheme": {"num_bits": 8}}},
    ],
)
def test_a_kv_cache_that_is_not_told_is_not_known(config: dict[str, Any]) -> None:
    """It is never 0 and never guessed; the weights are known all the same."""
    memory = of(config)
    assert (memory.kv_cache_bytes, memory.context_tokens) == (None, None)
    assert memory.weights_bytes == 2000


def test_llms_that_write_no_text_keep_no_sequence() -> None:
    """An embedding has no head, and what its KV cache is depends on more than the config tells."""
    checkpoint = Checkpoint(LLAMA_3_8B, {"BF16": 2000}, {"BF16": 500})
    assert memory_of(checkpoint, {}, generates=False) == LLMMemory(2000, None, None, GPU_SHARE)
    assert memory_of(checkpoint, {"max_model_len": 1}) == LLMMemory(2500, 128 * 1024, 1, GPU_SHARE)


@pytest.mark.parametrize(
    ("config", "args", "weights_bytes"),
    [
        ({"torch_dtype": "bfloat16"}, {}, 4000),
        ({"dtype": "float32"}, {}, 4000),
        ({}, {}, 4000),
        ({"dtype": "torch.odd"}, {}, 4000),
        ({"dtype": "float16"}, {"dtype": "float32"}, 8000),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, 4000),
        ({"dtype": "float32", "quantization_config": {"quant_method": "awq"}}, {"dtype": "float16"}, 6000),
        ({"quantization_config": {"quant_method": "fp8"}}, {"quantization": "fp8"}, 6000),
    ],
)
def test_weights_take_the_dtype_that_they_are_run_in(
    config: dict[str, Any], args: dict[str, Any], weights_bytes: int
) -> None:
    """A thousand numbers of 32 and a thousand of 16 bits: scaled to the dtype, as stored where they are quantized.

    Without a dtype asked for, vLLM takes 16 bits in place of 32.
    """
    memory = memory_of(Checkpoint({"model_type": "x", **config}, {"F32": 4000, "BF16": 2000}), args)
    assert memory is not None
    assert memory.weights_bytes == weights_bytes


def test_only_the_fields_that_are_read_are_kept() -> None:
    """A quantization still counts as one if no field of it is read; the text part keeps its own fields."""
    long = {"ignore": ["x"] * 1000}
    text = {"hidden_size": 8, "vocabulary": long, "text_config": {"text_config": {}}}
    rope = {"rope_type": "su", "long_factor": [1.0] * 1000}
    config = {"id2label": long, "quantization_config": long, "text_config": text, "rope_scaling": rope}
    assert needed_fields(config) == {
        "quantization_config": {"kv_cache_scheme": False, "quant_method": None},
        "text_config": {"hidden_size": 8},
        "rope_scaling": {"rope_type": "su"},
    }
    assert needed_fields({"quantization_config": {}, "text_config": None}) == {"quantization_config": {}}


def test_integers_are_as_stored() -> None:
    """What is no floating-point number is not converted."""
    memory = memory_of(Checkpoint({}, {"I32": 4000, "F8_E4M3": 1000, "BF16": 2000}), {"dtype": "float32"})
    assert memory is not None
    assert memory.weights_bytes == 4000 + 1000 + 4000


def test_a_head_that_is_tied_is_the_embedding() -> None:
    """A checkpoint may hold it all the same; it is not loaded twice."""
    for config in ({"tie_word_embeddings": True}, {"text_config": {}, "tie_word_embeddings": True}):
        memory = memory_of(Checkpoint(config, {"BF16": 2000}, {"BF16": 500}), {})
        assert memory is not None
        assert memory.weights_bytes == 2000


@pytest.mark.parametrize(
    ("config", "args"),
    [
        ({}, {"load_format": "mistral"}),
        ({}, {"cpu_offload_gb": 4}),
        ({}, {"quantization": "fp8"}),
        ({"text_config": {}}, {"language_model_only": True}),
        ({"text_config": {}}, {"limit_mm_per_prompt": {"image": 0}}),
    ],
)
def test_weights_that_vllm_makes_smaller_are_not_known(config: dict[str, Any], args: dict[str, Any]) -> None:
    """Then nothing is known, and nothing is refused."""
    assert memory_of(Checkpoint({**LLAMA_3_8B, **config}, {"BF16": 2000}), args) is None
    assert memory_of(Checkpoint(LLAMA_3_8B), {}) is None


def test_the_text_part_of_a_multimodal_llm_counts() -> None:
    """Layers and heads are those of its text LLM."""
    assert kv({"model_type": "llava", "text_config": LLAMA_3_8B}) == kv(LLAMA_3_8B)
