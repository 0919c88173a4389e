"""The old import path of ``greenprompt_client.client``."""

from __future__ import annotations

from greenprompt_client.answers import AnswerError, RequestEnded
from greenprompt_client.client import RegistryClient
from greenprompt_client.held_lease import HeldLease

__all__ = ["AnswerError", "HeldLease", "RegistryClient", "RequestEnded"]
