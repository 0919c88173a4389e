"""A registry that asks for API keys, over HTTP: the ingress in front of the real service, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from deployments.models.sources import ModelSources
from deployments.serve.actor import RegistryActor
from deployments.serve.http_app import IngressConfig, build_app
from registry.access_settings import AccessSettings
from registry.http_settings import HTTPSettings
from registry.oidc_settings import OIDCSettings
from registry.service.service import Service
from registry.wire.words import Role
from tests.support.service_world import ServiceWorld

LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "org/tiny",
    "uses_chat_template": True,
    "args": {"prompting": {}, "deployment": {}},
}
REQUEST = "/promptingservice/request"
OLD_CLIENT = "10.0.5.7"
FRONT = "10.0.9.1"
"""The address of a trusted proxy."""


class Scene:
    """A registry that asks for keys, with a lease of the tenant ``lab``, measurement 7."""

    def __init__(self, world: ServiceWorld, app: ASGIApp, http: httpx.AsyncClient, now: dict[str, float]) -> None:
        self.world, self.app, self.http, self.now = world, app, http, now
        self.keys: dict[str, str] = {"wrong": f"gp_{'0' * 8}_{'x' * 43}"}
        self.request_id = ""

    @property
    def service(self) -> Service:
        return self.world.service

    def make(self, caller: str, role: Role, tenant: str | None = None, days: float | None = None) -> str:
        key, self.keys[caller] = self.service.keys.new(role, tenant=tenant, name=caller, days=days)
        self.service.keys.add(key)
        return key.key_id

    async def ask(self, method: str, path: str, caller: str, **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        if caller in self.keys:
            headers = {**headers, "Authorization": f"Bearer {self.keys[caller]}"}
        return await self.http.request(method, path, headers=headers, **options)


async def _nothing() -> None:
    """The start of a registry that has started."""


@asynccontextmanager
async def keyed_scene(
    world: ServiceWorld, now: dict[str, float], *, keys: bool = True, oidc: OIDCSettings | None = None
) -> AsyncIterator[Scene]:
    """A scene in a world that runs. ``now``: the clock of the ingress, in ``s``; ``keys``: whether it asks for them."""
    actor = RegistryActor.__new__(RegistryActor)
    actor._settings, actor._service, actor._life = world.service.settings, world.service, "life"
    actor._started = asyncio.create_task(_nothing())

    async def call(method: str, *args: object, wait_s: float = 0.0) -> Any:
        return await getattr(actor, method)(*args)

    access = AccessSettings.model_validate(
        {"keys": True, "trusted_clients": {OLD_CLIENT: "old"}, "oidc": oidc} if keys else {}
    )
    proxies = HTTPSettings.model_validate({"trusted_proxies": [FRONT]}).trusted_proxies
    config = IngressConfig(ModelSources(True, (), Path("/")), (), access=access, trusted_proxies=proxies)
    app = build_app(config, call)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        scene = Scene(world, app, http, now)
        scene.make("client", Role.CLIENT, "lab")
        scene.make("other", Role.CLIENT, "rivals")
        scene.make("viewer", Role.VIEWER)
        scene.make("operator", Role.OPERATOR)
        scene.service.keys.revoke(scene.make("revoked", Role.OPERATOR))
        scene.make("expired", Role.OPERATOR, days=1e-9)
        world.clock.now_s += 1
        accepted = await scene.ask("POST", REQUEST, "client", json={"measurementId": 7, "llms": [LLM]})
        scene.request_id = accepted.json()["requests"][0]["requestId"]
        await scene.service.wait_for_change(scene.request_id, 5.0)
        yield scene
