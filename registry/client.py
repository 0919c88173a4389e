"""The old import path of ``greenprompt_client.client``."""

from __future__ import annotations

from greenprompt_client.client import AnswerError, HeldLease, RegistryClient, RequestEnded

__all__ = ["AnswerError", "HeldLease", "RegistryClient", "RequestEnded"]
