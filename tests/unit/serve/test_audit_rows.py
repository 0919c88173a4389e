"""What the audit has of a call: ids, but no secret, wherever a caller puts one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.models.sources import ModelSources
from deployments.serve.audit import row_of
from deployments.serve.client_address import FORWARDED_HEADER, SOURCE_HEADER
from deployments.serve.http_app import IngressConfig, build_app
from registry.store.rows import APIKey, AuditRow
from registry.wire.words import Role
from tests.support.fake_registry import FakeRegistry

APP = build_app(IngressConfig(ModelSources(True, (), Path("/")), ()), FakeRegistry().call)
OPERATOR = APIKey("0a1b2c3d", Role.OPERATOR, None, "", "", 0.0)
ID = "9f8e7d6c5b4a39281706f5e4d3c2b1a0"
SECRETS = {
    "API key": f"gp_{'0' * 8}_{'x' * 43}",
    "secret of an API key": "x" * 43,
    "token of a lease": "aB3" + "x-9Z" * 10,
    "token of a lease with underscores": "aB3_x-9Z" * 5 + "_aB",
    "token of Hugging Face": "hf_" + "h" * 34,
    "short token": "glpat_" + "h" * 20,
}
PATHS = ["/promptingservice/request/{}", "/promptingservice/request/{}/keepalive", "/machines/{}/drain", "/keys/{}"]


def row(path: str, key: APIKey | None = OPERATOR, *, keys: bool = True, **scope: Any) -> AuditRow:
    """Return the row of a refused call, with this key, to a registry that asks for keys."""
    method = "POST" if path.endswith("keepalive") else "DELETE"
    base = {"type": "http", "method": method, "path": path, "headers": [], "client": ("10.0.0.1", 1), "app": APP}
    ours = {"greenprompt_proxies": (), "greenprompt_keys": keys, "greenprompt_key": key}
    return row_of({**base, **ours, **scope}, 404, "unknown_request")


@pytest.mark.parametrize("path", PATHS)
def test_an_id_is_kept(path: str) -> None:
    """What a call with a key was about."""
    assert row(path.format(ID)).subject == ID
    assert row(path.format("gpu-1.example.org")).subject == "gpu-1.example.org"


@pytest.mark.parametrize("path", PATHS)
def test_the_id_of_a_caller_without_a_key_is_not_kept(path: str) -> None:
    """It may be any text. A registry without keys has no other callers, and keeps it."""
    assert row(path.format(ID), None).subject is None
    assert row(path.format(ID), None, keys=False).subject == ID


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_no_secret_is_kept(secret: str, keys: bool) -> None:
    """Neither in the path, nor as a method, an address, a header or a query."""
    key, raw = OPERATOR if keys else None, secret.encode()
    proxied = [(SOURCE_HEADER, b"127.0.0.1"), (FORWARDED_HEADER, b"fe80::1%" + raw)]
    for path in (*PATHS, "/{}", "/{}/{}", "/promptingservice/request/{}/events", "/measurements/{}", "/%s{}"):
        assert secret[4:] not in repr(row(path.format(secret, secret), key, keys=keys))
    for scope in (
        {"method": secret},
        {"client": (secret, 1)},
        {"client": (f"fe80::1%{secret}", 1)},
        {"client": ("127.0.0.1", 1), "headers": proxied},
        {"client": ("127.0.0.1", 1), "headers": [(SOURCE_HEADER, raw), (FORWARDED_HEADER, raw)]},
        {"headers": [(name, raw) for name in (b"host", b"origin", b"x-tenant", b"authorization", b"content-type")]},
        {"query_string": b"key=" + raw},
    ):
        assert secret[4:] not in repr(row("/machines/a/drain", key, keys=keys, **scope))
