"""Words and values of an llmconfig that are not allowed, and the remedies that are told."""

import pytest

from deployments.models.args.mapping import map_deployment, map_prompting
from deployments.models.args.rules import Mapped
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from tests.support.llm_args import problem, rules

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


@pytest.mark.parametrize(
    "word",
    ["worker_cls", "logits_processors", "hf_overrides", "download_dir", "kv_transfer_config", "hf_token", "tokenizer"],
)
def test_engine_arguments_that_are_not_for_clients(word):
    """What runs code, reads files, opens ports or carries secrets can't come from a client."""
    assert problem(map_deployment, {word: "x"}).field == f"args.deployment.{word}"
