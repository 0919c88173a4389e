from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from registry.settings import Settings, load_settings
from tests.support.oidc import ISSUER, settings


def test_the_section_of_the_documentation_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of the how-to page are settings; a variable may replace a part of them."""
    page = (Path(__file__).parents[3] / "docs/how-to/share-a-registry.md").read_text()
    examples = [each for each in page.split("```yaml\n") if "  oidc:\n" in each]
    assert len(examples) == 2
    for each in examples:
        (tmp_path / "my.yaml").write_text(each.partition("```")[0])
        found = load_settings(tmp_path / "my.yaml").access.oidc
        assert found is not None
        assert found.algorithms == ("RS256", "ES256")
    monkeypatch.setenv("GREENPROMPT_ACCESS__OIDC__AUDIENCE", "other")
    changed = load_settings(tmp_path / "my.yaml").access.oidc
    assert changed is not None
    assert changed.audience == "other"


def test_an_issuer_needs_keys() -> None:
    """Without keys everybody is trusted, so a JWT would mean nothing."""
    with pytest.raises(ValidationError, match="oidc needs keys: true"):
        Settings.model_validate({"access": {"oidc": settings().model_dump()}})


@pytest.mark.parametrize(
    "issuer",
    [
        ISSUER,
        "https://idp.example:8443",
        "https://idp.example/Realms/Lab",
        "http://127.0.0.1:9000/a",
        "http://localhost/",
        "http://[::1]:1",
    ],
)
def test_issuers(issuer: str) -> None:
    """An issuer is https; only one on this machine may be http. Its URL is kept as it is written."""
    assert settings(issuer=issuer).issuer == issuer


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"issuer": "http://idp.example"}, r"issuer\n.*must begin with https://"),
        ({"issuer": "http://127.0.0.1.evil.example"}, "must begin with https://"),
        ({"issuer": "ftp://127.0.0.1"}, "must begin with https://"),
        ({"issuer": "idp.example"}, "needs a host"),
        ({"issuer": "https://"}, "needs a host"),
        ({"issuer": "https://ann@idp.example"}, "no user name"),
        ({"issuer": "https://:secret@idp.example"}, "no user name"),
        ({"issuer": "https://idp.example?realm=lab"}, "no query"),
        ({"issuer": "https://idp.example/#lab"}, "no fragment"),
        ({"issuer": "HTTPS://idp.example"}, "lower case"),
        ({"issuer": "https://IdP.example/Realms"}, "lower case"),
        ({"issuer": "https://idp.example/a b"}, "must escape"),
        ({"issuer": "https://idp.example/\n"}, "must escape"),
        ({"issuer": "https://ïdp.example"}, "must escape"),
        ({"issuer": "https://idp.example:0"}, "port 0"),
        ({"issuer": "https://idp.example:x"}, "Port could not be cast"),
        ({"issuer": ""}, "at least 1 character"),
        ({"issuer": f"https://idp.example/{'x' * 255}"}, "at most 255 characters"),
        ({"audience": ""}, "at least 1 character"),
        ({"algorithms": []}, "at least 1 item"),
        ({"algorithms": ["none"]}, "Input should be 'RS256'"),
        ({"algorithms": ["RS256", "HS256"]}, "Input should be 'RS256'"),
        ({"jwks_url": "http://idp.example/keys"}, r"jwks_url\n.*must begin with https://"),
        ({"jwks_url": f"https://idp.example/{'x' * 255}"}, "at most 255 characters"),
        ({"jwks_url": "https://idp.example/keys", "jwks_file": "keys"}, "jwks_url or jwks_file"),
        ({"role_claim": []}, "at least 1 item"),
        ({"role_claim": ["x"] * 9}, "at most 8 items"),
        ({"role_claim": [""]}, "at least 1 character"),
        ({"roles": {"viewer": [""]}}, "at least 1 character"),
        ({"tenant_claim": [""]}, "at least 1 character"),
        ({"tenant_claim": ["x"] * 9}, "at most 8 items"),
        ({"roles": {}}, "at least 1 item"),
        ({"roles": {"root": ["x"]}}, "Input should be 'client'"),
        ({"roles": {"viewer": []}}, "a role has no values"),
        ({"roles": {"viewer": [], "operator": ["a"]}}, "a role has no values"),
        ({"roles": {"viewer": ["a"], "operator": ["a"]}}, "a value is listed twice"),
        ({"tenant_claim": None}, "the role client needs tenant_claim"),
        ({"tenant_claim": []}, "at least 1 item"),
        ({"tenant": "lab"}, "tenant_claim or tenant"),
        ({"tenant_claim": None, "tenant": "a b"}, "should match pattern"),
        ({"types": ["a b"]}, "should match pattern"),
        ({"types": ["x" * 65]}, "should match pattern"),
        ({"types": []}, "at least 1 item"),
        ({"leeway_s": 60.5}, "less than or equal to 60"),
        ({"leeway_s": -0.5}, "greater than or equal to 0"),
        ({"leeway_s": float("nan")}, "finite number"),
        ({"secret": "x"}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], problem: str) -> None:
    """The error names the field and the remedy."""
    with pytest.raises(ValidationError, match=problem):
        settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithms": ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]},
        {"jwks_url": "https://keys.example/jwks?realm=lab"},
        {"role_claim": ["x"] * 8},
        {"tenant_claim": ["x"] * 8},
        {"types": ["x" * 64]},
    ],
)
def test_what_is_accepted(changes: dict[str, Any]) -> None:
    """All algorithms with public keys, keys on another host, claims that are eight objects deep, and long types."""
    (name,) = changes
    assert settings(**changes).model_dump(mode="json")[name] == changes[name]


def test_what_is_accepted_if_the_settings_do_not_say() -> None:
    """Without a setting, as little is accepted as usual issuers need."""
    found = settings()
    assert found.algorithms == ("RS256", "ES256")
    assert found.types == ("JWT", "at+jwt")
    assert found.leeway_s == 10


def test_files_are_those_of_the_folder_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ingress has another current folder than `up`, which reads the settings."""
    monkeypatch.chdir(tmp_path)
    found = settings(jwks_file="jwks.json", ca_file="ca.pem")
    assert (found.jwks_file, found.ca_file) == (tmp_path / "jwks.json", tmp_path / "ca.pem")


def test_a_registry_without_clients_needs_no_tenant() -> None:
    """Operators and viewers belong to no tenant."""
    assert settings(roles={"operator": ["admins"]}, tenant_claim=None).tenant is None
