"""llmconfigs, and the words that are taken from them: each with a value, and what vLLM is told."""

import typing

import pytest

from deployments.models.args.mapping import map_llmconfig
from deployments.models.args.rules import Dropped, Mapped, Refused
from registry.errors import InvalidField

R = typing.TypeVar("R", Mapped, Dropped, Refused)


def llmconfig(prompting=None, deployment=None, **fields):
    return {
        "modeltyp": "text-generation",
        "model": "org/llm",
        "uses_chat_template": True,
        "args": {"prompting": prompting or {}, "deployment": deployment or {}},
        **fields,
    }


def fingerprint(**deployment):
    return map_llmconfig(llmconfig(deployment=deployment)).spec.fingerprint


def rules(table, kind: type[R]) -> dict[str, R]:
    """The words of a table that are taken, dropped or refused."""
    return {word: rule for word, rule in table.items() if isinstance(rule, kind)}


def problem(mapping, args):
    with pytest.raises(InvalidField) as caught:
        mapping(args)
    return caught.value


# --- what is taken: word, value, vLLM's word, vLLM's value -------------------------------------------------

TAKEN_PROMPTING = [
    ("max_new_tokens", 256, "max_tokens", 256),
    ("max_new_tokens", 256.0, "max_tokens", 256),
    ("max_new_tokens", 1, "max_tokens", 1),
    ("max_completion_tokens", 5, "max_tokens", 5),
    ("max_tokens", 5, "max_tokens", 5),
    ("min_new_tokens", 3, "min_tokens", 3),
    ("min_tokens", 0, "min_tokens", 0),
    ("do_sample", False, "temperature", 0.0),
    ("stop_strings", "END", "stop", ["END"]),
    ("stop_strings", ["a", "b", "c", "d"], "stop", ["a", "b", "c", "d"]),
    ("stop", "END", "stop", ["END"]),
    ("eos_token_id", 2, "stop_token_ids", [2]),
    ("eos_token_id", [2, 3], "stop_token_ids", [2, 3]),
    ("stop_token_ids", [0], "stop_token_ids", [0]),
    ("temperature", 0, "temperature", 0.0),
    ("temperature", 2, "temperature", 2.0),
    ("temperature", 0.001, "temperature", 0.01),
    ("top_p", 1, "top_p", 1.0),
    ("top_p", 0.01, "top_p", 0.01),
    ("top_k", 50, "top_k", 50),
    ("top_k", 50.0, "top_k", 50),
    ("top_k", 0, "top_k", 0),
    ("top_k", -1, "top_k", 0),
    ("min_p", 0, "min_p", 0.0),
    ("min_p", 1, "min_p", 1.0),
    ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
    ("presence_penalty", -2, "presence_penalty", -2.0),
    ("frequency_penalty", 2, "frequency_penalty", 2.0),
    ("seed", 0, "seed", 0),
    ("seed", 2**63 - 1, "seed", 2**63 - 1),
    ("include_stop_str_in_output", True, "include_stop_str_in_output", True),
    ("ignore_eos", True, "ignore_eos", True),
    ("skip_special_tokens", False, "skip_special_tokens", False),
    ("spaces_between_special_tokens", False, "spaces_between_special_tokens", False),
    ("add_special_tokens", True, "add_special_tokens", True),
    ("truncate_prompt_tokens", 100, "truncate_prompt_tokens", 100),
    ("truncate_prompt_tokens", -1, "truncate_prompt_tokens", -1),
    ("truncation_side", "left", "truncation_side", "left"),
    ("allowed_token_ids", [5, 6], "allowed_token_ids", [5, 6]),
    ("bad_words", "word", "bad_words", ["word"]),
    ("logit_bias", {"42": -100, "0": 1.5}, "logit_bias", {"42": -100.0, "0": 1.5}),
    ("chat_template_kwargs", {"enable_thinking": False}, "chat_template_kwargs", {"enable_thinking": False}),
    ("reasoning_effort", "low", "reasoning_effort", "low"),
]

TAKEN_DEPLOYMENT = [
    ("tool_call_parser", "hermes", "tool_call_parser", "hermes"),
    ("torch_dtype", "torch.bfloat16", "dtype", "bfloat16"),
    ("torch_dtype", "bfloat16", "dtype", "bfloat16"),
    ("dtype", "torch.float16", "dtype", "float16"),
    ("dtype", "half", "dtype", "float16"),
    ("dtype", "torch.float32", "dtype", "float32"),
    ("dtype", "float", "dtype", "float32"),
    ("max_position_embeddings", 512, "max_model_len", 512),
    ("max_model_len", 512, "max_model_len", 512),
    ("max_model_len", "auto", "max_model_len", -1),
    ("max_model_len", -1, "max_model_len", -1),
    ("tp_size", 2, "tensor_parallel_size", 2),
    ("tensor_parallel_size", 1, "tensor_parallel_size", 1),
    ("pipeline_parallel_size", 2, "pipeline_parallel_size", 2),
    ("revision", "feature/_x-1.0", "revision", "feature/_x-1.0"),
    ("tokenizer_revision", "v1.0", "tokenizer_revision", "v1.0"),
    ("quantization", "fp8", "quantization", "fp8"),
    ("kv_cache_dtype", "fp8", "kv_cache_dtype", "fp8"),
    ("mamba_cache_dtype", "float32", "mamba_cache_dtype", "float32"),
    ("mamba_ssm_cache_dtype", "float32", "mamba_ssm_cache_dtype", "float32"),
    ("seed", 2**32 - 1, "seed", 2**32 - 1),
    ("enable_expert_parallel", True, "enable_expert_parallel", True),
    ("gpu_memory_utilization", 1, "gpu_memory_utilization", 1.0),
    ("kv_cache_memory_bytes", 1 << 30, "kv_cache_memory_bytes", 1 << 30),
    ("cpu_offload_gb", 4, "cpu_offload_gb", 4.0),
    ("block_size", 16, "block_size", 16),
    ("max_num_seqs", 8, "max_num_seqs", 8),
    ("max_num_batched_tokens", 4096, "max_num_batched_tokens", 4096),
    ("long_prefill_token_threshold", 0, "long_prefill_token_threshold", 0),
    ("enable_prefix_caching", False, "enable_prefix_caching", False),
    ("enable_chunked_prefill", True, "enable_chunked_prefill", True),
    ("async_scheduling", False, "async_scheduling", False),
    ("disable_sliding_window", True, "disable_sliding_window", True),
    ("language_model_only", True, "language_model_only", True),
    ("limit_mm_per_prompt", {"image": 0}, "limit_mm_per_prompt", {"image": 0}),
    ("enforce_eager", True, "enforce_eager", True),
    ("optimization_level", 0, "optimization_level", 0),
    ("performance_mode", "throughput", "performance_mode", "throughput"),
    ("attention_backend", "FLASH_ATTN", "attention_backend", "FLASH_ATTN"),
    ("model_impl", "transformers", "model_impl", "transformers"),
    ("tokenizer_mode", "hf", "tokenizer_mode", "hf"),
    ("config_format", "hf", "config_format", "hf"),
    ("load_format", "safetensors", "load_format", "safetensors"),
    ("generation_config", "vllm", "generation_config", "vllm"),
    ("max_logprobs", 0, "max_logprobs", 0),
    ("logprobs_mode", "processed_logprobs", "logprobs_mode", "processed_logprobs"),
    ("use_fp64_gumbel", True, "use_fp64_gumbel", True),
]
