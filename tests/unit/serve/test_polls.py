"""Long polls wait in the ingress: they end with their client, and cost the registry nothing while nothing happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from deployments.serve.polls import Polls
from registry.errors import RegistryUnavailable, TooManyPolls, UnknownRequest
from registry.wire.schemas import RequestState
from registry.wire.words import RequestStatus
from tests.support.fake_registry import BASE, CREATED, FakeRegistry


def registry_of(*request_ids: str) -> FakeRegistry:
    registry = FakeRegistry()
    for request_id in request_ids:
        registry.requests[request_id] = RequestState(
            requestId=request_id,
            llmconfig={},
            status="queued",
            measurementId=1,
            address=None,
            link=f"{BASE}/promptingservice/request/{request_id}",
            createdAt=CREATED,
        )
    return registry


def asked(registry: FakeRegistry) -> Counter[str]:
    return Counter(method for method, _, _ in registry.calls)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_waiting_polls_cost_the_registry_nothing() -> None:
    """100 polls of 100 requests wait. One request changes: one poll is answered, and its request alone is asked for."""
    names = [f"r{n}" for n in range(100)]
    registry = registry_of(*names)
    polls = Polls(registry.call)
    tasks = {name: asyncio.create_task(polls.state(name, 60.0, None)) for name in names}
    await settle()
    before = asked(registry)
    assert before["changes"] == 2  # where the changes are now, and what comes next
    registry.change("r7", status="deploying")
    assert '"deploying"' in await tasks["r7"]
    await settle()
    assert asked(registry) - before == Counter(state=1, changes=1)
    for task in tasks.values():
        task.cancel()
    await asyncio.wait(tasks.values())


async def test_a_poll_ends_with_its_client() -> None:
    """Of 1,000 polls whose clients hang up nothing is left here, and nothing waits in the registry but one call."""
    registry = registry_of("a")
    polls = Polls(registry.call)
    tasks = [asyncio.create_task(polls.state("a", 60.0, None)) for _ in range(1000)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (polls._count, polls._waiting) == (0, {})
    assert len(registry.news._readers) == 1


async def test_a_change_while_the_registry_is_asked_is_not_missed() -> None:
    """A request that changes between the answer of the registry and the begin of the wait is asked for once more."""
    registry = registry_of("a")

    class Slow(FakeRegistry):
        async def call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
            answer = await registry.call(method, *args, wait_s=wait_s)
            if method == "state" and answer[0] == "queued":
                registry.change("a", status="deploying")
                await settle()
            return answer

    assert '"deploying"' in await Polls(Slow().call).state("a", 60.0, None)


@pytest.mark.parametrize(
    ("status", "seen", "waits"),
    [
        ("queued", None, True),
        ("queued", RequestStatus.QUEUED, True),
        ("queued", RequestStatus.DEPLOYING, False),
        ("deployed", None, False),
        ("deployed", RequestStatus.DEPLOYED, True),
        ("released", RequestStatus.RELEASED, False),
        ("failed", None, False),
    ],
)
async def test_what_is_waited_for(status: str, seen: RequestStatus | None, waits: bool) -> None:
    """A poll waits while the status is the one that its client has seen; not for a deployed or an ended request."""
    registry = registry_of("a")
    registry.change("a", status=status)
    poll = asyncio.create_task(Polls(registry.call).state("a", 60.0, seen))
    await settle()
    assert poll.done() is not waits
    poll.cancel()
    await asyncio.wait([poll])


async def test_a_poll_whose_time_is_up_is_answered_as_it_is() -> None:
    """Without a change the answer is the request as it is when the time is up."""
    registry = registry_of("a")
    assert '"queued"' in await Polls(registry.call).state("a", 0.001, None)
    assert '"queued"' in await Polls(registry.call).state("a", 0.0, None)


async def test_too_many_polls_are_refused() -> None:
    """A poll above the limit is refused, others go on, and a GET without ``wait`` is answered."""
    registry = registry_of("a")
    polls = Polls(registry.call, most=2)
    tasks = [asyncio.create_task(polls.state("a", 60.0, None)) for _ in range(2)]
    await settle()
    with pytest.raises(TooManyPolls):
        await polls.state("a", 60.0, None)
    assert '"queued"' in await polls.state("a", 0.0, None)
    registry.change("a", status="deploying")
    assert all('"deploying"' in text for text in await asyncio.gather(*tasks))


async def test_polls_outlive_a_registry_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is known of changes polls wait; then each asks again, for what changed meanwhile is not known."""
    monkeypatch.setattr("deployments.serve.polls.RETRY_S", 0.0)
    registry = registry_of("a")
    polls = Polls(registry.call)
    poll = asyncio.create_task(polls.state("a", 60.0, None))
    await settle()
    registry.error = RegistryUnavailable("it restarts")
    registry.news.add(["other"])  # the call that is under way ends, the next ones fail
    await settle()
    assert not poll.done()
    registry.requests["a"] = registry.requests["a"].model_copy(update={"status": "deployed"})
    registry.news = type(registry.news)()  # of a new process: it has counted no changes
    registry.error = None
    assert '"deployed"' in await poll


async def test_an_unknown_request_is_an_error_at_once() -> None:
    """Nobody waits for what there is not, and nothing of it stays."""
    polls = Polls(registry_of().call)
    with pytest.raises(UnknownRequest):
        await polls.state("none", 60.0, None)
    assert polls._waiting == {}
