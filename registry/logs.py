"""How the parts log: one JSON object a line on standard error, which Ray keeps per process. No secrets in it."""

from __future__ import annotations

import sys

import structlog


def configure_logging() -> None:
    """Set structlog up for this process; doing it again changes nothing."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
