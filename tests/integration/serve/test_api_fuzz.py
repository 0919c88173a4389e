"""Generated sequences of calls against the registry on a socket: requests, their leases, and what follows from them.

FUZZ_CALLS: how many calls are made; ``make fuzz`` makes 20,000.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis.core.transport import Response
from schemathesis.generation.stateful.state_machine import APIStateMachine
from schemathesis.specs.openapi.checks import ensure_resource_availability, positive_data_acceptance, use_after_free

from deployments.serve.polls import Polls
from registry.core.records import WrapperStatus
from tests.support.app_server import served
from tests.support.keyed_registry import LLM, REQUEST, keyed_scene
from tests.support.service_world import ServiceWorld

pytestmark = pytest.mark.no_cover  # counting costs time, and other tests reach the same lines

CALLS = int(os.environ.get("FUZZ_CALLS", "2000"))
STEPS = 12
"""Calls in one sequence."""

HANG_S = 20.0
"""A call that takes longer hangs, seconds."""

LONGEST_WAIT_S = 0.02
"""Here a poll waits no longer for a change, whatever it asks for, seconds."""

NOT_HERE = [
    positive_data_acceptance,  # the document can't say which models and arguments there are
    use_after_free,  # a request that was released can still be read
    ensure_resource_availability,  # a measurement has no requests if its POST was refused
]


def _links() -> dict[str, Any]:
    one, machine = "~1promptingservice~1request~1{request_id}", "~1machines~1{machine_id}"
    measurement = "~1measurements~1{measurement_id}"
    request_id, machine_id = {"request_id": "$response.body#/requests/0/requestId"}, {"machine_id": "a"}
    measurement_id = {"measurement_id": "$request.body#/measurementId"}
    followers = [
        *((f"{one}{path}", request_id) for path in ("/get", "/delete", "~1events/get", "~1keepalive/post")),
        *((f"{measurement}{path}/get", measurement_id) for path in ("", "~1report", "~1windows")),
        *((f"{machine}{path}", machine_id) for path in ("/get", "~1drain/post", "~1drain/delete")),
    ]
    return {path: {"operationRef": f"#/paths/{path}", "parameters": given} for path, given in followers}


LINKS = _links()
"""What can follow an accepted POST. Of operations that begin a sequence Schemathesis takes only those with links."""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A registry with four machines, which runs in a thread of its own."""
    state = Polls.state

    async def sooner(polls: Polls, request_id: str, wait: float, *more: Any) -> str:
        return await state(polls, request_id, min(wait, LONGEST_WAIT_S), *more)

    monkeypatch.setattr(Polls, "state", sooner)
    ready, over = threading.Event(), threading.Event()
    found: list[str] = []

    async def run() -> None:
        world = ServiceWorld(f"sqlite:///{tmp_path}/registry.db", [], watch={"period_s": 0.05, "failures": 2})
        for machine in "abcd":
            world.cluster.join(machine)
        await world.start()
        for machine in "abcd":
            await world.until_wrapper(WrapperStatus.IDLE, f"{machine}-0")
        async with keyed_scene(world, {"s": 0.0}, keys=False) as scene, served(scene.app, access_log=False) as port:
            found.append(f"http://127.0.0.1:{port}")
            ready.set()
            await asyncio.to_thread(over.wait)
        await world.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    yield found[0]
    over.set()
    thread.join(60)


def machine_of(url: str, seen: Counter[str]) -> type[APIStateMachine]:
    """The state machine of a registry's document with LINKS; ``seen`` counts answers by operation and status."""
    document = httpx.get(f"{url}/openapi.json", timeout=HANG_S).json()
    document["paths"][REQUEST]["post"]["responses"]["201"]["links"] = LINKS
    # Without the keys, which are not used here: Schemathesis finds links between them, and would call little else.
    schema = schemathesis.openapi.from_dict(document).exclude(path_regex="^/keys")
    schema.config.update(base_url=url)
    machine: Any = schema.as_state_machine()

    class Calls(machine):  # type: ignore[misc]
        def setup(self) -> None:
            self.accepted: list[str] = []

        def before_call(self, case: schemathesis.Case[Any]) -> None:
            """Make a POST acceptable, if it is not meant to be refused: ask for LLMs that there are."""
            body: Any = case.body
            meta = case.meta
            if case.operation.label == f"POST {REQUEST}" and meta is not None and meta.generation.mode.is_positive:
                wanted = {name: value for name, value in body.items() if name in ("measurementId", "priority")}
                case.body = {**wanted, "llms": [LLM] * min(len(body["llms"]), 2)}

        def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
            return {"timeout": HANG_S}

        def after_call(self, response: Response, case: schemathesis.Case[Any]) -> None:
            seen["calls"] += 1
            seen[f"{case.operation.label} {response.status_code}"] += 1
            if response.status_code == 201 and case.path == REQUEST:
                self.accepted += [each["requestId"] for each in response.json()["requests"]]
            if response.status_code == 200 and b'"status":"deployed"' in response.content.replace(b" ", b""):
                seen["deployed"] += 1

        def validate_response(self, response: Response, case: schemathesis.Case[Any], **_: Any) -> None:
            case.validate_response(response, excluded_checks=NOT_HERE)

        def teardown(self) -> None:
            """Release all requests, and use all machines again."""
            with httpx.Client(base_url=url, timeout=HANG_S) as http:
                for request_id in self.accepted:
                    assert http.delete(f"{REQUEST}/{request_id}").status_code == 204
                for each in http.get("/machines").json():
                    if each["drain"] is not None:
                        http.delete(f"/machines/{each['machine']}/drain")

    return Calls


@pytest.mark.timeout(max(900, CALLS))  # 2,000 take 60 s, and 200 s on a slow machine
def test_nothing_breaks(url: str) -> None:
    """No sequence gets a 5xx, an answer that is not documented, or none; and the sequences have real leases."""
    seen: Counter[str] = Counter()
    machine = machine_of(url, seen)
    wanted = settings(
        max_examples=max(1, CALLS // 40),
        stateful_step_count=STEPS,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    while (before := seen["calls"]) < CALLS:
        # Hypothesis expects the same answers to the same calls, but the registry remembers earlier sequences. This
        # error tells of such a difference only: what a check finds is another error.
        with suppress(FlakyStrategyDefinition):
            machine.run(settings=wanted)
        assert seen["calls"] > before
    print(*sorted(seen.items()), sep="\n")
    assert seen["deployed"] > CALLS / 200
    for followed in ("GET", "DELETE"):
        assert any(seen[f"{followed} {REQUEST}/{{request_id}} {status}"] for status in (200, 204)), seen
    assert seen[f"POST {REQUEST}/{{request_id}}/keepalive 200"]
    assert not [name for name in seen if name[-4:] in (" 500", " 502", " 504")]
