"""The ingress against its own OpenAPI document: generated requests, good and bad, with a stand-in for the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from tests.support.fake_registry import FakeRegistry

CONFIG = IngressConfig(ModelSources(True, (), Path("/")), (), hosts=("testserver",))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", build_app(CONFIG, FakeRegistry().call))


@SCHEMA.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(case: schemathesis.Case[Any]) -> None:
    """Whatever is sent, the answer has a documented status and body: no 500, nothing wrong accepted."""
    # The document can't say which models and arguments there are: some of what it allows is refused, with a reason.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
