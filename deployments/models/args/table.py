"""The rule for every word in an llmconfig's args on vLLM 0.32.

Each word of transformers (``GenerationConfig``, ``from_pretrained``, ``pipeline``) and of vLLM (``EngineArgs``,
``SamplingParams``, the bodies of its OpenAI API) has one rule: translated, dropped or refused. Tests compare the tables
with the installed packages, so that a new word of a release is noticed. Words that are not known to be safe are
refused: vLLM's engine arguments can run code, read files and open ports, and args come from clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deployments.models.args.rules import (
    BAD_WORDS,
    DTYPE,
    FLAG,
    INT64_MAX,
    LOGIT_BIAS,
    MAMBA_DTYPE,
    MEDIA,
    REVISION,
    STOP_TEXTS,
    TEMPLATE_WORDS,
    TOKEN_IDS,
    Mapped,
    Refused,
    Rule,
    dropped,
    joined,
    number,
    one_of,
    own,
    refused,
    whole,
)

# --- args.prompting ----------------------------------------------------------------------------------------

_TOKENS = whole(1)
_NO_BEAMS = "vLLM answers with one sequence, without beam search"
_NO_EQUAL = "vLLM has no equivalent for a single prompt"
_ONE_TEXT = "process_prompt answers with the text alone"
_OWN_CACHE = "vLLM manages its KV cache itself"
_PER_CALL = "it belongs to a single call of the OpenAI API; send it there"
_INTERNAL = "vLLM uses it only internally"
_ASK_OPENAI = f"{_ONE_TEXT}; ask the OpenAI API for it"

PROMPTING: Mapping[str, Rule] = joined(
    {
        "max_new_tokens": Mapped("max_tokens", _TOKENS),
        "max_completion_tokens": Mapped("max_tokens", _TOKENS),
        "min_new_tokens": Mapped("min_tokens", whole(0)),
        # map_prompting removes it again and turns false into temperature 0.
        "do_sample": Mapped("do_sample", FLAG),
        "stop_strings": Mapped("stop", STOP_TEXTS, caveat="the answer ends before the stop string, not after it"),
        "eos_token_id": Mapped("stop_token_ids", TOKEN_IDS, caveat="the LLM's own end tokens end the answer as well"),
        "max_length": Refused("vLLM has no limit that counts the prompt; use max_new_tokens", unless="max_tokens"),
        "min_length": Refused("vLLM has no limit that counts the prompt; use min_new_tokens", (0,), "min_tokens"),
    },
    own(
        {
            "max_tokens": _TOKENS,
            "min_tokens": whole(0),
            "temperature": number(0, 2),
            "top_p": number(0, 1, above=True),
            "top_k": whole(0, also={-1: 0}),
            "min_p": number(0, 1),
            "repetition_penalty": number(0, above=True),
            "presence_penalty": number(-2, 2),
            "frequency_penalty": number(-2, 2),
            "seed": whole(0, INT64_MAX),
            "stop": STOP_TEXTS,
            "stop_token_ids": TOKEN_IDS,
            "include_stop_str_in_output": FLAG,
            "ignore_eos": FLAG,
            "skip_special_tokens": FLAG,
            "spaces_between_special_tokens": FLAG,
            "add_special_tokens": FLAG,
            "truncate_prompt_tokens": whole(1, also={-1: -1}),
            "truncation_side": one_of("left", "right"),
            "allowed_token_ids": TOKEN_IDS,
            "bad_words": BAD_WORDS,
            "logit_bias": LOGIT_BIAS,
        }
    ),
    own(
        {
            "chat_template_kwargs": TEMPLATE_WORDS,
            "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        },
        chat_only=True,
    ),
    # transformers' words
    dropped(_OWN_CACHE, "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    dropped(_ONE_TEXT, "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_text"),
    dropped(_ONE_TEXT, "return_dict_in_generate", "return_type"),
    dropped("vLLM needs no padding", "pad_token_id", "padding", "tokenizer_encode_kwargs"),
    dropped("the tokenizer and the chat template add it to the prompt", "bos_token_id"),
    dropped("vLLM always samples from normalised, valid probabilities", "renormalize_logits", "remove_invalid_values"),
    dropped("vLLM compiles and batches by itself", "compile_config", "disable_compile", "continuous_batching_config"),
    dropped("vLLM compiles and batches by itself", "batch_size", "num_workers", "low_memory"),
    dropped("it only describes the file that it comes from", "transformers_version", "_from_model_config"),
    dropped(
        "it controls an assistant model, which is not used here",
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    ),
    dropped("vLLM does not change the spaces of the tokenizer", "clean_up_tokenization_spaces"),
    refused(_NO_BEAMS, "num_beams", "num_beam_groups", "num_return_sequences", "n", neutral=[1]),
    refused(_NO_BEAMS, "length_penalty", neutral=[1]),
    refused(_NO_BEAMS, "use_beam_search", "early_stopping", neutral=[False]),
    refused(_NO_BEAMS, "diversity_penalty", neutral=[0]),
    refused(_NO_BEAMS, "constraints", "force_words_ids"),
    refused(f"{_NO_EQUAL}; top_p and min_p are the nearest", "top_h", "typical_p", neutral=[1]),
    refused(f"{_NO_EQUAL}; top_p and min_p are the nearest", "epsilon_cutoff", "eta_cutoff", neutral=[0]),
    refused(f"{_NO_EQUAL}; repetition_penalty is the nearest", "encoder_repetition_penalty", neutral=[1]),
    refused(
        f"{_NO_EQUAL}; repetition_penalty is the nearest",
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "penalty_alpha"),
        neutral=[0],
    ),
    refused("vLLM takes words, not token ids; use bad_words, or logit_bias for single tokens", "bad_words_ids"),
    refused(f"{_NO_EQUAL}; logit_bias is the nearest", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    refused(f"{_NO_EQUAL}; leave it out", "forced_bos_token_id", "forced_eos_token_id", "dola_layers"),
    refused(f"{_NO_EQUAL}; leave it out", "exponential_decay_length_penalty", "watermarking_config"),
    refused(f"{_NO_EQUAL}; leave it out", "guidance_scale", neutral=[1]),
    refused(f"{_NO_EQUAL}; leave it out", "token_healing", neutral=[False]),
    refused("a prompt has no time limit of its own; limit max_new_tokens", "max_time"),
    refused("encoder-decoder LLMs are not served", "decoder_start_token_id"),
    refused("speculative decoding changes what is measured; leave it out", "prompt_lookup_num_tokens"),
    refused("speculative decoding changes what is measured; leave it out", "assistant_early_exit", "speculation_type"),
    refused("speculative decoding changes what is measured; leave it out", "use_mtp", neutral=[False]),
    refused("the answer never repeats the prompt", "return_full_text", neutral=[False]),
    refused("the answer is text, not token ids", "return_tensors", neutral=[False]),
    refused("use stop_strings", "stop_sequence"),
    refused("put it into the question", "prefix", neutral=[""]),
    refused("use truncate_prompt_tokens", "handle_long_generation"),
    refused("use truncate_prompt_tokens", "truncation", neutral=[False]),
    # vLLM's words
    refused(
        _PER_CALL,
        *("model", "prompt", "messages", "suffix", "echo", "stream", "stream_options", "stream_interval", "user"),
        *("tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "documents"),
        *("request_id", "session_id", "cache_salt", "prompt_embeds", "add_generation_prompt", "chat_template"),
        *("continue_final_message", "include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "mm_payload"),
        *("repetition_detection", "return_mm_kwargs"),
    ),
    refused(_ASK_OPENAI, "logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs"),
    refused(_ASK_OPENAI, "return_tokens_as_token_ids", "return_token_ids", "return_token_offsets"),
    refused(_ASK_OPENAI, "return_prompt_text", "prompt_logprob_token_ids", "prompt_logprob_start"),
    refused("no other client prompts the LLM during a lease", "priority"),
    refused("it needs a special engine; leave it out", "watermarking", "thinking_token_budget", "vllm_xargs"),
    refused("it needs a special engine; leave it out", "kv_transfer_params", "ec_transfer_params"),
    refused("it needs a special engine; leave it out", "routed_experts_prompt_start", "extra_args"),
    refused(_INTERNAL, "detokenize", "output_kind", "skip_clone", "output_text_buffer_length"),
    refused(_INTERNAL, "skip_reading_prefix_cache", "trace_decode_token_ids"),
)


# --- args.deployment ---------------------------------------------------------------------------------------

_RAY_PLACES = "Ray gives the engine its GPUs"
_WRAPPER = "the wrapper sets it"
_CODE = "it can run code that is not vLLM's; no client may set it"
_FILES = "it reads or writes files of the LLM Machine; no client may set it"
_NETWORK = "it opens connections; no client may set it"
_KERNELS = "vLLM chooses what is fastest on the GPU"
_TUNING = "it tunes the engine, not the LLM; leave it out"
_MEDIA_DEFAULTS = "the defaults of vLLM are used; leave it out"
_NO_ADAPTERS = "adapters are not served; name an LLM that contains them"
_NO_BITSANDBYTES = (
    "vLLM 0.32 has no bitsandbytes; name an LLM that is already quantized, or use quantization "
    "(fp8, int8_per_channel_weight_only …), which gives other answers"
)

_TOOL_CALL_PARSERS = (
    "apertus", "cohere_command3", "cohere_command4", "deepseek_v3", "deepseek_v31", "deepseek_v32",
    "deepseek_v4", "deepseek_v41", "dots", "ernie45", "functiongemma", "gemma4", "gigachat3", "glm45", "glm47",
    "granite", "granite-20b-fc", "granite4", "hermes", "hf", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling",
    "internlm", "jamba", "k2_horizon", "kimi_k2", "kimi_k3", "lfm2", "ling3", "llama3_json", "llama4_json",
    "llama4_pythonic", "longcat", "mimo", "minicpm5", "minimax_m2", "minimax_m3", "mistral", "muse_glimmer",
    "olmo3", "openai", "phi4_mini_json", "plamo3", "poolside_v1", "pythonic", "qwen3_coder", "qwen3_json",
    "qwen3_xml", "seed_oss", "step3", "step3p5", "xlam",
)  # fmt: skip

DEPLOYMENT: Mapping[str, Rule] = joined(
    {
        "torch_dtype": Mapped("dtype", DTYPE, same_as_absent="auto"),
        "max_position_embeddings": Mapped(
            "max_model_len", _TOKENS, caveat="it can make the context shorter, not longer than the LLM's own"
        ),
        "tp_size": Mapped("tensor_parallel_size", whole(1, 1024)),
        "revision": Mapped("revision", REVISION, same_as_absent="main"),
        "tokenizer_revision": Mapped("tokenizer_revision", REVISION, same_as_absent="main"),
        # map_llmconfig refuses true, unless the operator allows it for this LLM.
        "trust_remote_code": Mapped("trust_remote_code", FLAG, same_as_absent=False),
        "pipeline_parallel_size": Mapped("pipeline_parallel_size", whole(1, 1024), same_as_absent=1),
        "limit_mm_per_prompt": Mapped("limit_mm_per_prompt", MEDIA),
        # -1: as long as the GPU's memory allows. Leaving it out means the LLM's own length.
        "max_model_len": Mapped("max_model_len", whole(1, also={-1: -1, "auto": -1})),
    },
    own(
        {
            "dtype": DTYPE,
            "quantization": one_of(
                *("awq", "gptq", "compressed-tensors", "modelopt", "modelopt_fp4", "quark", "mxfp4", "mxfp8", "fp8"),
                *("fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only"),
            ),
            "kv_cache_dtype": one_of("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
            "mamba_cache_dtype": MAMBA_DTYPE,
            "mamba_ssm_cache_dtype": MAMBA_DTYPE,
            # set_random_seed passes it to numpy, which accepts 32 bits.
            "seed": whole(0, 2**32 - 1),
            "tensor_parallel_size": whole(1, 1024),
            "enable_expert_parallel": FLAG,
            "gpu_memory_utilization": number(0, 1, above=True),
            "kv_cache_memory_bytes": whole(1, INT64_MAX),
            "cpu_offload_gb": number(0),
            "block_size": whole(1, 4096),
            "max_num_seqs": whole(1),
            "max_num_batched_tokens": whole(1),
            "long_prefill_token_threshold": whole(0),
            "enable_prefix_caching": FLAG,
            "enable_chunked_prefill": FLAG,
            "async_scheduling": FLAG,
            "disable_sliding_window": FLAG,
            "language_model_only": FLAG,
            "enforce_eager": FLAG,
            "optimization_level": whole(0, 3),
            "performance_mode": one_of("balanced", "interactivity", "throughput"),
            "attention_backend": one_of("auto", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"),
            "model_impl": one_of("auto", "vllm", "transformers"),
            "tokenizer_mode": one_of("auto", "hf", "mistral"),
            "config_format": one_of("auto", "hf", "mistral"),
            "load_format": one_of("auto", "safetensors", "mistral"),
            # vLLM also accepts a folder and reads it.
            "generation_config": one_of("auto", "vllm"),
            "max_logprobs": whole(0, 1000),
            "logprobs_mode": one_of("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
            "use_fp64_gumbel": FLAG,
            # Not an engine argument but one of the API: the format of the LLM's own tool calls.
            "tool_call_parser": one_of(*_TOOL_CALL_PARSERS),
        }
    ),
    # transformers' words
    dropped(_RAY_PLACES, "device_map", "device", "max_memory", "offload_folder", "offload_buffers", "device_mesh"),
    dropped("vLLM loads weights in its own way", "low_cpu_mem_usage", "_fast_init", "offload_state_dict", "mirror"),
    dropped("vLLM loads weights in its own way", "use_safetensors", "disable_mmap", "output_loading_info"),
    dropped(_KERNELS, "attn_implementation", "experts_implementation", "use_flash_attention_2"),
    dropped("the operator decides where models are stored", "cache_dir", "force_download", "local_files_only"),
    dropped("the operator decides where models are stored", "resume_download", "proxies"),
    dropped("it follows from tool_call_parser", "enable_auto_tool_choice"),
    dropped("vLLM batches and pads by itself", "batch_size", "num_workers", "padding_side", "use_cache", "tqdm_class"),
    dropped("vLLM always uses PyTorch and fast tokenizers", "framework", "use_fast"),
    dropped("transformers uses it only internally", "_from_pipeline", "_from_auto", "_commit_hash"),
    refused(_NO_BITSANDBYTES, "load_in_8bit", "load_in_4bit", neutral=[False]),
    refused(_NO_BITSANDBYTES, "quantization_config"),
    refused("use tensor_parallel_size", "tp_plan", neutral=["auto"]),
    refused("use tensor_parallel_size", "distributed_config"),
    refused("requests must not contain secrets; the operator sets HF_TOKEN", "token", "use_auth_token", "hf_token"),
    refused("only safe weight files are loaded", "weights_only", neutral=[True]),
    refused("only PyTorch weights are loaded", "from_tf", "from_flax", neutral=[False]),
    refused(
        "a repository is one LLM; name a repository that contains only this LLM", "subfolder", "variant", neutral=[""]
    ),
    refused("vLLM 0.32 has no GGUF; name an LLM with safetensors", "gguf_file"),
    refused("vLLM uses the LLM unchanged", "config", "state_dict", "key_mapping", "fusion_config", "rope_scaling"),
    refused("vLLM uses the LLM unchanged", "ignore_mismatched_sizes", neutral=[False]),
    refused(_CODE, "use_kernels", "allow_all_kernels", neutral=[False]),
    refused(_CODE, "pipeline_class", "code_revision", "custom_generate"),
    refused(_NO_ADAPTERS, "adapter_kwargs", neutral=[{}]),
    refused(_NO_ADAPTERS, "adapter_name", neutral=["default"]),
    refused("put its fields directly into args.deployment", "model_kwargs", neutral=[{}]),
    refused("it belongs to the llmconfig: model, modeltyp", "model", "task", "runner", "convert"),
    refused(_MEDIA_DEFAULTS, "feature_extractor", "image_processor", "video_processor", "processor"),
    # vLLM's words
    refused(
        _CODE,
        *("hf_overrides", "model_class_overrides", "worker_cls", "worker_extension_cls", "scheduler_cls"),
        *("logits_processors", "io_processor_plugin", "reasoning_parser_plugin", "additional_config"),
        *("compilation_config", "kernel_config", "attention_config", "mamba_config", "engram_config"),
        *("ec_manager_config", "structured_outputs_config", "diffusion_config"),
    ),
    refused(
        _FILES,
        *("tokenizer", "hf_config_path", "model_weights", "download_dir", "model_loader_extra_config"),
        *("ignore_patterns", "pt_load_map_location", "safetensors_load_strategy", "safetensors_prefetch_num_threads"),
        *("safetensors_prefetch_block_size", "allowed_local_media_path", "mm_encoder_fp8_scale_path"),
        *("mm_encoder_fp8_scale_save_path", "mm_encoder_fp8_scale_save_margin", "log_config_file"),
        *("logging_config", "profiler_config", "use_tqdm_on_load", "max_parallel_loading_workers"),
    ),
    refused(
        _NETWORK,
        *("allowed_media_domains", "otlp_traces_endpoint", "kv_transfer_config", "kv_events_config"),
        *("ec_transfer_config", "weight_transfer_config", "kv_offloading_size", "kv_offloading_backend"),
        *("master_addr", "master_port", "data_parallel_address", "data_parallel_rpc_port"),
    ),
    refused(
        _WRAPPER,
        *("served_model_name", "skip_tokenizer_init", "distributed_executor_backend", "nnodes", "node_rank"),
        *("distributed_timeout_seconds", "cpu_distributed_timeout_seconds", "numa_bind", "numa_bind_nodes"),
        *("numa_bind_cpus", "device_ids", "data_parallel_size", "data_parallel_rank", "data_parallel_start_rank"),
        *("data_parallel_size_local", "data_parallel_hybrid_lb", "data_parallel_external_lb", "tokens_only"),
        *("data_parallel_multi_port_external_lb", "data_parallel_backend", "dp_sync_interval"),
        *("enable_elastic_ep", "elastic_ep_max_dp_size", "disable_nccl_for_dp_synchronization"),
        *("_api_process_count", "_api_process_rank", "enable_sleep_mode", "sleep_mode_offload_cudagraph"),
        *("sleep_preserve_parameter_names", "enable_cumem_allocator", "enable_nccl_comm_suspend"),
        *("max_num_queued_reqs", "max_num_queued_tokens", "scheduling_policy", "stream_interval"),
        *("fault_tolerance_config", "enable_fault_tolerance", "shutdown_timeout", "fail_on_environ_validation"),
        *("disable_log_stats", "aggregate_engine_logging", "enable_log_requests", "log_level"),
        *("show_hidden_metrics_for_version", "collect_detailed_traces", "per_request_spec_decode_metrics"),
        *("kv_cache_metrics", "kv_cache_metrics_sample", "custom_histogram_buckets", "cudagraph_metrics"),
        *("enable_layerwise_nvtx_tracing", "enable_mfu_metrics", "enable_logging_iteration_details"),
        *("jit_monitor_mode", "jit_monitor_verbose", "enable_mm_processor_stats", "ray_workers_use_nsight"),
    ),
    refused(
        f"{_KERNELS}; leave it out",
        *("ir_op_priority", "moe_backend", "linear_backend", "sparse_indexer_topk_backend", "all2all_backend"),
        *("enable_flashinfer_autotune", "gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend"),
        *("mamba_backend", "mamba_ssu_algorithm", "dcp_comm_backend", "disable_custom_all_reduce"),
        *("enable_shm_tensor_arena", "disable_cascade_attn", "swa_bounded_replay", "kv_sharing_fast_prefill"),
    ),
    refused(
        _TUNING,
        *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "prefill_context_parallel_size"),
        *("decode_context_parallel_size", "dcp_q_replicate", "dcp_kv_cache_interleave_size"),
        *("cp_kv_cache_interleave_size", "enable_hc_sp", "enable_batch_sharded_sampling", "enable_ep_weight_filter"),
        *("enable_dbo", "ubatch_size", "dbo_decode_token_threshold", "dbo_prefill_token_threshold"),
        *("eplb_config", "enable_eplb", "expert_placement_strategy", "prefix_caching_hash_algo"),
        *("prefix_cache_retention_interval", "prefix_match_unit", "offload_backend", "cpu_offload_params"),
        *("offload_group_size", "offload_num_in_group", "offload_prefetch_step", "offload_params"),
        *("max_num_scheduled_tokens", "max_num_active_seqs", "long_prefill_token_threshold_adaptive"),
        *("num_gpu_blocks_override", "scheduler_reserve_full_isl", "prefill_schedule_interval", "watermark"),
        *("disable_hybrid_kv_cache_manager", "kv_cache_dtype_skip_layers", "mamba_block_size", "mamba_cache_mode"),
        *("enable_mamba_shared_prefix_checkpoint", "replayssm_buffer_len", "use_replayssm"),
        *("enable_mamba_cache_stochastic_rounding", "mamba_cache_philox_rounds", "allow_deprecated_quantization"),
    ),
    refused(
        _MEDIA_DEFAULTS,
        *("enable_mm_embeds", "interleave_mm_strings", "media_io_kwargs", "mm_processor_kwargs"),
        *("mm_processor_cache_gb", "mm_processor_cache_type", "mm_hasher_algorithm", "mm_encoder_only"),
        *("mm_shm_cache_max_object_size_mb", "mm_encoder_tp_mode", "mm_encoder_attn_backend"),
        *("mm_encoder_attn_dtype", "skip_mm_profiling", "video_pruning_rate", "video_pruning_method"),
        *("mm_tensor_ipc", "mm_processor_device", "mm_ipc_gpu_memory_gb", "mm_device_do_normalize"),
        *("disable_chunked_mm_input", "renderer_num_workers", "enable_prompt_embeds"),
    ),
    refused(
        _NO_ADAPTERS,
        *("enable_lora", "max_loras", "max_lora_rank", "default_mm_loras", "fully_sharded_loras", "max_cpu_loras"),
        *("lora_dtype", "lora_target_modules", "enable_tower_connector_lora", "specialize_active_lora"),
        *("enable_mixed_moe_lora_format", "enable_moe_shared_loras", "max_lora_cls_labels"),
    ),
    refused(
        "speculative decoding loads a second LLM and changes what is measured; leave it out",
        *("speculative_config", "spec_method", "spec_model", "spec_tokens"),
    ),
    refused(
        "process_prompt answers with the LLM's whole text; leave it out",
        *("reasoning_parser", "reasoning_config", "enable_return_routed_experts", "return_sampling_mask"),
        *("aux_output_config", "enable_trace_replay", "watermark_config", "pooler_config"),
    ),
    refused("put its fields into args.prompting", "override_generation_config"),
)


# --- modeltyp ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """vLLM's task for a modeltyp.

    ``name`` is the same for modeltyps that one engine serves. ``engine`` are the engine arguments that it needs.
    ``generates``: the LLM answers with text; else with an embedding or scores, and sampling arguments have no meaning.
    ``paths`` are the paths of vLLM's API for its prompts.
    """

    name: str
    engine: tuple[tuple[str, str], ...]
    generates: bool
    paths: tuple[str, ...]


_GENERATE = Task("text-generation", (("runner", "generate"),), True, ("/v1/chat/completions", "/v1/completions"))
_EMBED = Task("feature-extraction", (("runner", "pooling"), ("convert", "embed")), False, ("/v1/embeddings",))
_CLASSIFY = Task(
    "text-classification", (("runner", "pooling"), ("convert", "classify")), False, ("/classify", "/score", "/rerank")
)

# No text2text-generation: vLLM 0.32 no longer supports encoder-decoder LLMs for text (T5, BART).
TASKS: Mapping[str, Task] = {
    "text-generation": _GENERATE,
    "conversational": _GENERATE,
    "feature-extraction": _EMBED,
    "embedding": _EMBED,
    "sentence-similarity": _EMBED,
    "text-classification": _CLASSIFY,
    "text-ranking": _CLASSIFY,
    "score": _CLASSIFY,
}
