"""A whole llmconfig: its fields, the LLM that it means, and its fingerprint; the page of all words."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.models.args.mapping import TASKS, as_markdown, map_llmconfig
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from registry.errors import InvalidField
from registry.wire.words import POOLING_TYPES
from tests.support.llm_args import TAKEN_DEPLOYMENT, fingerprint, llmconfig, problem

ROOT = Path(__file__).parents[4]

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
