"""``get_status`` of a lease."""

from __future__ import annotations

from tests.support.prompt_gate import SO_FAR, Wrapper


async def test_status_is_the_contracts(wrapper: Wrapper) -> None:
    """The status is ``ready`` when the LLM answers."""
    answer = await wrapper.call("GET", "/get_status").done()
    assert answer.json == {"status": "success", "message": "ready", "detail": "ready", "energy": SO_FAR}


async def test_status_says_that_the_llm_is_being_started(wrapper: Wrapper) -> None:
    """A lease whose LLM is being started again is told so; its prompts answer 503 and may be tried again."""
    wrapper.state = (None, "being started (loading)")
    answer = await wrapper.call("GET", "/get_status").done()
    detail = "being started (loading)"
    assert answer.json == {"status": "success", "message": "not ready", "detail": detail, "energy": SO_FAR}
    for path, body in (("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})):
        refused = await wrapper.call("POST", path, body).done()
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "engine_not_ready", "1")
        assert "loading" in refused.message


async def test_status_answers_while_prompts_run(wrapper: Wrapper) -> None:
    """The status never waits for a prompt, not even when as many are in flight as may be."""
    wrapper.make(max_in_flight=1)
    await wrapper.begin()
    assert (await wrapper.call("GET", "/get_status").done()).json["message"] == "ready"
