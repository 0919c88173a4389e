"""Where the token of a lease is in a request, and what of its headers goes on."""

from __future__ import annotations

import pytest

from deployments.wrapper.lease_tokens import NO_TOKEN, lease_call

TOKEN, OTHER, OLD = "lease_one", "lease_two", "0ld-t0ken"
KEY = "gp_0a1b2c3d_secret"
ACCEPT = (b"accept", b"application/json")
MODELS = "/v1/models"


def authorized(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), *((b"authorization", value.encode("latin-1")) for value in values), ACCEPT]


@pytest.mark.parametrize(
    ("path", "values", "token", "below"),
    [
        # in the path alone; the second one is a request without any token
        (f"/{TOKEN}{MODELS}", [], TOKEN, MODELS),
        (MODELS, [], "v1", "/models"),
        (f"/{OLD}{MODELS}", [], OLD, MODELS),
        # in the header alone
        (MODELS, [f"Bearer {TOKEN}"], TOKEN, MODELS),
        (MODELS, [f"bearer {TOKEN}"], TOKEN, MODELS),
        (MODELS, [f"BEARER \t {TOKEN}"], TOKEN, MODELS),
        (MODELS, [f"Bearer {TOKEN} \t"], TOKEN, MODELS),
        ("/nowhere", [f"Bearer {TOKEN}"], TOKEN, "/nowhere"),
        ("", [f"Bearer {TOKEN}"], TOKEN, ""),
        # in both
        (f"/{TOKEN}{MODELS}", [f"Bearer {TOKEN}"], TOKEN, MODELS),
        (f"/{TOKEN}{MODELS}", [f"Bearer {OTHER}"], NO_TOKEN, MODELS),
        (f"/{TOKEN}{MODELS}", [f"Bearer {TOKEN}x"], NO_TOKEN, MODELS),
        (f"/{TOKEN}", [f"Bearer {OTHER}"], NO_TOKEN, "/"),
        # several headers
        (MODELS, [f"Bearer {TOKEN}", f"Bearer {TOKEN}"], NO_TOKEN, MODELS),
        (MODELS, [f"Bearer {KEY}", f"Bearer {TOKEN}"], NO_TOKEN, MODELS),
        (f"/{TOKEN}{MODELS}", [f"Bearer {TOKEN}", f"Bearer {OTHER}"], NO_TOKEN, MODELS),
        (f"/{TOKEN}{MODELS}", ["Bearer none", f"Bearer {KEY}"], TOKEN, MODELS),
        (MODELS, [f"Bearer {TOKEN}, Bearer {OTHER}"], f"{TOKEN}, Bearer {OTHER}", MODELS),
        # what is no token of a lease
        (f"/{TOKEN}{MODELS}", [f"Bearer {KEY}"], TOKEN, MODELS),
        (f"/{OLD}{MODELS}", ["Bearer none"], OLD, MODELS),
        (MODELS, [f"Bearer {KEY}"], "v1", "/models"),
        (MODELS, [f"Basic {TOKEN}"], "v1", "/models"),
        (MODELS, [TOKEN], "v1", "/models"),
        (MODELS, [f"Bearer{TOKEN}"], "v1", "/models"),
        (MODELS, ["Bearer LEASE_one"], "v1", "/models"),
        (MODELS, ["Bearer lease_\xfc"], "lease_\xfc", MODELS),
    ],
)
def test_where_the_token_is(path: str, values: list[str], token: str, below: str) -> None:
    """A header counts if it has a token; two places must agree; no Authorization header goes on."""
    assert lease_call(path, authorized(*values)) == (token, below, [(b"host", b"x"), ACCEPT])
