"""The rules for the words of an llmconfig, against the installed vLLM and transformers."""

import ast
import dataclasses
import inspect
import textwrap
import typing
import warnings

import pytest

from deployments.models.args.mapping import TASKS, map_deployment, map_prompting
from deployments.models.args.rules import Mapped
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from deployments.models.memory_need import GPU_SHARE
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.support.llm_args import TAKEN_DEPLOYMENT, TAKEN_PROMPTING, rules
from tests.unit.models.test_llm_memory import LLAMA_3_8B, of


@pytest.fixture(scope="module")
def vllm():
    """What of vLLM and transformers the tables speak about, imported once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of itself that vLLM's imports touch
        from transformers import GenerationConfig, PreTrainedModel
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.sampling_params import SamplingParams

    class Imported:
        engine_args = AsyncEngineArgs
        chat = ChatCompletionRequest
        completion = CompletionRequest
        sampling = SamplingParams
        generation_config = GenerationConfig
        from_pretrained = staticmethod(PreTrainedModel.from_pretrained)

    return Imported


@pytest.mark.vllm
def test_every_engine_argument_is_decided(vllm):
    """Every field of vLLM's EngineArgs is taken, dropped or refused on purpose."""
    fields = {field.name for field in dataclasses.fields(vllm.engine_args)}
    assert fields - DEPLOYMENT.keys() == set()
    assert {rule.to for rule in rules(DEPLOYMENT, Mapped).values()} - fields == {"tool_call_parser"}  # its API's
    assert {word for task in TASKS.values() for word, _ in task.engine} <= fields


@pytest.mark.vllm
def test_every_sampling_parameter_is_decided(vllm):
    """Every field of vLLM's SamplingParams and of its two request bodies is taken, dropped or refused on purpose."""
    parameters = {name for name in vllm.sampling.__struct_fields__ if not name.startswith("_")}
    chat, completion = set(vllm.chat.model_fields), set(vllm.completion.model_fields)
    assert (parameters | chat | completion) - PROMPTING.keys() == set()
    taken = {
        rule.to: rule.chat_only for rule in PROMPTING.values() if isinstance(rule, Mapped) and rule.to != "do_sample"
    }
    assert {word for word, chat_only in taken.items() if not chat_only} <= chat & completion
    assert {word for word, chat_only in taken.items() if chat_only} <= chat - completion


@pytest.mark.vllm
def test_every_word_of_transformers_is_decided(vllm):
    """Every attribute of GenerationConfig and every word of from_pretrained is decided on purpose."""
    assert vars(vllm.generation_config()).keys() - PROMPTING.keys() == set()
    function = vllm.from_pretrained.__func__
    named = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind.name == "KEYWORD_ONLY"
    }
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    popped = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "kwargs.pop"
        and isinstance(node.args[0], ast.Constant)
    }
    assert {"device_map", "torch_dtype"} <= popped
    assert (named | popped) - DEPLOYMENT.keys() == set()


def texts_of(hint):
    """The texts that a type hint allows, at any depth."""
    return {hint} if isinstance(hint, str) else {text for inner in typing.get_args(hint) for text in texts_of(inner)}


@pytest.mark.vllm
def test_choices_are_vllm_s(vllm):
    """Each word offered as a choice is one that vLLM knows, and what is said to be gone from it is."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.tool_parsers import ToolParserManager
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    known = {field.name: texts_of(field.type) for field in dataclasses.fields(vllm.engine_args)}
    known["quantization"] = set(QUANTIZATION_METHODS)
    known["tool_call_parser"] = set(ToolParserManager.list_registered())
    known["attention_backend"] = {"auto", *AttentionBackendEnum.__members__}
    chosen = {rule.to: rule.kind for rule in rules(DEPLOYMENT, Mapped).values() if rule.kind.words}
    # These are plain texts in vLLM, which takes names of plugins and folders as well.
    unlisted = {word for word in chosen if not known[word]}
    assert unlisted == {"load_format", "config_format", "generation_config", "model_impl"}
    for word in chosen.keys() - unlisted:
        assert {chosen[word].read(text) for text in chosen[word].words} <= known[word]
    assert not {"bitsandbytes", "gguf"} & known["quantization"]


@pytest.mark.vllm
@pytest.mark.parametrize("case", TAKEN_PROMPTING, ids=lambda case: f"{case[0]}={case[1]}")
def test_vllm_takes_each_prompting_value(vllm, case):
    """Each mapped value passes vLLM's own validation, on both endpoints and into SamplingParams."""
    body = map_prompting({case[0]: case[1]}).values
    bodies = [vllm.chat(messages=[{"role": "user", "content": "Hi"}], **body)]
    if not rules(PROMPTING, Mapped)[case[0]].chat_only:
        bodies.append(vllm.completion(prompt="Hi", **body))
    for request in bodies:
        sampling = request.to_sampling_params(max_tokens=body.get("max_tokens", 16), default_sampling_params={})
        if case[2] in sampling.__struct_fields__ and case[2] != "logit_bias":
            assert getattr(sampling, case[2]) == case[3]


@pytest.mark.vllm
def test_vllm_takes_each_deployment_value(vllm, tmp_path):
    """Each mapped value makes an engine configuration, and each modeltyp the runner that it stands for."""
    model = str(make_tiny_llm(tmp_path / "llm"))
    # The tiny LLM has no experts, and is the only machine: one process. The parser of tool calls is not the engine's.
    skipped = {"enable_expert_parallel", "tp_size", "pipeline_parallel_size", "tool_call_parser"}
    for word, value, _, _ in TAKEN_DEPLOYMENT:
        if word not in skipped:
            vllm.engine_args(model=model, **map_deployment({word: value}).values).create_engine_config()
    for task in TASKS.values():
        config = vllm.engine_args(model=model, **dict(task.engine)).create_engine_config().model_config
        assert config.runner_type == dict(task.engine)["runner"]
        assert config.convert_type == dict(task.engine).get("convert", "none")


@pytest.mark.vllm
def test_the_share_of_a_gpu_is_vllms() -> None:
    """Unless asked for, it is what the installed vLLM takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of itself that vLLM's imports touch
        from vllm.engine.arg_utils import AsyncEngineArgs
    assert AsyncEngineArgs.gpu_memory_utilization == GPU_SHARE
    assert of(LLAMA_3_8B, {"gpu_memory_utilization": 0.5}).gpu_share == 0.5
    assert of(LLAMA_3_8B, {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1}).gpu_share == 1.0
