import json
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.models.args.mapping import TASKS, as_markdown, map_deployment, map_llmconfig, map_prompting
from deployments.models.args.rules import Dropped, Mapped, Refused
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from registry.errors import InvalidField
from registry.wire.words import POOLING_TYPES

ROOT = Path(__file__).parents[4]
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


def same(found, expected):
    """Equal in type as well: 1, 1.0 and True are three things in JSON."""
    return json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize(("word", "value", "to", "expected"), TAKEN_PROMPTING)
def test_prompting_taken(word, value, to, expected):
    """Each prompting word that has an equal on vLLM becomes it, in one spelling."""
    assert same(map_prompting({word: value}).values, {to: expected})


@pytest.mark.parametrize(("word", "value", "to", "expected"), TAKEN_DEPLOYMENT)
def test_deployment_taken(word, value, to, expected):
    """Each deployment word that has an equal on vLLM becomes it, in one spelling."""
    assert same(map_deployment({word: value}).values[to], expected)


@pytest.mark.parametrize(("table", "cases"), [(PROMPTING, TAKEN_PROMPTING), (DEPLOYMENT, TAKEN_DEPLOYMENT)])
def test_every_taken_word_has_a_case(table, cases):
    """No word is taken that the cases above don't try (trust_remote_code has tests of its own)."""
    assert rules(table, Mapped).keys() - {"trust_remote_code"} == {word for word, *_ in cases}


@pytest.mark.parametrize(("mapping", "cases"), [(map_prompting, TAKEN_PROMPTING), (map_deployment, TAKEN_DEPLOYMENT)])
def test_translated_words_are_noted(mapping, cases):
    """A word that becomes another one is told to the client; one of vLLM's own is not."""
    for word, value, to, expected in cases:
        notes = [note for note in mapping({word: value}).notes if f".{word} was translated to {to}" in note]
        assert bool(notes) == (word != to) or (word, expected) == ("temperature", 0.01)


# --- what is not allowed -----------------------------------------------------------------------------------

NUMBERS = ["max_new_tokens", "min_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"]
NO_NUMBERS: list[object] = ["256", True, float("nan"), float("inf"), -2, [1], {}, 10**400, ""]
NOT_ALLOWED_PROMPTING: list[tuple[str, object]] = [
    *((word, bad) for word in NUMBERS for bad in NO_NUMBERS),
    ("max_new_tokens", 0),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", 2**31),
    ("temperature", 2.01),
    ("temperature", -0.1),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.01),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("seed", 2**63),
    ("do_sample", 0),
    ("do_sample", "true"),
    ("ignore_eos", 1),
    ("stop", ""),
    ("stop", []),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop_strings", ["a"] * 5),
    ("bad_words", ["a"] * 65),
    ("eos_token_id", []),
    ("eos_token_id", -1),
    ("eos_token_id", [True]),
    ("eos_token_id", ["2"]),
    ("truncation_side", "up"),
    ("truncate_prompt_tokens", 0),
    ("logit_bias", {}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "1"}),
    ("logit_bias", [[1, 2]]),
    ("chat_template_kwargs", {}),
    ("chat_template_kwargs", {"chat_template": "{{ messages }}"}),
    ("chat_template_kwargs", {"a": {"b": 1}}),
    ("chat_template_kwargs", {"a": float("nan")}),
    ("reasoning_effort", "lots"),
]
NOT_ALLOWED_DEPLOYMENT: list[tuple[str, object]] = [
    ("torch_dtype", "torch.float64"),
    ("torch_dtype", 16),
    ("dtype", "bf16"),
    ("gpu_memory_utilization", 0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", "0.9"),
    ("gpu_memory_utilization", True),
    ("tensor_parallel_size", 0),
    ("tensor_parallel_size", True),
    ("tensor_parallel_size", "2"),
    ("max_model_len", 0),
    ("max_model_len", "1k"),
    ("max_model_len", -2),
    ("seed", 2**32),
    ("enforce_eager", "true"),
    ("enforce_eager", 1),
    ("quantization", "bitsandbytes"),
    ("kv_cache_dtype", "int8"),
    ("load_format", "pt"),
    ("load_format", "tensorizer"),
    ("generation_config", "/some/folder"),
    ("attention_backend", "CUSTOM"),
    ("tokenizer_mode", "my.plugin"),
    ("revision", ""),
    ("revision", "../other"),
    ("revision", "a/../b"),
    ("revision", "--flag"),
    ("revision", "a\0b"),
    ("revision", 1),
    ("revision", "refs/pr/1"),
    ("revision", "Refs/heads/main"),
    ("revision", "pr/1"),
    ("revision", "refs%2Fpr%2F1"),
    ("revision", "https://huggingface.co/org/llm"),
    ("revision", "a\\b"),
    ("revision", "main\n"),
    ("revision", "a//b"),
    ("revision", "a/"),
    ("revision", "main@{1}"),
    ("revision", "main^"),
    ("revision", "a" * 256),
    ("tokenizer_revision", "refs/pr/1"),
    ("limit_mm_per_prompt", {"image": -1}),
    ("limit_mm_per_prompt", {"smell": 1}),
    ("limit_mm_per_prompt", {}),
    ("optimization_level", 4),
    ("cpu_offload_gb", -1),
    ("cpu_offload_gb", float("inf")),
]


@pytest.mark.parametrize(("word", "value"), NOT_ALLOWED_PROMPTING)
def test_prompting_not_allowed(word, value):
    """A prompting value of the wrong type or out of range is refused by name, with what is allowed."""
    error = problem(map_prompting, {word: value})
    assert error.field == f"args.prompting.{word}"
    assert rules(PROMPTING, Mapped)[word].kind.allowed in error.problem
    assert len(str(error)) < 400


@pytest.mark.parametrize(("word", "value"), NOT_ALLOWED_DEPLOYMENT)
def test_deployment_not_allowed(word, value):
    """A deployment value of the wrong type or out of range is refused by name, with what is allowed."""
    error = problem(map_deployment, {word: value})
    assert error.field == f"args.deployment.{word}"
    assert rules(DEPLOYMENT, Mapped)[word].kind.allowed in error.problem
    assert len(str(error)) < 400


def test_number_in_quotes_has_its_remedy():
    """A number that came as text is named as such, and how to write it is said."""
    text = "args.prompting.max_new_tokens: is the text '256'; give a whole number of at least 1, without quotes: 256"
    assert str(problem(map_prompting, {"max_new_tokens": "256"})) == text
    assert "without quotes: true" in str(problem(map_deployment, {"enforce_eager": "True"}))


def test_near_value_is_suggested():
    """A value one letter off is answered with the right one."""
    assert "did you mean bfloat16?" in str(problem(map_deployment, {"dtype": "bfloat15"}))


@pytest.mark.parametrize(
    ("mapping", "word", "near"),
    [
        (map_prompting, "max_new_token", "did you mean max_new_tokens?"),
        (map_prompting, "temprature", "did you mean temperature?"),
        (map_prompting, "torch_dtype", "it belongs to args.deployment"),
        (map_deployment, "device_maps", "did you mean device_map?"),
        (map_deployment, "temperature", "it belongs to args.prompting"),
    ],
)
def test_unknown_word_suggests_the_nearest(mapping, word, near):
    """An unknown word is refused by name, null or not, with the word that was probably meant."""
    for value in (1, None):
        error = problem(mapping, {word: value})
        assert error.field.endswith(f".{word}")
        assert near in error.problem


@pytest.mark.parametrize("word", ["", "a\nb", "x" * 10_000, "\ud800", "a b", 7])
def test_strange_word_stays_short(word):
    """Whatever a client calls a word, the error is one short line that can be encoded."""
    text = str(problem(map_prompting, {word: 1}))
    assert len(text.encode()) < 300
    assert "\n" not in text


# --- what is dropped or refused on purpose -----------------------------------------------------------------


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_dropped_words_leave_a_note(section, mapping):
    """A dropped word takes any value, goes nowhere, and is named in the notes."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in rules(table, Dropped).items():
        mapped = mapping({word: {"any": ["thing", 1.5]}})
        assert mapped.values == {}
        assert mapped.notes == (f"args.{section}.{word} has no meaning on vLLM and was dropped: {rule.why}",)


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_refused_words_are_refused(section, mapping):
    """A refused word is refused with its reason, and its value, which may be a secret, is not repeated."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in rules(table, Refused).items():
        error = problem(mapping, {word: "hf_secret"})
        assert error.field == f"args.{section}.{word}"
        assert rule.why in error.problem
        assert "hf_secret" not in str(error)


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_values_that_ask_for_nothing(section, mapping):
    """A refused word with the value that vLLM has anyway, or null, changes nothing."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in table.items():
        assert mapping({word: None}) == mapping({})
        for neutral in rule.neutral if isinstance(rule, Refused) else ():
            mapped = mapping({word: neutral})
            assert mapped.values == {}
            assert mapped.notes[0].startswith(f"args.{section}.{word} was dropped")


def test_neutral_is_told_from_lookalikes():
    """num_beams true is not 1, and num_beams 2 needs what vLLM does not do."""
    for value in (True, 2, "1"):
        assert "without beam search; only 1 is allowed" in problem(map_prompting, {"num_beams": value}).problem


def test_do_sample_false_is_greedy():
    """do_sample false gives temperature 0 alone; what only shapes sampling is dropped and noted."""
    mapped = map_prompting({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1})
    assert mapped.values == {"temperature": 0.0, "seed": 1}
    for word in ("temperature", "top_p", "top_k", "min_p"):
        assert any(note.startswith(f"args.prompting.{word} was dropped") for note in mapped.notes)


def test_do_sample_true_leaves_the_rest():
    """do_sample true adds nothing of its own."""
    assert map_prompting({"do_sample": True}).values == {}
    assert map_prompting({"do_sample": True, "temperature": 0.7}).values == {"temperature": 0.7}


def test_do_sample_true_with_temperature_0_is_a_contradiction():
    """Greedy and sampling at once is refused."""
    assert "do_sample is true" in str(problem(map_prompting, {"do_sample": True, "temperature": 0}))


def test_max_length_gives_way():
    """max_length counts the prompt: refused alone, without effect beside max_new_tokens, as in transformers."""
    assert "use max_new_tokens" in str(problem(map_prompting, {"max_length": 100}))
    mapped = map_prompting({"max_length": 100, "max_new_tokens": 20})
    assert mapped.values == {"max_tokens": 20}
    assert "args.prompting.max_length was dropped: max_tokens is given and takes precedence" in mapped.notes


def test_two_words_for_one_thing():
    """Two words for one argument must agree."""
    assert map_prompting({"max_new_tokens": 5, "max_tokens": 5}).values == {"max_tokens": 5}
    assert "max_new_tokens" in str(problem(map_prompting, {"max_new_tokens": 5, "max_tokens": 6}))
    assert map_deployment({"torch_dtype": "torch.half", "dtype": "float16"}).values == {"dtype": "float16"}
    assert "torch_dtype" in str(problem(map_deployment, {"torch_dtype": "float16", "dtype": "bfloat16"}))


def test_bounds_that_cross():
    """Two bounds that exclude each other are refused under the client's own word."""
    error = problem(map_prompting, {"min_new_tokens": 9, "max_tokens": 5})
    assert str(error) == "args.prompting.min_new_tokens: is 9, which is more than max_tokens 5; lower it"
    error = problem(map_deployment, {"max_num_seqs": 9, "max_num_batched_tokens": 5})
    assert error.field == "args.deployment.max_num_seqs"
    error = problem(map_llmconfig, llmconfig({"max_new_tokens": 100}, {"max_model_len": 64}))
    assert error.field == "args.prompting.max_new_tokens"


def test_chat_words_need_a_chat_template():
    """Words of the chat endpoint are refused where the other one is used."""
    config = llmconfig({"chat_template_kwargs": {"enable_thinking": False}}, uses_chat_template=False)
    error = problem(map_llmconfig, config)
    assert error.field == "args.prompting.chat_template_kwargs"


COMMIT = "0123456789abcdef" * 2 + "01234567"
OTHER_COMMIT = "f" * 40


def own_code(located=None, allowed=(f"org/llm@{COMMIT}",), **deployment):
    """Map an llmconfig whose LLM brings its own code."""
    config = llmconfig(deployment={"trust_remote_code": True, **deployment})
    return map_llmconfig(config, located=located, allow_remote_code=allowed)


def test_own_code_runs_at_the_commit_that_the_operator_names():
    """trust_remote_code passes with exactly the commit of an entry, also if that is named for the tokenizer again."""
    for deployment in ({"revision": COMMIT}, {"revision": COMMIT, "tokenizer_revision": COMMIT}):
        spec = own_code(**deployment).spec
        assert json.loads(spec.engine_args)["trust_remote_code"] is True
        assert spec.revision == COMMIT
    both = (f"org/llm@{OTHER_COMMIT}", f"org/llm@{COMMIT}")
    assert own_code(allowed=both, revision=OTHER_COMMIT).spec.revision == OTHER_COMMIT
    assert fingerprint(trust_remote_code=False) == fingerprint()


@pytest.mark.parametrize(
    "deployment",
    [
        {"revision": "refs/pr/7"},
        {"revision": OTHER_COMMIT},
        {"revision": COMMIT[:12]},
        {"revision": COMMIT.upper()},
        {"revision": "main"},
        {"revision": None},
        {},
        {"revision": COMMIT, "tokenizer_revision": OTHER_COMMIT},
        {"revision": COMMIT, "tokenizer_revision": "main"},
    ],
)
def test_own_code_of_another_commit_is_refused(deployment):
    """No branch, no pull request, no other commit, and none left to the hub; for the tokenizer as for the LLM."""
    with pytest.raises(InvalidField):
        own_code(**deployment)


@pytest.mark.parametrize(
    "allowed",
    [(), (f"org/other@{COMMIT}",), (f"org@{COMMIT}",), (f"Org/LLM@{COMMIT}",), ("org/llm",), ("/org/llm",)],
)
def test_own_code_of_other_models_is_refused(allowed):
    """An entry holds for one model alone."""
    with pytest.raises(InvalidField, match="runs code that comes with the LLM, which is not allowed for this one"):
        own_code(allowed=allowed, revision=COMMIT)


def test_a_refused_commit_is_told_what_is_allowed():
    """The error names the commit to give."""
    with pytest.raises(InvalidField, match=f"allowed only at the commit {COMMIT}; give it as args.deployment.revision"):
        own_code()


def test_own_code_of_a_folder():
    """A folder's code runs if the operator names the folder; an entry for a hub model of the same name is none."""
    assert own_code("/llms/a", ("/llms/a",)).spec.model == "org/llm"
    for allowed in (("/llms/b",), ("/llms",), (f"org/llm@{COMMIT}",), (f"/llms/a@{COMMIT}",)):
        with pytest.raises(InvalidField, match="not allowed for this one"):
            own_code("/llms/a", allowed, revision=COMMIT)


@pytest.mark.parametrize(
    "word",
    [
        *("tokenizer", "hf_config_path", "model_weights", "code_revision", "hf_overrides", "config", "gguf_file"),
        *("model_class_overrides", "worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors"),
        *("io_processor_plugin", "reasoning_parser_plugin", "additional_config", "model_loader_extra_config"),
        *("speculative_config", "spec_model", "default_mm_loras", "enable_lora", "adapter_name", "adapter_kwargs"),
        *("pipeline_class", "custom_generate", "use_kernels", "allow_all_kernels", "model_kwargs", "subfolder"),
        *("feature_extractor", "image_processor", "video_processor", "processor", "quantization_config"),
        *("allowed_local_media_path", "allowed_media_domains", "chat_template"),
    ],
)
def test_no_word_names_other_code_or_another_repository(word):
    """Everything in args.deployment that names code, a file or a second repository is refused, also with own code."""
    with pytest.raises(InvalidField):
        own_code(revision=COMMIT, **{word: "other/repo"})


@pytest.mark.parametrize(
    "word",
    ["worker_cls", "logits_processors", "hf_overrides", "download_dir", "kv_transfer_config", "hf_token", "tokenizer"],
)
def test_engine_arguments_that_are_not_for_clients(word):
    """What runs code, reads files, opens ports or carries secrets can't come from a client."""
    assert problem(map_deployment, {word: "x"}).field == f"args.deployment.{word}"


# --- the whole llmconfig -----------------------------------------------------------------------------------


def test_the_contract_s_example():
    """The llmconfig of the contract becomes what vLLM needs, and says what it did."""
    args = map_llmconfig(
        llmconfig(
            {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
            {"torch_dtype": "torch.bfloat16", "device_map": "auto"},
            model="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        )
    )
    assert args.spec.model == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert args.spec.modeltyp == "text-generation"
    assert args.spec.engine_args == '{"dtype":"bfloat16","runner":"generate"}'
    assert (args.spec.revision, args.spec.gpus, args.uses_chat_template) == (None, 0, True)
    assert args.prompting == {"max_tokens": 256, "temperature": 0.7, "top_k": 50, "top_p": 0.95}
    assert args.notes == (
        "args.prompting.max_new_tokens was translated to max_tokens",
        "args.deployment.device_map has no meaning on vLLM and was dropped: Ray gives the engine its GPUs",
        "args.deployment.torch_dtype was translated to dtype",
    )


def test_llm_args_cross_processes():
    """The result pickles, as it has to for a Ray actor."""
    args = map_llmconfig(llmconfig({"stop_strings": ["a"]}, {"max_model_len": 64}))
    assert pickle.loads(pickle.dumps(args)) == args


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"modeltyp": None}, "modeltyp"),
        ({"modeltyp": "text-generatoin"}, "modeltyp"),
        ({"modeltyp": ["text-generation"]}, "modeltyp"),
        ({"modeltyp": "text2text-generation"}, "modeltyp"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": " a"}, "model"),
        ({"model": "a\0b"}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"model": "s3://bucket/llm"}, "model"),
        ({"model": "x" * 513}, "model"),
        ({"uses_chat_template": None}, "uses_chat_template"),
        ({"uses_chat_template": "true"}, "uses_chat_template"),
        ({"args": None}, "args"),
        ({"args": {"deployment": {}}}, "args.prompting"),
        ({"args": {"prompting": {}}}, "args.deployment"),
        ({"args": {"prompting": {}, "deployment": []}}, "args.deployment"),
        ({"args": {"prompting": {"top_q": 1}, "deployment": {}}}, "args.prompting.top_q"),
    ],
)
def test_field_at_fault_is_named(changed, field):
    """A missing or invalid field is named, below where the llmconfig stands in the client's body."""
    with pytest.raises(InvalidField) as caught:
        map_llmconfig(llmconfig(**changed), field="llms[2]")
    assert caught.value.field == f"llms[2].{field}"
    str(caught.value).encode()


def test_modeltyp_suggests_and_lists():
    """An unknown modeltyp is answered with the nearest, and with all there are."""
    text = str(problem(map_llmconfig, llmconfig(modeltyp="text-generaton")))
    assert "did you mean text-generation?" in text
    assert all(modeltyp in text for modeltyp in TASKS)


def test_modeltyps_of_one_engine_share_it():
    """The words conversational and text-generation name the same engine; an embedding one is another."""
    prints = {typ: map_llmconfig(llmconfig(modeltyp=typ)).spec.fingerprint for typ in TASKS}
    assert prints["conversational"] == prints["text-generation"]
    assert prints["embedding"] == prints["feature-extraction"] == prints["sentence-similarity"]
    assert len(set(prints.values())) == 3


def test_no_sampling_without_text():
    """An LLM that writes no text gets no prompting arguments, and the client is told."""
    args = map_llmconfig(llmconfig({"max_new_tokens": 5}, modeltyp="feature-extraction"))
    assert args.prompting == {}
    assert args.notes == ("args.prompting was dropped: feature-extraction writes no text",)
    assert json.loads(args.spec.engine_args) == {"runner": "pooling", "convert": "embed"}


@pytest.mark.parametrize(
    ("deployment", "gpus"),
    [
        ({}, 0),
        ({"tensor_parallel_size": 1}, 0),
        ({"tensor_parallel_size": 4}, 4),
        ({"pipeline_parallel_size": 3}, 3),
        ({"pipeline_parallel_size": 1}, 0),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, 8),
        ({"tp_size": 2}, 2),
    ],
)
def test_gpus_from_parallel_sizes(deployment, gpus):
    """An LLM needs as many GPUs as its parallel sizes multiply to; 0 means what the wrapper has."""
    assert map_llmconfig(llmconfig(deployment=deployment)).spec.gpus == gpus


def test_revision_is_the_spec_s():
    """The revision is a field of the spec, not an engine argument; main is the same as none."""
    spec = map_llmconfig(llmconfig(deployment={"revision": "abc123"})).spec
    assert spec.revision == "abc123"
    assert "revision" not in json.loads(spec.engine_args)
    assert fingerprint(revision="main") == fingerprint() != fingerprint(revision="abc123")


def test_equal_meaning_equal_fingerprint():
    """Spelling, words without meaning and values that ask for nothing don't make another LLM."""
    assert (
        fingerprint(torch_dtype="torch.bfloat16")
        == fingerprint(dtype="bfloat16")
        == fingerprint(torch_dtype="bfloat16", device_map="auto", low_cpu_mem_usage=True)
        == fingerprint(dtype="torch.bfloat16", kv_cache_dtype="auto", pipeline_parallel_size=1, max_model_len=None)
    )
    assert fingerprint(torch_dtype="auto") == fingerprint() == fingerprint(load_in_8bit=False)
    assert fingerprint(gpu_memory_utilization=1) == fingerprint(gpu_memory_utilization=1.0)
    assert fingerprint(max_position_embeddings=64) == fingerprint(max_model_len=64.0)
    assert fingerprint(pipeline_parallel_size=2) == fingerprint(pipeline_parallel_size=2, tensor_parallel_size=1)


def test_other_meaning_other_fingerprint():
    """Every case that asks for something else makes another LLM."""
    spelled = {
        map_llmconfig(llmconfig(deployment={word: value})).spec.fingerprint: (to, json.dumps(expected))
        for word, value, to, expected in TAKEN_DEPLOYMENT
    }
    assert len(spelled) == len({(to, json.dumps(expected)) for _, _, to, expected in TAKEN_DEPLOYMENT})
    assert fingerprint() not in spelled
    assert map_llmconfig(llmconfig(model="org/other")).spec.fingerprint != fingerprint()


# --- properties --------------------------------------------------------------------------------------------

prompting_cases = st.lists(st.sampled_from(TAKEN_PROMPTING), max_size=6).map(lambda cases: {c[0]: c[1] for c in cases})
deployment_cases = st.lists(st.sampled_from(TAKEN_DEPLOYMENT), max_size=6).map(
    lambda cases: {c[0]: c[1] for c in cases}
)
words = st.sampled_from([*PROMPTING, *DEPLOYMENT]) | st.text(max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def outcome(config):
    """The result, or the error in words."""
    try:
        return map_llmconfig(config)
    except InvalidField as error:
        return str(error)


@settings(deadline=None)
@given(st.dictionaries(words, json_values, max_size=5), st.dictionaries(words, json_values, max_size=5), st.data())
def test_any_json_maps_or_names_its_fault(prompting, deployment, data):
    """Whatever JSON comes, it maps to strict JSON or raises InvalidField, and its order makes no difference."""
    found = outcome(llmconfig(prompting, deployment))
    if not isinstance(found, str):
        json.dumps([found.prompting, json.loads(found.spec.engine_args)], allow_nan=False)
    shuffled = [dict(data.draw(st.permutations(list(args.items())))) for args in (prompting, deployment)]
    assert outcome(llmconfig(*shuffled)) == found


@settings(deadline=None)
@given(prompting_cases, deployment_cases, st.data())
def test_order_never_matters(prompting, deployment, data):
    """The order of keys changes neither the result nor the error."""
    shuffled = [dict(data.draw(st.permutations(list(args.items())))) for args in (prompting, deployment)]
    assert outcome(llmconfig(*shuffled)) == outcome(llmconfig(prompting, deployment))


@settings(deadline=None)
@given(prompting_cases, deployment_cases)
def test_prompting_never_changes_the_llm(prompting, deployment):
    """Requests that differ in prompting alone share one running LLM."""
    with_it, without = outcome(llmconfig(prompting, deployment)), outcome(llmconfig({}, deployment))
    if not isinstance(with_it, str):
        assert with_it.spec == without.spec


@settings(deadline=None)
@given(prompting_cases)
def test_mapping_again_changes_nothing(prompting):
    """Words of vLLM map to themselves, so that a mapped body can be mapped again."""
    found = outcome(llmconfig(prompting))
    if not isinstance(found, str):
        assert map_prompting(found.prompting).values == found.prompting


# --- docs and imports --------------------------------------------------------------------------------------


def test_docs_are_current():
    """docs/llm-args.md says what the tables say; `python -m deployments.models.args.mapping` prints it."""
    assert (ROOT / "docs/llm-args.md").read_text() == as_markdown()


def test_docs_name_every_word():
    """Each word of both tables is in the docs, and no cell breaks its row."""
    text = as_markdown()
    assert all(f"`{word}`" in text for word in [*PROMPTING, *DEPLOYMENT, *TASKS])
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {3, 4, 5}


def test_import_is_light():
    """The ingress can import the mapping without vLLM, torch or transformers."""
    code = "import deployments.models.args.mapping, sys; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_types_of_other_answers_are_told_apart_for_clients() -> None:
    """`greenprompt measure` refuses exactly the types whose LLMs write no text."""
    assert {name for name, task in TASKS.items() if not task.generates} == POOLING_TYPES
