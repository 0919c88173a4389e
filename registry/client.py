"""The client under its old name: it lives in ``greenprompt_client.client``."""

from __future__ import annotations

from greenprompt_client.client import AnswerError, HeldLease, RegistryClient, RequestEnded

__all__ = ["AnswerError", "HeldLease", "RegistryClient", "RequestEnded"]
