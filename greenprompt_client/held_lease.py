"""A lease as its client holds it: prompts to the LLM, until the lease ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import stamina

from greenprompt_client.answers import checked, may_ask_again
from registry.wire.lease_token import lease_headers, split_url
from registry.wire.schemas import PROMPT_HEADER, WARMUP_HEADER, RequestState

RETRY_FOR_S = 30.0
"""How long a retryable call is retried while the registry restarts, seconds."""


@dataclass(frozen=True, slots=True)
class HeldLease:
    """An LLM that is reserved for this client until its request is released or expires.

    ``url`` contains the token of the lease. Other clients can use ``base_url``, with ``token or "none"`` as their API
    key: without a key, some would send the one that they find in the environment.
    """

    state: RequestState
    url: str
    _http: httpx.Client

    @property
    def base_url(self) -> str:
        """The base URL of the LLM without the token; ``url`` if the registry is older, and ``token`` None."""
        return split_url(self.url)[0]

    @property
    def token(self) -> str | None:
        """The token of the lease; see ``lease_headers``."""
        return split_url(self.url)[1]

    def prompt(
        self, question: str, *, timeout_s: float = 600.0, prompt_id: str | None = None, warmup: bool = False
    ) -> dict[str, Any]:
        """Return the wrapper's answer to a question: ``answer``, ``sci_score``, ``usage`` and more.

        Its energy figures are provisional; ``window`` is the id of its final energy window, see
        ``RegistryClient.windows``. That window also contains ``prompt_id`` and ``warmup``. Use the
        same ``prompt_id`` for the same question in every lease. A warm-up is excluded from all
        figures except those of whole leases (with idle time).

        Retries for up to RETRY_FOR_S seconds while the LLM has too many prompts or is being restarted, but never after
        ``timeout_s`` seconds without an answer. Several threads may prompt at once.

        Raises:
            AnswerError: The lease has ended (410), the LLM is still unavailable (503), or the engine refused the
                prompt.
            httpx.HTTPError: The wrapper could not be reached, or took longer than ``timeout_s`` seconds.
        """
        url, body, headers = f"{self.base_url}/process_prompt", {"question": question}, lease_headers(self.token)
        if warmup:
            headers[WARMUP_HEADER] = "true"
        if prompt_id is not None:
            headers[PROMPT_HEADER] = quote(prompt_id, safe="")
        # stamina's decorator would log the arguments of retried calls, and a header contains the lease's token.
        for attempt in stamina.retry_context(may_ask_again, attempts=None, timeout=RETRY_FOR_S):
            with attempt:
                answer: dict[str, Any] = checked(
                    self._http.post(url, json=body, headers=headers, timeout=timeout_s)
                ).json()
                return answer
        raise AssertionError("unreachable")
