"""What SIGINT and SIGTERM do.

The first stops gracefully, a second one and the end of the grace period stop immediately.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable

import trio

STOPPED_AT_ONCE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped a command. The text says what it did and what is left."""


async def stop_on_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, grace_seconds: float, say: Callable[[], object]
) -> None:
    """Cancel ``scope`` at the first signal, after ``say``.

    Then a second one or the end of the grace ends the process.
    """
    async for _ in signals:
        say()
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, lambda *_: os._exit(STOPPED_AT_ONCE))
        signal.setitimer(signal.ITIMER_REAL, max(grace_seconds, 0.1))
        scope.cancel()
        return


def in_grace_no_more() -> None:
    """Take back the alarm of ``stop_on_signal``.

    All has stopped, and an interpreter that ends has no handler for it.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)
