"""The ingress that requests are sent to."""

from __future__ import annotations

from pathlib import Path

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig

COMMIT = "c" * 40
CONFIG = IngressConfig(ModelSources(True, (Path("/llms"),), Path("/")), allow_remote_code=(f"org/codes@{COMMIT}",))
REQUEST = "/promptingservice/request"
