"""The hand-over of an LLM to a lease: caches are emptied, and one prompt is asked first."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from deployments.wrapper import probe
from registry.contract.messages import LeaseGrant
from registry.errors import EngineNotReady
from tests.support.fake_cluster import UNTOLD
from tests.support.llm_wrapper import FIRST, OTHER_SPEC, SECOND, Make, RunningFake

# --- the caches at a hand-over -------------------------------------------------------------------------------


async def test_every_lease_begins_with_empty_caches(make: Make) -> None:
    """Leases of standard grade share nothing either: each hand-over empties the caches once, a repeated bind does not.

    One LLM, leases 1 and 2: 2 hand-overs, so it was emptied 2 times; lease 2 bound again: still 2.
    """
    client = await make(finish=False)
    assert client.engine.forgot == 1
    over = await client.wrapper.bind(3, SECOND)
    assert (client.engine.forgot, over.flags) == (2, ())
    await client.wrapper.bind(4, SECOND)
    assert client.engine.forgot == 2


@pytest.mark.parametrize("forgets", [False, RuntimeError("the engine core is dead")])
async def test_an_engine_that_keeps_the_prompts_of_a_lease_is_ended(make: Make, forgets: bool | Exception) -> None:
    """The next lease is not handed over, with the reason, until the LLM runs again."""
    client = await make(finish=False)
    client.engine.forgets = forgets
    with pytest.raises(EngineNotReady, match="its caches could not be emptied after a lease"):
        await client.wrapper.bind(3, SECOND)
    assert client.wrapper._gate.grant is None
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    assert "could not be emptied" in str((await client.wrapper.report(UNTOLD)).died)
    await client.wrapper.deploy(4, OTHER_SPEC, None)
    assert (await client.wrapper.bind(5, SECOND)).flags == ()


async def test_caches_that_can_never_be_emptied_are_told(make: Make) -> None:
    """To end such an LLM at each hand-over would help no lease: it is handed over with a flag."""
    client = await make(finish=False)
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    client.engine.forgets = False
    for epoch, grant in ((4, FIRST), (5, SECOND)):
        over = await client.wrapper.bind(epoch, grant)
        assert over.flags == ("prefix_cache_kept",)


# --- the first prompt ---------------------------------------------------------------------------------------

REFUSED = {"error": {"message": "top_p must be in (0, 1], got 7; see --max-model-len", "type": "BadRequestError"}}


def asking(grant: LeaseGrant, **prompting: object) -> LeaseGrant:
    """The lease of a request with these prompting arguments."""
    args = {"prompting": prompting, "deployment": {}}
    return replace(grant, llmconfig=json.dumps({"uses_chat_template": True, "args": args}))


async def test_llm_that_refuses_every_prompt_is_not_handed_over(make: Make) -> None:
    """Its request is told why, in our words, and its token opens nothing; the next request is asked by its own."""
    client = await make(finish=False)
    client.engine.error = 400, REFUSED
    over = await client.wrapper.bind(3, asking(SECOND, top_k=7))
    assert over.refusal == (
        "it refuses every prompt of this request: top_p must be in (0, 1], got 7; see args.deployment.max_model_len"
    )
    client.engine.error = None
    assert (await client.prompt("token-2")).status_code == 403
    third = replace(SECOND, request_id="request-3", token="token-3", as_of=client.wrapper._gate.moment)
    assert (await client.wrapper.bind(4, asking(third, top_k=8))).refusal is None
    assert (await client.prompt("token-3")).status_code == 200


async def test_first_prompt_is_asked_once_per_start_and_arguments(make: Make) -> None:
    """A short one with the request's own arguments, by its own path; a known answer costs the hand-over nothing.

    Bound first without arguments: 1. With top_k 7: 2. With top_k 7 and more tokens, which decide nothing: 2. On
    another start: 3.
    """
    client = await make(finish=False)
    assert [path for path, _ in client.engine.bodies] == ["/v1/completions"]
    await client.bind(3, asking(SECOND, top_k=7, max_new_tokens=500, min_new_tokens=20))
    path, body = client.engine.bodies[-1]
    assert (path, body["top_k"], body["max_tokens"]) == ("/v1/chat/completions", 7, 1)
    assert "min_tokens" not in body
    await client.bind(4, replace(asking(SECOND, top_k=7, max_new_tokens=9), request_id="request-3"))
    assert len(client.engine.bodies) == 2
    await client.wrapper.deploy(5, OTHER_SPEC, None)
    await client.bind(6, replace(asking(SECOND, top_k=7), request_id="request-4"))
    assert len(client.engine.bodies) == 1


async def test_no_first_prompt_where_there_is_none(make: Make) -> None:
    """An LLM that writes no text has no process_prompt, and one that was handed over before has been prompted."""
    client = await make(finish=False)
    client.engine.bodies.clear()
    embeds = {"modeltyp": "embedding", "uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}}
    await client.bind(3, replace(SECOND, llmconfig=json.dumps(embeds)))
    await client.bind(4, replace(asking(FIRST, top_k=3), handed_over_s=1.0))
    assert client.engine.bodies == []


async def test_llm_that_is_slow_or_dead_is_not_called_refusing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer in time, or from a dead engine, nothing is known: it is handed over, and asked next time."""
    client = await make(finish=False)
    monkeypatch.setattr(probe, "PROBE_MAX_S", 0.0)
    client.engine.go.clear()
    assert (await client.wrapper.bind(3, asking(SECOND, top_k=7))).refusal is None
    client.engine.go.set()
    monkeypatch.setattr(probe, "PROBE_MAX_S", 30.0)
    client.engine.error = 500, {"error": "the engine core is dead"}
    monkeypatch.setattr(RunningFake, "failed", True)
    assert (await client.wrapper.bind(4, asking(FIRST, top_k=7))).refusal is None
    monkeypatch.setattr(RunningFake, "failed", False)
    client.engine.error = RuntimeError("the template failed")
    over = await client.wrapper.bind(5, asking(SECOND, top_k=7))
    assert over.refusal == "its first prompt failed with status 500: Internal Server Error"


async def test_a_fault_of_the_engine_at_the_first_prompt_is_not_remembered(make: Make) -> None:
    """A 500 ends one request; the next one with the same arguments is asked again, and served if the fault is over."""
    client = await make(finish=False)
    client.engine.error = 500, {"error": "a fault that passes"}
    assert "a fault that passes" in ((await client.wrapper.bind(3, asking(SECOND, top_k=7))).refusal or "")
    client.engine.error = None
    third = replace(SECOND, request_id="request-3", token="token-3", as_of=client.wrapper._gate.moment)
    assert (await client.wrapper.bind(4, asking(third, top_k=7))).refusal is None
    assert (await client.prompt("token-3")).status_code == 200


async def test_a_prompt_to_an_llm_that_writes_no_text(make: Make) -> None:
    """process_prompt says where to go instead."""
    client = await make(finish=False)
    embeds = {"modeltyp": "sentence-similarity", "uses_chat_template": False, "args": {"prompting": {}}}
    await client.bind(3, replace(SECOND, llmconfig=json.dumps(embeds)))
    answer = await client.prompt("token-2")
    assert (answer.status_code, answer.json()["code"]) == (422, "writes_no_text")
    assert answer.json()["message"].endswith("writes no text; POST to /v1/embeddings of its url")
