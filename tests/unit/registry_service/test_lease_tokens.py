"""Tokens are made from a key and an id; what is stored of them does not suffice to use a lease."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode
from itertools import count

import pytest

from registry.core.records import Lease, StoredToken
from registry.service import lease_tokens
from registry.service.lease_tokens import LeaseTokens
from registry.wire.lease_token import split_url

KEY = b"k" * 32


def tokens(key: bytes = KEY) -> LeaseTokens:
    numbers = count(1)
    return LeaseTokens(key, lambda: f"id-{next(numbers)}")


def lease(stored: StoredToken, request_id: str = "r1") -> Lease:
    return Lease(request_id, "w1", *stored, granted_s=0.0, deadline_s=1.0, idle_limit_s=1.0, last_active_s=0.0)


def test_a_token_is_the_hmac_of_its_id() -> None:
    """It is HMAC-SHA256 of the id, 256 bits, in characters that need no quoting in a URL; its hash is stored."""
    stored = tokens().new()
    token = tokens().of(lease(stored))
    kind, _, digest = token.partition("_")
    assert kind == "lease"
    assert urlsafe_b64decode(f"{digest}=") == hmac.digest(KEY, b"id-1", "sha256")
    assert stored == ("id-1", hashlib.sha256(token.encode()).hexdigest())
    assert split_url(f"http://a/wrappers/w1/{token}") == ("http://a/wrappers/w1", token)


def test_a_new_process_with_the_key_makes_the_same_token() -> None:
    """Nothing but the key and the stored lease is needed; another id or key makes another token."""
    first = tokens()
    one, other = lease(first.new()), lease(first.new())
    assert first.of(one) == tokens().of(one) != first.of(other)
    assert tokens(b"another").of(one) != first.of(one)


def test_a_token_of_another_key_is_lost() -> None:
    """Leases of another key, and those of a release that stored tokens, can't be answered with a token."""
    kept = lease(tokens().new())
    strange = lease(tokens(b"another").new(), "r2")
    old = lease(StoredToken("", hashlib.sha256(b"token-of-a-lease").hexdigest()), "r3")
    lost = tokens().lost([kept, strange, old])
    assert [event.request_id for event in lost] == ["r2", "r3"]
    assert all(event.reason.endswith("request the LLM again") for event in lost)


@pytest.mark.parametrize("text", ["", "made-up", "模型", "\udcff", "id-1"])
def test_other_texts_are_no_token(text: str) -> None:
    """Callers can send any text, the stored id and hash included."""
    known = tokens()
    stored = known.new()
    known.remember([lease(stored)])
    assert known.request_id(text) is None
    assert known.request_id(stored.token_sha256) is None
    assert known.request_id(known.of(lease(stored))) == "r1"


def test_only_the_latest_leases_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded; a lease that changes counts as recent."""
    monkeypatch.setattr(lease_tokens, "REMEMBERED_TOKENS", 2)
    known = tokens()
    leases = [lease(known.new(), f"r{n}") for n in range(3)]
    known.remember(leases[:2])
    known.remember([leases[0]])
    known.remember([leases[2]])
    assert [known.request_id(known.of(each)) for each in leases] == ["r0", None, "r2"]
