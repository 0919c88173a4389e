"""How leases end, and whether their last prompts are cut or finished."""

from __future__ import annotations

import asyncio

import pytest

from registry.errors import StaleEpoch
from tests.support.fake_cluster import UNTOLD
from tests.support.llm_wrapper import FIRST, OTHER_SPEC, SECOND, Make


async def test_expired_prompts_are_cut(make: Make) -> None:
    """Unless they may finish, the deadline cuts them, and the next lease is bound at once."""
    client = await make(finish=False, ends_in_s=0.05)
    prompt = await client.begin("token-1")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
    await client.bind(3, SECOND)
    client.engine.go.set()
    assert (await client.prompt("token-2")).status_code == 200


async def test_an_unbind_ends_whatever_is_bound(make: Make) -> None:
    """The end of a lease that never came here ends the one before it, whose own end it has overtaken."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(5, "request-2", "released")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
    assert (await client.prompt("token-1")).status_code == 410


async def test_next_lease_waits_for_the_last_prompt(make: Make) -> None:
    """A lease that is finished leaves its machine to nobody else before its last prompt is over."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    refused = await client.prompt("token-1")
    assert (refused.status_code, refused.json()["code"]) == (410, "lease_ended")
    assert (await client.prompt("token-2")).status_code == 403
    assert not bind.done()
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await bind
    assert (await client.prompt("token-2")).status_code == 200


async def test_next_llm_waits_for_the_last_prompt(make: Make) -> None:
    """The engine is not stopped under a prompt that may finish; meanwhile the wrapper says what it waits for."""
    client = await make(finish=True)
    engine = client.engine
    prompt, deploy = await client.replace_while_it_answers()
    report = await client.wrapper.report(UNTOLD)
    assert (report.starting, report.phase) == (OTHER_SPEC.fingerprint, "finishing_prompts")
    assert client.engine is engine
    engine.go.set()
    assert (await prompt).status_code == 200
    await deploy
    assert client.engine is not engine


@pytest.mark.parametrize("how", ["released", "failed"])
async def test_only_expiry_lets_finish(make: Make, how: str) -> None:
    """A lease that ends for any other reason has its prompts cut, whatever is configured."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", how)
    answer = await prompt
    assert answer.status_code == 410
    assert how in answer.json()["message"]


async def test_release_of_an_expired_lease_cuts_its_prompts(make: Make) -> None:
    """Who gives back what has expired already need not wait for the prompts that may still finish."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    await client.wrapper.unbind(4, "request-1", "released")
    assert (await prompt).status_code == 410


async def test_shutdown_waits_for_nobody(make: Make) -> None:
    """Stopping the LLM cuts prompts that would otherwise be finished."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    await client.wrapper.stop(4)
    assert (await prompt).status_code == 410


async def test_a_newer_command_need_not_wait(make: Make) -> None:
    """While a lease waits for the last prompt of another it can be released; it is not bound afterwards."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    await asyncio.wait({bind}, timeout=0)
    await client.wrapper.unbind(5, "request-2", "released")
    assert not prompt.done()
    client.engine.go.set()
    assert (await prompt).status_code == 200
    with pytest.raises(StaleEpoch):
        await bind
    assert (await client.prompt("token-2")).status_code == 403


async def test_binding_again_leaves_prompts_alone(make: Make) -> None:
    """A registry that was restarted binds the lease that it knows: nothing of it is cut or waited for."""
    client = await make(finish=False)
    prompt = await client.begin("token-1")
    await client.bind(3, FIRST)
    client.engine.go.set()
    assert (await prompt).status_code == 200


async def test_another_lease_cuts_one_that_was_not_ended(make: Make) -> None:
    """If the end of a lease was lost, the next one's binding ends it, prompts and all."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.bind(3, SECOND)
    assert (await prompt).status_code == 410
    client.engine.go.set()
    assert (await client.prompt("token-2")).status_code == 200
