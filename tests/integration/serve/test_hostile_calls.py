"""Hostile calls of the registry over sockets: what is answered, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from registry.core.records import WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.app_server import served
from tests.support.hostile.client import cpu_s, send
from tests.support.hostile.llmconfigs import ROWS as LLMCONFIGS
from tests.support.hostile.registry_calls import NO_KEY
from tests.support.hostile.registry_calls import ROWS as CALLS
from tests.support.hostile.rows import LEAKS, Hostile, ids
from tests.support.keyed_registry import Scene, keyed_scene
from tests.support.service_world import ServiceWorld

pytestmark = pytest.mark.asyncio(loop_scope="module")

REST_S, LOOK_S = 5.0, 0.02


@dataclass
class Target:
    """A registry on a socket that asks for keys, and has a lease of the client."""

    scene: Scene
    url: str

    async def send(self, row: Hostile) -> tuple[int, str]:
        """Send a row with the client's key, unless it has none; fill in the client's own request and key."""
        key = self.scene.keys["client"]
        known = {"{client:20}": key[:20], "{client:-1}": key[:-1], "{client}": key, "{CLIENT}": key.upper()}
        known["{hash}"] = hashlib.sha256(key.encode()).hexdigest()
        path = row.path.replace("{request}", self.scene.request_id).replace("{client}", key)
        headers = [(name, value) for name, value in row.headers if value != NO_KEY]
        for name, value in known.items():
            headers = [(each, text.replace(name, value)) for each, text in headers]
        if len(headers) == len(row.headers):
            headers.append(("Authorization", f"Bearer {key}"))
        return await send(self.url, row, path, row.content, headers)

    def requests(self) -> dict[str, RequestStatus]:
        """All requests of the registry."""
        return {each.request_id: each.status for each in self.scene.service.allocator.snapshot().requests}

    async def rest(self) -> float:
        """Return the share of a CPU that this process takes, as soon as it is small, at the latest after REST_S."""
        deadline_s, share = time.monotonic() + REST_S, 1.0
        while share > 0.1 and time.monotonic() < deadline_s:
            before_s, used_s = time.monotonic(), cpu_s(os.getpid())
            await asyncio.sleep(LOOK_S)
            share = (cpu_s(os.getpid()) - used_s) / (time.monotonic() - before_s)
        return share


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    """The target of all rows."""
    url = f"sqlite:///{tmp_path_factory.mktemp('registry')}/registry.db"
    # Its watch polls as in life, not as in other tests: they would never see this process at rest.
    world = ServiceWorld(url, [], watch={"period_s": 1.0, "failures": 2})
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)
    async with keyed_scene(world, {"s": 0.0}) as scene, served(scene.app, access_log=False) as port:
        address = f"http://127.0.0.1:{port}"
        yield Target(scene, address)
    await world.close()


@pytest.mark.parametrize("row", [*CALLS, *LLMCONFIGS], ids=ids([*CALLS, *LLMCONFIGS]))
async def test_nothing_comes_of_a_hostile_call(target: Target, row: Hostile) -> None:
    """The status is the expected one, the answer tells nothing of the inside, and the registry is as before."""
    requests = target.requests()
    status, answer = await target.send(row)
    assert status in row.status, answer
    assert [leak for leak in LEAKS if leak in answer] == []
    assert target.requests() == requests
    assert await target.rest() <= 0.1
    normal = Hostile("normal", f"/promptingservice/request/{target.scene.request_id}", None, (200,), "own", "GET")
    status, answer = await target.send(normal)
    assert (status, '"status":"deployed"' in answer) == (200, True)
