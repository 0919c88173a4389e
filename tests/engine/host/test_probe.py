"""LLMs that refuse every prompt, as they are found on the hub: the first real prompt says so, with vLLM's reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.host import EngineHost
from deployments.engine.vllm_api import RunningLLM
from deployments.models.args.mapping import PromptArgs, prompt_args
from deployments.wrapper.native_call import native_prompt
from deployments.wrapper.probe import Probe
from registry.errors import EngineStartFailed
from tests.engine.calls import FAST, at_the_gate, client
from tests.support.tool_calls import NAMED, TOOL

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # vLLM's own name in its chats; one field is right for both of its APIs.
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]

Spoiled = Callable[..., Path]


@pytest.fixture
def spoiled(llms: Path, tmp_path: Path) -> Spoiled:
    """Makes a copy of the tiny LLM with fields of its generation_config changed, or without its chat template."""

    def make(*, template: bool = True, **generation: Any) -> Path:
        copy = tmp_path / "spoiled"
        shutil.copytree(llms / "a", copy)
        if not template:
            (copy / "chat_template.jinja").unlink()
        path = copy / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
        return copy

    return make


async def started(host: EngineHost, path: Path) -> RunningLLM:
    return await host.start(str(path), served_model_name="tiny", engine_args=FAST)


def config(*, chat: bool = True, **prompting: Any) -> PromptArgs:
    args = {"prompting": prompting, "deployment": {}}
    return prompt_args(json.dumps({"uses_chat_template": chat, "args": args}))


async def test_llm_without_a_chat_template(host: EngineHost, spoiled: Spoiled) -> None:
    """It refuses chats for good, and serves a request that uses no template."""
    llm, probe = await started(host, spoiled(template=False)), Probe()
    assert "chat template" in (await probe.refusal(llm, config()) or "")
    assert await probe.refusal(llm, config(chat=False)) is None


async def test_llm_whose_files_ask_for_the_impossible(host: EngineHost, spoiled: Spoiled) -> None:
    """``top_p: 7`` in its generation_config is refused by every prompt that does not say another."""
    llm, probe = await started(host, spoiled(top_p=7)), Probe()
    refusal = await probe.refusal(llm, config())
    assert refusal is not None
    assert "top_p must be in (0, 1], got 7" in refusal
    assert await probe.refusal(llm, config(top_p=0.9)) is None


async def test_what_the_first_prompt_says_is_what_all_are_told(host: EngineHost, llms: Path) -> None:
    """Arguments with ids out of the vocabulary: whatever is refused, prompts are refused with too, and no other."""
    llm, probe = await started(host, llms / "a"), Probe()
    for prompting in ({"logit_bias": {"99999": 1.0}}, {"eos_token_id": [99999]}, {"temperature": 0.5}, {}):
        told = await probe.refusal(llm, config(**prompting))
        path, body = native_prompt("tiny", config(max_new_tokens=4, **prompting), "Is the grid green?")
        async with client(llm) as http:
            answer = await http.post(path, json=body)
        assert (told is None) == (answer.status_code == 200), (prompting, told, answer.text)
        if told is not None:
            assert "99999" in told


async def test_tools_need_a_parser(host: EngineHost, llms: Path) -> None:
    """Without ``tool_call_parser`` every choice of a tool is refused, in our words: args.deployment names it."""
    llm = await started(host, llms / "a")
    async with at_the_gate(llm) as http:
        for choice in (NAMED, "required", "auto"):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL]}
            answer = await http.post("/v1/chat/completions", json={**body, "tool_choice": choice})
            assert answer.status_code == 400
            told = answer.json()["error"]["message"]
            assert told.endswith("requires args.deployment.tool_call_parser to be set")


async def test_reason_of_a_start_is_in_our_words(host: EngineHost, llms: Path) -> None:
    """A parser that vLLM does not have is told as the word of the llmconfig that names it."""
    with pytest.raises(EngineStartFailed) as caught:
        await host.start(str(llms / "a"), engine_args={**FAST, "tool_call_parser": "nope"})
    assert "args.deployment.tool_call_parser requires tool_parser:'nope'" in caught.value.reason
    assert "--enable" not in caught.value.reason
