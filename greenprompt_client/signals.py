"""Signals that end a command, and the clean-up that they must not interrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command: Ctrl-C, `kill`, the loss of its terminal."""


@contextmanager
def one_signal() -> Iterator[None]:
    """Make the first signal that ends a command raise KeyboardInterrupt; later ones don't interrupt the clean-up."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # as `nohup` wants it
        del before[signal.SIGHUP]

    def stop(*_: object) -> NoReturn:
        ignore_signals()
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Let no signal interrupt the clean-up, which has a time limit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
