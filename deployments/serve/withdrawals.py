"""Ends requests whose POST was accepted but not answered.

Their client does not know their ids, so it can't release them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import stamina
import structlog

from registry.background import spawn
from registry.errors import RegistryError
from registry.store.rows import AuditRow

WITHDRAW_FOR_S = 300.0
"""How long a withdrawal is retried while the registry does not answer, seconds."""

log = structlog.get_logger("deployments.serve.withdrawals")


# D77: requests of an unanswered POST are withdrawn
class Withdrawals:
    """Withdraws requests in the background. ``call(method, *args)`` reaches the registry actor.

    A withdrawal that still fails after WITHDRAW_FOR_S is logged; the lease then ends by its idle limit.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def unless_answered(
        self, request_ids: Sequence[str], tenant: str, key: str | None, audit: AuditRow | None = None
    ) -> Iterator[None]:
        """Withdraw these requests if the block fails, or is cancelled because the client hung up.

        A refusal (4xx) is an answer: it means that nothing was accepted.
        """
        try:
            yield
        except BaseException as error:
            refused = isinstance(error, RegistryError) and error.http_status < HTTPStatus.INTERNAL_SERVER_ERROR
            if not refused:
                self.begin(request_ids, tenant, key, audit)
            raise

    def begin(self, request_ids: Sequence[str], tenant: str, key: str | None, audit: AuditRow | None = None) -> None:
        """Withdraw the requests of one POST. Returns at once.

        ``key``: its Idempotency-Key, if any. ``audit``: its row for the audit.
        """
        task = spawn("withdraw unanswered requests", self._withdraw(request_ids, tenant, key, audit))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def over(self) -> None:
        """Return when all withdrawals so far are complete."""
        await asyncio.gather(*self._tasks)

    async def _withdraw(self, request_ids: Sequence[str], tenant: str, key: str | None, audit: AuditRow | None) -> None:
        try:
            async for attempt in stamina.retry_context(
                on=RegistryError, attempts=None, timeout=WITHDRAW_FOR_S, wait_initial=0.5, wait_max=5.0
            ):
                with attempt:
                    await self._call("withdraw", request_ids, tenant, key, audit)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.error("requests without an answer could not be withdrawn", request_ids=request_ids, reason=reason)  # noqa: TRY400 - Ray's traceback adds nothing
        else:
            log.info("requests without an answer were withdrawn", request_ids=request_ids)
