"""Hostile llmconfigs: what a client may ask the registry to load, and with which arguments."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.hostile.registry_calls import ASKED, LLM, REQUEST
from tests.support.hostile.rows import Hostile

_INVALID = (422,)


def _llm(name: str, source: str = "own: field", status: tuple[int, ...] = _INVALID, **changed: Any) -> Hostile:
    return Hostile(name, REQUEST, {**ASKED, "llms": [{**LLM, **changed}]}, status, source)


def _arg(word: str, value: object, source: str = "own: argument", kind: str = "deployment") -> Hostile:
    args: dict[str, Any] = {"prompting": {}, "deployment": {}} | {kind: {word: value}}
    return _llm(f"{kind}.{word} of {str(value)[:40]!r}", source, args=args)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


MODELS = [
    "", " ", ".", "..", "/", "a/b/c", "org/", "/etc/passwd", "/etc", "../../etc", "./llms/a", "~root/x", "~/x", "file:///etc/passwd",
    "http://evil.example/x", "https://169.254.169.254/latest", "s3://bucket/x", "gs://bucket/x", "org/llm@main", "org/llm:latest",
    "org/llm?x=1", "org/llm#x", "org\\llm", "org/llm\n", "org/llm\0", "org/ll m", "$(id)", "`id`", "{{7*7}}", "-x", "--trust-remote-code",
    "org/\u0440\u0443\u0441", "\ud83d\ude00", "org/\u202ellm", "x" * 1025, "'; DROP TABLE requests; --", "/proc/self/environ", "//evil.example/share",
    "org/../../etc", "datasets/org/x/y", "evil.example:5000/org/llm", 7, None, True, ["org/tiny"], {"a": 1},
]  # fmt: skip
"""Values that are no model: paths, URLs, ids that are invalid on the hub, and values of other types."""


def _models() -> Iterator[Hostile]:
    for number, model in enumerate(MODELS):
        yield _llm(
            f"model {number}: {str(model)[:40]!r}",
            "GHSA-93jv-pvg8-hf3v" if "//" in str(model) else "own: model",
            model=model,
        )


_TYPES: tuple[Any, ...] = ("", "x", "text-generation ", "TEXT-GENERATION\0", 7, None, ["text-generation"])
_FLAGS: tuple[Any, ...] = ("true", 1, 0, None, [])
_ARGS: tuple[Any, ...] = (None, [], "x", {}, {"prompting": {}}, {"deployment": {}}, {"prompting": [], "deployment": {}}, {"prompting": {}, "deployment": {}, "x": {}})  # fmt: skip
FIELDS = [
    *(_llm(f"modeltyp {str(value)[:30]!r}", modeltyp=value) for value in _TYPES),
    *(_llm(f"uses_chat_template {value!r}", uses_chat_template=value) for value in _FLAGS),
    *(_llm(f"args {str(value)[:40]!r}", args=value) for value in _ARGS),
    _llm("an unknown field of an llmconfig", chat_template="{{ 7*7 }}"),
    _llm("a prototype", __proto__={"role": "operator"}),
    _llm("a class", __class__="x"),
    _llm("args 33 deep", args={"prompting": {}, "deployment": {"a": _nested(40)}}),
    _llm("args of 300 kB", args={"prompting": {"stop": "x" * 300_000}, "deployment": {}}),
    _llm("20000 arguments", args={"prompting": {f"a{n}": 1 for n in range(20_000)}, "deployment": {}}),
]  # fmt: skip

DEPLOYMENT = [
    _arg("trust_remote_code", True, "GHSA-2pc9-4j83-qjmr"),
    _arg("trust_remote_code", "true", "GHSA-7972-pg2x-xr59"),
    _arg("code_revision", "main", "GHSA-3ww4-5jv9-j5gm"),
    _arg("revision", "refs/pr/7", "GHSA-3ww4-5jv9-j5gm"),
    _arg("revision", "pr/7", "GHSA-3ww4-5jv9-j5gm"),
    _arg("revision", "refs/heads/../pr/7", "GHSA-3ww4-5jv9-j5gm"),
    _arg("revision", "../../etc", "own: path"),
    _arg("revision", "a b", "own: path"),
    _arg("revision", "", "own: path"),
    _arg("revision", "x" * 5000, "own: path"),
    _arg("tokenizer_revision", "refs/pr/7", "GHSA-3ww4-5jv9-j5gm"),
    _arg("tokenizer", "/etc", "own: path"),
    _arg("tokenizer", "org/other", "GHSA-8fr4-5q9j-m8gm"),
    _arg("tokenizer_mode", "custom", "own: code"),
    _arg("hf_config_path", "org/other", "GHSA-8fr4-5q9j-m8gm"),
    _arg("hf_overrides", {"auto_map": {"AutoConfig": "org/x--m.C"}}, "GHSA-8fr4-5q9j-m8gm"),
    _arg("load_format", "pt", "GHSA-rh4j-5rhw-hr54"),
    _arg("load_format", "tensorizer", "own: format"),
    _arg("model_loader_extra_config", {"x": 1}, "own: format"),
    _arg("download_dir", "/etc", "own: path"),
    _arg("quantization", "gguf", "GHSA-5jv2-g5wq-cmr4"),
    _arg("chat_template", "{{ 7*7 }}", "GHSA-6fvq-23cw-5628"),
    _arg("middleware", "os.system", "own: code"),
    _arg("worker_cls", "os.system", "own: code"),
    _arg("worker_extension_cls", "os.system", "own: code"),
    _arg("logits_processors", ["os.system"], "own: code"),
    _arg("reasoning_parser_plugin", "/x.py", "own: code"),
    _arg("tool_parser_plugin", "/x.py", "own: code"),
    _arg("tool_call_parser", "no_such_parser", "GHSA-79j6-g2m3-jgfw"),
    _arg("tool_call_parser", "../../x", "own: path"),
    _arg("speculative_config", {"model": "org/x"}, "GHSA-83vm-p52w-f9pw"),
    _arg("speculative_model", "org/x", "GHSA-83vm-p52w-f9pw"),
    _arg("kv_transfer_config", {"kv_connector": "x", "kv_connector_module_path": "os"}, "GHSA-hj4w-hm2g-p6w5"),
    _arg("enable_prompt_embeds", True, "GHSA-mrw7-hf4f-83pf"),
    _arg("enable_mm_embeds", True, "GHSA-pmqf-x6x8-p7qw"),
    _arg("allowed_local_media_path", "/", "GHSA-4hhp-h66f-j5j7"),
    _arg("allowed_media_domains", ["169.254.169.254"], "GHSA-qh4c-xf7m-gxfc"),
    _arg("media_io_kwargs", {"video": {"num_frames": 10**9}}, "GHSA-pq5c-rjhq-qp7p"),
    _arg("mm_processor_kwargs", {"code_revision": "x"}, "GHSA-h3rc-6mm3-gc2m"),
    _arg("enable_lora", True, "own: adapter"),
    _arg("lora_modules", [{"name": "x", "path": "/etc"}], "own: adapter"),
    _arg("override_pooler_config", {"x": 1}, "GHSA-q8gq-377p-jq3r"),
    _arg("api_key", "x", "own: server"),
    _arg("host", "0.0.0.0", "own: server"),
    _arg("port", 22, "own: server"),
    _arg("ssl_keyfile", "/etc/x", "own: server"),
    _arg("token", "hf_x", "GHSA-x9hg-5q6g-q3jr"),
    _arg("use_auth_token", True, "GHSA-x9hg-5q6g-q3jr"),
    _arg("no_such_argument", 1),
    _arg("__class__", 1),
    _arg("", 1),
    _arg("max_model_len", 0),
    _arg("max_model_len", -2),
    _arg("max_model_len", 1.5),
    _arg("max_model_len", "1e9x"),
    _arg("tensor_parallel_size", 0),
    _arg("tensor_parallel_size", -1),
    _arg("tensor_parallel_size", "x"),
    _arg("gpu_memory_utilization", 0),
    _arg("gpu_memory_utilization", 1.1),
    _arg("gpu_memory_utilization", "NaN"),
    _arg("kv_cache_memory_bytes", -1),
    _arg("cpu_offload_gb", -1),
    _arg("torch_dtype", "torch.load"),
    _arg("torch_dtype", "os.system"),
    _arg("seed", 2**64),
]  # fmt: skip

PROMPTING = [
    _arg(word, value, kind="prompting")
    for word, values in {
        "max_new_tokens": (0, -1, 1.5, "x", [1], True),
        "min_new_tokens": (-1, "x"),
        "temperature": (-1, 3, "hot", [1], "NaN", "inf"),
        "top_p": (0, 2, -0.1),
        "top_k": (-2, 1.5),
        "min_p": (-1, 2),
        "repetition_penalty": (0, -1),
        "presence_penalty": (3,),
        "seed": (-1, 1.5),
        "stop": ("", [], [""], ["a"] * 5, 7),
        "stop_token_ids": (-1, [-1], ["x"]),
        "bad_words": ([""], ["a"] * 65),
        "logit_bias": ({"x": 1}, {"-1": 1}, {"1": 101}, [1]),
        "allowed_token_ids": (-1, []),
        "truncate_prompt_tokens": (0, -2),
        "n": (2, 10**9),
        "best_of": (10**9,),
        "chat_template_kwargs": ({"chat_template": "{{ 7*7 }}"}, {"a": [1]}, [1]),
        "reasoning_effort": ("godlike",),
        "guided_regex": ("(a+)+b",),
        "structured_outputs": ({"regex": "(a+)+b"},),
        "response_format": ({"type": "json_object"},),
        "logits_processor": (["os.system"],),
        "prompt_embeds": ("AAAA",),
        "lora_request": ({"lora_path": "/etc"},),
        "chat_template": ("{{ 7*7 }}",),
        "vllm_xargs": ({"a": 1},),
        "custom_generate": ("org/x",),
        "no_such_argument": (1,),
    }.items()
    for value in values
]

ROWS = [*_models(), *FIELDS, *DEPLOYMENT, *PROMPTING]
