"""Hostile prompts: what the holder of a lease may send to its wrapper, on both APIs."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import base64
from typing import Any

from tests.support.hostile.rows import Hostile

COMPLETE, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
MESSAGES, RESPONSES, PROCESS = "/v1/messages", "/v1/responses", "/process_prompt"
OK, BAD, UNKNOWN, INVALID, GONE = (200,), (400,), (404,), (422,), (0,)
VLLM_FAILS = (500,)
"""vLLM answers some mistakes of the client with 500. They have no other effect."""

USER = [{"role": "user", "content": "Why?"}]
DEEP = 10_000


def _complete(name: str, status: tuple[int, ...], source: str = "own: parameter", **body: Any) -> Hostile:
    return Hostile(name, COMPLETE, {"prompt": "Why?", "max_tokens": 4, **body}, status, source)


def _chat(name: str, status: tuple[int, ...], source: str = "own: chat", **body: Any) -> Hostile:
    return Hostile(name, CHAT, {"messages": USER, "max_completion_tokens": 4, **body}, status, source)


def _part(**part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "Why?"}, part]}]


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    function = {"name": name, "description": "", "parameters": parameters}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": name}},
    }


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


_GROWTH = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"

NUMBERS = [
    _complete("n of 10^9", INVALID, "GHSA-3mwp-wvh9-7528", n=10**9),
    _complete("n of 2^63", INVALID, "GHSA-3mwp-wvh9-7528", n=2**63),
    _complete("n of 0", BAD, n=0),
    _complete("n below 0", BAD, n=-1),
    _complete("n of text", INVALID, n="many"),
    _complete("n with a fraction", INVALID, n=1.5),
    _complete("max_tokens of 2^63", BAD, max_tokens=2**63),
    _complete("max_tokens of 10^400", BAD, max_tokens=10**400),
    _complete("max_tokens beyond the context", BAD, max_tokens=10**6),
    _complete("max_tokens below 0", BAD, max_tokens=-1),
    _complete("max_tokens of text", BAD, max_tokens="lots"),
    _complete("max_tokens in a list", BAD, max_tokens=[4]),
    _complete("min_tokens above max_tokens", BAD, "GHSA-4xqp-c3mv-qff7", min_tokens=5),
    _complete("min_tokens of 2^63", BAD, "GHSA-4xqp-c3mv-qff7", min_tokens=2**63),
    _complete("min_tokens below 0", BAD, min_tokens=-1),
    _complete("temperature below 0", BAD, temperature=-1),
    _complete("temperature of 10^308", BAD, temperature=1e308),
    _complete("temperature of text", BAD, temperature="hot"),
    _complete("top_p of 0", BAD, top_p=0),
    _complete("top_p of 2", BAD, top_p=2),
    _complete("top_p below 0", BAD, top_p=-0.1),
    _complete("top_k below -1", BAD, top_k=-2),
    _complete("top_k of 2^63", OK, top_k=2**63),
    _complete("min_p of 2", BAD, min_p=2),
    _complete("repetition_penalty of 0", BAD, repetition_penalty=0),
    _complete("repetition_penalty below 0", BAD, repetition_penalty=-1),
    _complete("repetition_penalty of 10^308", OK, repetition_penalty=1e308),
    _complete("repetition_penalty of 1.1", OK, "GHSA-83vm-p52w-f9pw", repetition_penalty=1.1),
    _complete("presence_penalty of 3", BAD, presence_penalty=3),
    _complete("frequency_penalty of -3", BAD, frequency_penalty=-3),
    _complete("seed of 2^64", BAD, seed=2**64),
    _complete("seed below -2^63", BAD, seed=-(2**64)),
    _complete("priority of 1", OK, priority=1),
    _complete("priority of 2^80", BAD, priority=2**80),
    _complete("length_penalty of 10^308", OK, length_penalty=1e308),
    _complete("stream_interval of 0", BAD, stream=True, stream_interval=0),
    _complete("thinking_token_budget below -1", BAD, thinking_token_budget=-5),
    _complete("truncate_prompt_tokens of -1", OK, truncate_prompt_tokens=-1),
    _complete("truncate_prompt_tokens of -2", BAD, truncate_prompt_tokens=-2),
    _complete("truncate_prompt_tokens of 0", BAD, truncate_prompt_tokens=0),
    _complete("truncate_prompt_tokens of 2^70", BAD, truncate_prompt_tokens=2**70),
    _complete("a beam of 10^6", INVALID, use_beam_search=True, n=10**6),
    _complete("a beam of 100000 without a limit", INVALID, use_beam_search=True, n=100_000, max_tokens=500),
    _complete(
        "repetition_detection of huge sizes", BAD, repetition_detection={"max_pattern_size": 10**12, "min_count": -1}
    ),
]

TOKENS = [
    _complete("an empty prompt", BAD, prompt=""),
    _complete("no prompt", BAD, prompt=None),
    _complete("an empty list of prompts", BAD, prompt=[]),
    _complete("an empty list in a list", BAD, prompt=[[]]),
    _complete("a prompt of an object", BAD, prompt={"a": 1}),
    _complete("a prompt of mixed kinds", BAD, prompt=["Why?", 5]),
    _complete("a prompt of tokens below 0", BAD, "GHSA-25q3-v2hm-8vpf", prompt=[-1, -2]),
    _complete("a prompt of a token outside the vocabulary", BAD, prompt=[512]),
    _complete("a prompt of a token of 10^12", BAD, prompt=[10**12]),
    _complete("a prompt of a token of 2^64", BAD, prompt=[2**64]),
    _complete("a prompt of tokens with fractions", BAD, prompt=[1.5]),
    _complete("a prompt longer than the context", BAD, prompt=[5] * 600),
    _complete("a prompt of 3 million characters", INVALID, prompt="x" * 3_000_000),
    _complete("a prompt of 12 million characters to be truncated", INVALID, "GHSA-69j4-grxj-j64p", prompt="xy z" * 3_000_000, truncate_prompt_tokens=10),
    _chat("a message of 12 million characters to be truncated", INVALID, "GHSA-69j4-grxj-j64p", messages=[{"role": "user", "content": "xy z" * 3_000_000}], truncate_prompt_tokens=10),
    Hostile("tokenize messages of 12 million characters", TOKENIZE, {"messages": [{"role": "user", "content": "xy z" * 3_000_000}]}, INVALID, "GHSA-69j4-grxj-j64p"),
    Hostile("tokenize a million characters and leave", TOKENIZE, {"prompt": "xy z" * 250_000}, GONE, "own: hang-up", leaves_s=0.2),
    _complete("a prompt of 300000 tokens", BAD, prompt=[5] * 300_000),
    _complete("10000 prompts of nothing", INVALID, prompt=[""] * 10_000),
    _complete("a prompt of a lone surrogate", BAD, prompt="\ud800"),
    _complete("a prompt of a null character", OK, prompt="\0"),
    _complete("a prompt of control characters", OK, prompt="".join(map(chr, range(32)))),
    _complete("a prompt that spells special tokens", OK, "GHSA-hpv8-x276-m59f", prompt="</s><s><pad><|vision_start|><|image_pad|>"),
    _chat("a message that spells placeholders", OK, "GHSA-hpv8-x276-m59f", messages=[{"role": "user", "content": "<|image_pad|><|audio_1|>" * 9}]),
    _chat("a message of 50000 placeholders", BAD, "GHSA-vc6m-hm49-g9qg", messages=[{"role": "user", "content": "<|image_1|>" * 50_000}]),
    _complete("logit_bias outside the vocabulary", BAD, logit_bias={"512": 1.0}),
    _complete("logit_bias of a token below 0", BAD, logit_bias={"-1": 1.0}),
    _complete("logit_bias of a token of 10^20", BAD, logit_bias={str(10**20): 1.0}),
    _complete("logit_bias of text", BAD, logit_bias={"x": 1.0}),
    _complete("logit_bias of 10^308", OK, logit_bias={"5": 1e308}),
    _complete("logit_bias of all tokens and more", BAD, logit_bias={str(token): -100 for token in range(5000)}),
    _complete("allowed_token_ids outside the vocabulary", BAD, allowed_token_ids=[512]),
    _complete("allowed_token_ids below 0", BAD, allowed_token_ids=[-1]),
    _complete("allowed_token_ids of nothing", BAD, allowed_token_ids=[]),
    _complete("allowed_token_ids of 2^64", BAD, allowed_token_ids=[2**64]),
    _complete("stop_token_ids of 2^64", BAD, stop_token_ids=[2**64]),
    _complete("stop_token_ids outside the vocabulary", BAD, stop_token_ids=[10**6]),
    _complete("min_tokens with a stop token outside the vocabulary", BAD, "own: token", min_tokens=2, stop_token_ids=[10**6]),
    _complete("min_tokens with a stop token below 0", BAD, "GHSA-25q3-v2hm-8vpf", min_tokens=2, stop_token_ids=[-5]),
    _complete("logprob_token_ids outside the vocabulary", BAD, logprobs=1, logprob_token_ids=[512]),
    _complete("logprob_token_ids below 0", BAD, logprobs=1, logprob_token_ids=[-1]),
    _complete("logprob_token_ids of 2^64", BAD, logprobs=1, logprob_token_ids=[2**64]),
    _complete("bad_words of nothing", BAD, bad_words=[""]),
    _complete("bad_words of spaces", BAD, bad_words=[" "]),
    _complete("10000 bad_words", BAD, bad_words=[f"w{number}" for number in range(10_000)]),
    _complete("stop of nothing", BAD, stop=[""]),
    _complete("stop of 10000 texts", BAD, stop=[f"s{number}" for number in range(10_000)]),
    _complete("stop of a number", BAD, stop=5),
    _complete("stop of a text of 1 MB", OK, stop="x" * 1_000_000),
    _complete("logprobs of 10^6", BAD, logprobs=10**6),
    _complete("logprobs below -1", BAD, logprobs=-2),
    _complete("echo with logprobs", OK, echo=True, logprobs=2),
    _complete("echo without generation", OK, echo=True, max_tokens=0, logprobs=1),
    _complete("prompt_logprobs of 10^6", BAD, prompt_logprobs=10**6),
    _complete("prompt_logprobs in a stream", BAD, prompt_logprobs=1, stream=True),
    _complete("suffix", BAD, suffix="x"),
    Hostile("detokenize below 0", DETOKENIZE, {"tokens": [-1]}, BAD, "own: token"),
    Hostile("detokenize 10^12", DETOKENIZE, {"tokens": [10**12]}, BAD, "own: token"),
    Hostile("detokenize outside the vocabulary", DETOKENIZE, {"tokens": [5000]}, OK, "own: token"),
    Hostile("detokenize text", DETOKENIZE, {"tokens": "x"}, BAD, "own: token"),
    Hostile("tokenize nothing", TOKENIZE, {}, BAD, "own: token"),
    Hostile("tokenize 3 million characters", TOKENIZE, {"prompt": "x" * 3_000_000}, INVALID, "GHSA-69j4-grxj-j64p"),
    Hostile("tokenize with a template", TOKENIZE, {"messages": USER, "chat_template": _GROWTH}, BAD, "GHSA-6fvq-23cw-5628"),
    Hostile("tokenize with a template in its arguments", TOKENIZE, {"messages": USER, "chat_template_kwargs": {"chat_template": _GROWTH}}, BAD, "GHSA-6fvq-23cw-5628"),
    Hostile("tokenize with tokenize", TOKENIZE, {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, OK, "GHSA-69j4-grxj-j64p"),
]  # fmt: skip

TEMPLATES = [
    _chat("a template in the request", BAD, "GHSA-6fvq-23cw-5628", chat_template=_GROWTH),
    _chat("a template that reads the process", BAD, "GHSA-xqmj-j6mv-4862", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    _chat("a template of 1 MB", INVALID, "GHSA-6fvq-23cw-5628", chat_template="{{ 1 }}" * 150_000),
    _chat("a template in the arguments", BAD, "GHSA-6fvq-23cw-5628", chat_template_kwargs={"chat_template": _GROWTH}),
    _chat("tokenize in the arguments", OK, "GHSA-69j4-grxj-j64p", chat_template_kwargs={"tokenize": True}),
    _chat("return_dict in the arguments", OK, "GHSA-69j4-grxj-j64p", chat_template_kwargs={"return_dict": True}),
    _chat("messages in the arguments", BAD, "GHSA-69j4-grxj-j64p", chat_template_kwargs={"conversation": USER * 1000}),
    _chat("unknown arguments of the template", OK, "GHSA-69j4-grxj-j64p", chat_template_kwargs={"x" * 1000: {"y": [1] * 1000}}),
    _chat("arguments of the template of a list", BAD, chat_template_kwargs=[1]),
    _chat("arguments with the name of self", (*OK, *BAD), chat_template_kwargs={"self": 1, "tokenizer": 2}),
    _chat("no messages", BAD, messages=[]),
    _chat("messages of null", BAD, messages=None),
    _chat("messages of text", BAD, messages="Why?"),
    _chat("a message without a role", BAD, messages=[{"content": "Why?"}]),
    _chat("a message of an unknown role", OK, messages=[{"role": "root", "content": "Why?"}]),
    _chat("a message of a role of 1 MB", INVALID, messages=[{"role": "r" * 1_000_000, "content": "Why?"}]),
    _chat("a message of a null content", (*OK, *BAD), messages=[{"role": "user", "content": None}]),
    _chat("a message of a number", BAD, messages=[{"role": "user", "content": 5}]),
    _chat("50000 empty messages", BAD, messages=[{"role": "user", "content": ""}] * 50_000),
    _chat("add_generation_prompt and continue_final_message", BAD, add_generation_prompt=True, continue_final_message=True),
    _chat("documents of numbers", BAD, documents=[1, 2]),
    _chat("a tool's answer to no call", (*OK, *BAD), messages=[{"role": "tool", "content": "x", "tool_call_id": "y"}]),
    _chat("an assistant's call with arguments that are not JSON", OK, messages=[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]),
    _chat("an assistant's call with deep arguments", VLLM_FAILS, messages=[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * DEEP}}]}]),
    _chat("top_logprobs of 10^6", BAD, logprobs=True, top_logprobs=10**6),
    _chat("top_logprobs without logprobs", BAD, top_logprobs=2),
    _chat("max_completion_tokens of 2^63", BAD, max_completion_tokens=2**63),
    _chat("reasoning_effort of an unknown kind", BAD, reasoning_effort="godlike"),
    _chat("n of 10^9 in a chat", INVALID, "GHSA-3mwp-wvh9-7528", n=10**9),
]  # fmt: skip

GRAMMARS = [
    _chat("a schema that is no JSON schema", BAD, "GHSA-6qc9-v4r8-22xg", response_format=_schema({"type": "stsring"})),
    _chat("a schema of a list", BAD, "GHSA-6qc9-v4r8-22xg", response_format=_schema([1, 2])),
    _chat("a schema of text", BAD, "GHSA-6qc9-v4r8-22xg", response_format=_schema("{")),
    _complete("structured_outputs of an invalid schema", BAD, "GHSA-6qc9-v4r8-22xg", structured_outputs={"json": {"properties": {"reason": {"type": "stsring"}}}}),
    _complete("structured_outputs of text that is no schema", BAD, "GHSA-6qc9-v4r8-22xg", structured_outputs={"json": "{"}),
    _complete("a regex that is invalid", BAD, "GHSA-9hcf-v7m4-6m2j", structured_outputs={"regex": "("}),
    _complete("a regex with lookahead", BAD, "GHSA-9hcf-v7m4-6m2j", structured_outputs={"regex": "(?=a)b"}),
    _complete("a regex with a back reference", BAD, "GHSA-9hcf-v7m4-6m2j", structured_outputs={"regex": r"(a)\1"}),
    _complete("a regex that backtracks", OK, "GHSA-rwxx-mrjm-wc2m", structured_outputs={"regex": "(a+)+b"}),
    _complete("a regex of nested repeats", (*OK, *BAD), "GHSA-rwxx-mrjm-wc2m", structured_outputs={"regex": "((a{1,50}){1,50}){1,50}"}),
    _complete("a regex of alternatives that explode", (*OK, *BAD), "GHSA-rwxx-mrjm-wc2m", structured_outputs={"regex": "(a|b)*a" + "(a|b)" * 20}),
    _complete("a regex of 4097 characters", INVALID, "GHSA-rwxx-mrjm-wc2m", structured_outputs={"regex": "a" * 4097}),
    _complete("a regex of a number", BAD, structured_outputs={"regex": 5}),
    _complete("a regex of 10^9 repeats", (*OK, *BAD), "GHSA-rwxx-mrjm-wc2m", structured_outputs={"regex": "a{1000000000}"}),
    _chat("a tool with a malformed pattern", OK, "GHSA-vrq3-r879-7m65", **_tool({"type": "object", "properties": {"a": {"type": "string", "pattern": r"\d{"}}})),
    _chat("a tool with an unknown type", OK, "GHSA-vrq3-r879-7m65", **_tool({"type": "object", "properties": {"a": {"type": "something"}}})),
    _chat("a tool with a template as type", OK, "GHSA-vrq3-r879-7m65", **_tool({"type": "object", "properties": {"a": {"type": {"{{ 7*7 }}": 1}}}})),
    _chat("a tool with a pattern that backtracks", (*OK, *BAD), "GHSA-vrq3-r879-7m65", **_tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}}})),
    _chat("a tool with a pattern of 4097 characters", INVALID, "GHSA-vrq3-r879-7m65", **_tool({"type": "object", "properties": {"a": {"pattern": "a" * 4097}}})),
    _chat("a tool with code for its name", OK, "GHSA-79j6-g2m3-jgfw", **_tool({"type": "object"}, name="__import__('os').system('id')")),
    _chat("a tool with parameters of text", BAD, **_tool("x")),
    _chat("a tool_choice of an unknown tool", BAD, **(_tool({"type": "object"}) | {"tool_choice": {"type": "function", "function": {"name": "g"}}})),
    _chat("a tool_choice without tools", BAD, tool_choice="required"),
    _chat("a schema that refers to itself", VLLM_FAILS, "GHSA-5cmr-4px5-23pc", response_format=_schema({"$ref": "#"})),
    _chat("a schema of two that refer to each other", VLLM_FAILS, "GHSA-5cmr-4px5-23pc", response_format=_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
    _chat("a schema with a reference to a file", OK, "own: reference", response_format=_schema({"$ref": "file:///etc/passwd"})),
    _chat("a schema with a reference to an address", OK, "own: reference", response_format=_schema({"$ref": "http://{canary}/x"})),
    _chat("a schema 200 deep", INVALID, "GHSA-7rgv-gqhr-fxg3", response_format=_schema(_nested(200))),
    _chat("a schema of 3000 values", (*OK, *BAD), "GHSA-9q5r-wfvf-rr7f", response_format=_schema({"enum": [f"v{number}" for number in range(3000)]})),
    _chat("a schema above 64 KiB", INVALID, "GHSA-9q5r-wfvf-rr7f", response_format=_schema({"enum": ["v" * 100] * 700})),
    _complete("a choice of 20000", INVALID, "GHSA-9q5r-wfvf-rr7f", structured_outputs={"choice": [f"v{number}" for number in range(20_000)]}),
    _complete("a choice of nothing", BAD, structured_outputs={"choice": []}),
    _complete("a choice of numbers", BAD, structured_outputs={"choice": [1, 2]}),
    _complete("a grammar that calls itself", VLLM_FAILS, "GHSA-5cmr-4px5-23pc", structured_outputs={"grammar": "root ::= root"}),
    _complete("a grammar of left recursion", (*OK, *BAD), "GHSA-5cmr-4px5-23pc", structured_outputs={"grammar": 'root ::= root "a" | "a"'}),
    _complete("a grammar of 10000 brackets", (*OK, *BAD), "GHSA-7rgv-gqhr-fxg3", structured_outputs={"grammar": "root ::= " + "(" * DEEP + '"a"' + ")" * DEEP}),
    _complete("a grammar of nothing", BAD, structured_outputs={"grammar": ""}),
    _complete("a grammar without a root", BAD, structured_outputs={"grammar": 'a ::= "b"'}),
    _complete("two grammars", BAD, structured_outputs={"regex": "a", "choice": ["b"]}),
    _complete("a backend of one's choice", (*OK, *BAD), structured_outputs={"regex": "a", "_backend": "outlines"}),
    _complete("a structural tag that is no JSON", BAD, structured_outputs={"structural_tag": "{"}),
    _complete("a structural tag of a wrong form", BAD, response_format={"type": "structural_tag", "format": {"type": "x"}}),
    _complete("a response_format of an unknown type", BAD, response_format={"type": "xml"}),
    _complete("a response_format of text", BAD, response_format="json"),
]  # fmt: skip

MEDIA = [
    _chat("an image from an address", BAD, "GHSA-qh4c-xf7m-gxfc", messages=_part(type="image_url", image_url={"url": "http://{canary}/a.png"})),
    _chat("an image from an address with a backslash", BAD, "GHSA-v359-jj2v-j536", messages=_part(type="image_url", image_url={"url": "http://{canary}\\@example.org/a.png"})),
    _chat("an image from an address with a user", BAD, "GHSA-v359-jj2v-j536", messages=_part(type="image_url", image_url={"url": "http://example.org@{canary}/a.png"})),
    _chat("an image from the metadata of a cloud", BAD, "GHSA-qh4c-xf7m-gxfc", messages=_part(type="image_url", image_url={"url": "http://169.254.169.254/latest/meta-data"})),
    _chat("an image from a file", BAD, "GHSA-qh4c-xf7m-gxfc", messages=_part(type="image_url", image_url={"url": "file:///etc/passwd"})),
    _chat("an image of bytes that are none", BAD, "GHSA-4r2x-xpjr-7cvv", messages=_part(type="image_url", image_url={"url": "data:image/png;base64,AAAA"})),
    _chat("an image of broken base64", BAD, "GHSA-4r2x-xpjr-7cvv", messages=_part(type="image_url", image_url={"url": "data:image/png;base64,%%%"})),
    Hostile("an image of bytes that are none, in Anthropic's form", MESSAGES, {"model": "x", "max_tokens": 4, "messages": _part(type="image", source={"type": "base64", "media_type": "image/png", "data": "AAAA"})}, (*BAD, *UNKNOWN), "GHSA-hgg8-fqqc-vfmw"),
    _chat("embeddings of an image", BAD, "GHSA-pmqf-x6x8-p7qw", messages=_part(type="image_embeds", image_embeds="AAAA")),
    _chat("a video of many frames", BAD, "GHSA-pq5c-rjhq-qp7p", messages=_part(type="video_url", video_url={"url": "data:video/jpeg;base64," + "AAAA," * 5000})),
    _chat("a video from an address", BAD, "GHSA-4r2x-xpjr-7cvv", messages=_part(type="video_url", video_url={"url": "http://{canary}/a.mp4"})),
    _chat("audio from an address", BAD, "GHSA-6pr9-rp53-2pmc", messages=_part(type="audio_url", audio_url={"url": "http://{canary}/a.wav"})),
    _chat("audio of bytes that are none", BAD, "GHSA-6pr9-rp53-2pmc", messages=_part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"})),
    _chat("a part of an unknown type", BAD, "own: media", messages=_part(type="x", x="y")),
    _chat("mm_processor_kwargs with code", BAD, "GHSA-h3rc-6mm3-gc2m", mm_processor_kwargs={"code_revision": "main", "trust_remote_code": True}),
    _chat("ids of media that are another's", (*OK, *BAD), "GHSA-p92p-rxj5-7p2x", messages=_part(type="image_url", image_url={"url": ""}, uuid="another's")),
    Hostile("an upload to the transcriptions", "/v1/audio/transcriptions", b"x" * 100_000, (404, 415), "GHSA-v82g-2437-67m2"),
    _complete("prompt_embeds that are a pickle", BAD, "GHSA-mrw7-hf4f-83pf", prompt_embeds=base64.b64encode(b"\x80\x04cos\nsystem\n(S'id'\ntR.").decode()),
    _complete("prompt_embeds of nothing", BAD, "GHSA-mcmc-2m55-j8jj", prompt=None, prompt_embeds=""),
    _complete("prompt_embeds alone", BAD, "GHSA-33cg-gxv8-3p8g", prompt=None, prompt_embeds="AAAA"),
    _complete("prompt_embeds in a list", BAD, "GHSA-mrw7-hf4f-83pf", prompt=None, prompt_embeds=["AAAA", "%%"]),
]  # fmt: skip

SERVING = [
    _complete("another model", UNKNOWN, model="org/other"),
    _complete("a model of a path", UNKNOWN, model="../../etc/passwd"),
    _complete("a model of 1 MB", UNKNOWN, model="m" * 1_000_000),
    _complete("a model of a number", BAD, model=5),
    _complete("a lora_request", (*OK, *BAD), "own: adapter", lora_request={"lora_name": "x", "lora_path": "/etc"}),
    _complete("kv_transfer_params", (*OK, *BAD), "own: transfer", kv_transfer_params={"remote_host": "{canary}", "do_remote_prefill": True}),
    _complete("ec_transfer_params", (*OK, *BAD), "own: transfer", ec_transfer_params={"remote_host": "{canary}"}),
    _complete("vllm_xargs", (*OK, *BAD), "own: extension", vllm_xargs={"x": ["y"] * 1000}),
    _complete("vllm_xargs of a wrong kind", BAD, "own: extension", vllm_xargs={"x": {"y": 1}}),
    _complete("cache_salt of nothing", BAD, "GHSA-4qjh-9fv9-r85r", cache_salt=""),
    _complete("cache_salt of 1025 characters", BAD, "GHSA-4qjh-9fv9-r85r", cache_salt="s" * 1025),
    _complete("cache_salt of a list", BAD, "GHSA-4qjh-9fv9-r85r", cache_salt=["s"]),
    _complete("a request_id of 1 MB", (*OK, *BAD), "GHSA-p43p-whwx-q52h", request_id="r" * 1_000_000),
    _complete("a request_id with line breaks", (*OK, *BAD), "own: log", request_id="a\r\nX-Injected: 1"),
    _complete("a request_id twice at once", OK, "own: log", request_id="same", n=2),
    _complete("a session_id of a list", BAD, session_id=[1]),
    _complete("an unknown field", (*OK, *BAD), no_such_field={"a": 1}),
    _complete("stream_options without stream", BAD, stream_options={"include_usage": True}),
    _complete("stream_options of text", BAD, stream=True, stream_options="yes"),
    _complete("stream_options of unknown names", (*OK, *BAD), stream=True, stream_options={"x": 1}),
    _complete("stream of text", BAD, stream="perhaps"),
    Hostile("a stream whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "ignore_eos": True, "stream": True}, OK, "own: hang-up", hangs_up=True),
    Hostile("8 streams in one whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 8}, OK, "own: hang-up", hangs_up=True),
    Hostile("a prompt whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "ignore_eos": True}, GONE, "own: hang-up", leaves_s=0.3),
    Hostile("32 answers whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "ignore_eos": True, "n": 32}, GONE, "own: hang-up", leaves_s=0.3),
    Hostile("1000 prompts whose client leaves", COMPLETE, {"prompt": ["Why?"] * 1000, "max_tokens": 450, "ignore_eos": True}, GONE, "own: hang-up", leaves_s=0.3),
    Hostile("a beam of 64 whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "use_beam_search": True, "n": 64}, (*GONE, *BAD), "own: hang-up", leaves_s=0.3),
    Hostile("a grammar whose client leaves", COMPLETE, {"prompt": "Why?", "max_tokens": 450, "structured_outputs": {"regex": "((a{1,50}){1,50}){1,50}"}}, (*GONE, *OK, *BAD), "own: hang-up", leaves_s=0.1),
    Hostile("a question whose client leaves", PROCESS, {"question": "x" * 1000}, (*GONE, *OK, *BAD), "own: hang-up", leaves_s=0.02),
    Hostile("a response in the background", RESPONSES, {"input": "Why?", "background": True, "max_output_tokens": 4}, (*OK, *BAD), "own: background"),
    Hostile("a response that is stored", RESPONSES, {"input": "Why?", "store": True, "max_output_tokens": 4}, (*OK, *BAD), "own: background"),
    Hostile("a response after an unknown one", RESPONSES, {"input": "Why?", "previous_response_id": "resp_x", "max_output_tokens": 4}, (*BAD, *UNKNOWN), "own: background"),
    Hostile("a response with a tool on the server", RESPONSES, {"input": "Why?", "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}], "max_output_tokens": 4}, (*OK, *BAD), "GHSA-v4p8-mg3p-g94g"),
    Hostile("a response with a tool at an address", RESPONSES, {"input": "Why?", "tools": [{"type": "mcp", "server_label": "x", "server_url": "http://{canary}/"}], "max_output_tokens": 4}, (*OK, *BAD), "GHSA-v4p8-mg3p-g94g"),
    Hostile("embeddings of an LLM that writes", "/v1/embeddings", {"input": "Why?"}, (*BAD, *UNKNOWN), "own: task"),
    Hostile("a score of an LLM that writes", "/score", {"text_1": "a", "text_2": "b"}, (*BAD, *UNKNOWN), "own: task"),
    Hostile("pooling with an unknown task", "/pooling", {"input": "a", "task": "x"}, (*BAD, *UNKNOWN), "own: task"),
]  # fmt: skip

_DEEP_JSON = b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}"

BODIES = [
    Hostile(f"{name}, to {path}", path, body, status, source)
    for path in (COMPLETE, CHAT, PROCESS)
    for name, body, status, source in (
        ("nothing", b"", INVALID, "GHSA-hwrm-c4cx-rf4j"),
        ("no JSON", b"{", INVALID, "GHSA-hwrm-c4cx-rf4j"),
        ("a body 10000 deep", _DEEP_JSON, INVALID, "own: JSON"),
        ("NaN", b'{"prompt": "a", "temperature": NaN}', INVALID, "GHSA-7h4p-rffg-7823"),
        ("Infinity", b'{"prompt": "a", "temperature": Infinity}', INVALID, "GHSA-7h4p-rffg-7823"),
        ("a key twice", b'{"prompt": "a", "max_tokens": 1, "max_tokens": 9}', INVALID, "own: JSON"),
        ("a byte order mark", b'\xef\xbb\xbf{"prompt": "a", "question": "a", "messages": []}', (200, 400, 422), "own: JSON"),
        ("UTF-16", '{"n": 1}'.encode("utf-16"), (400, 422), "own: JSON"),
        ("broken UTF-8", b'{"prompt": "\xff\xfe"}', (400, 422), "own: JSON"),
        ("a number of 5000 digits", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", INVALID, "own: JSON"),
        ("a list", b"[1]", (400, 422), "own: JSON"),
        ("null", b"null", (400, 422), "own: JSON"),
    )
]  # fmt: skip

ADDRESSES = [
    Hostile("a question of another field", PROCESS, {"question": "a", "n": 10**9}, INVALID, "own: field"),
    Hostile("a question of nothing", PROCESS, {"question": ""}, INVALID, "own: field"),
    Hostile("a question of a list", PROCESS, {"question": ["a"]}, INVALID, "own: field"),
    Hostile("a question longer than the context", PROCESS, {"question": "x" * 100_000}, BAD, "own: field"),
    Hostile("a question of 4000001 characters", PROCESS, {"question": "x" * 4_000_001}, INVALID, "own: field"),
    Hostile("a question of a lone surrogate", PROCESS, {"question": "\ud800"}, (400, 422), "own: field"),
    Hostile("a prompt as a form", COMPLETE, b"prompt=a", (415,), "GHSA-82w8-qh3p-5jfq", headers=(("Content-Type", "application/x-www-form-urlencoded"),)),
    Hostile("a prompt as an upload", COMPLETE, b"--x\r\n\r\na\r\n--x--", (415,), "GHSA-2c2j-9gv5-cj73", headers=(("Content-Type", "multipart/form-data; boundary=x"),)),
    Hostile("a prompt of no type", COMPLETE, b"{}", (415,), "own: type", headers=()),
    Hostile("a prompt of another page", COMPLETE, {"prompt": "a"}, (403,), "GHSA-m68r-v472-jgq9", headers=(("Content-Type", "application/json"), ("Origin", "http://evil.example"))),
    Hostile("a prompt of a page by its site", COMPLETE, {"prompt": "a"}, (403,), "GHSA-m68r-v472-jgq9", headers=(("Content-Type", "application/json"), ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors"))),
    Hostile("a prompt to a host by another name", COMPLETE, {"prompt": "a"}, (421,), "GHSA-q279-jhrf-cc6v", headers=(("Content-Type", "application/json"), ("Host", "evil.example"))),
    Hostile("a host with a path in it", COMPLETE, {"prompt": "a"}, BAD, "GHSA-94f4-hr76-p5j6", headers=(("Content-Type", "application/json"), ("Host", "127.0.0.1/v1/models?"))),
    Hostile("a bad warm-up header", COMPLETE, {"prompt": "a"}, INVALID, "own: header", headers=(("Content-Type", "application/json"), ("X-GreenPrompt-Warmup", "perhaps"))),
    Hostile("a prompt id of 5000 characters", COMPLETE, {"prompt": "a"}, INVALID, "own: header", headers=(("Content-Type", "application/json"), ("X-GreenPrompt-Prompt", "p" * 5000))),
    Hostile("a path of operators: metrics", "/metrics", None, UNKNOWN, "own: path", method="GET"),
    Hostile("a path of operators: the engine's state", "/server_info", None, UNKNOWN, "own: path", method="GET"),
    Hostile("a path of operators: sleep", "/sleep", {}, UNKNOWN, "own: path"),
    Hostile("a path of operators: an adapter", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, UNKNOWN, "own: path"),
    Hostile("a path of operators: a call of the engine", "/collective_rpc", {"method": "x"}, UNKNOWN, "own: path"),
    Hostile("a path of operators: abort", "/abort_requests", {}, UNKNOWN, "own: path"),
    Hostile("a path of operators: invocations", "/invocations", {"prompt": "a"}, UNKNOWN, "own: path"),
    Hostile("a path with a double slash", "//v1/completions", {"prompt": "a"}, UNKNOWN, "own: path"),
    Hostile("a path with dots", "/v1/../metrics", None, UNKNOWN, "GHSA-j3mh-qmjj-xp83", method="GET"),
    Hostile("a path with an encoded slash", "/v1%2fmodels", None, (200, 404), "own: path", method="GET"),
    Hostile("a path with a semicolon", "/v1/models;x=1", None, UNKNOWN, "own: path", method="GET"),
    Hostile("a path of another method", COMPLETE, None, UNKNOWN, "own: path", method="DELETE"),
    Hostile("a method that nobody has", COMPLETE, {"prompt": "a"}, BAD, "GHSA-x746-7m8f-x49c", method="__CLASS__"),
    Hostile("a range of a list", "/v1/models", None, OK, "GHSA-7f5h-v6xp-fcq8", method="GET", headers=(("Range", "bytes=" + ",".join(f"{n}-" for n in range(5000))),)),
]  # fmt: skip

ROWS = [*NUMBERS, *TOKENS, *TEMPLATES, *GRAMMARS, *MEDIA, *SERVING, *BODIES, *ADDRESSES]
