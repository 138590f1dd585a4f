"""``everos-engine run``: the engine until a signal, with a status line on a terminal."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator

import trio
from loguru import logger

from everos_engine.engine import Engine, open_engine
from everos_engine.errors import EngineError
from everos_engine.settings import Settings
from everos_engine.supervise import alone
from everos_engine.surface.logs import set_up

BEAT_SECONDS = 0.5
STOPPED_AT_ONCE = 130


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; a second signal stops at once. Exit status 0 after a graceful stop."""
    set_up(settings)
    try:
        trio.run(_serve, settings)
    except EngineError:
        raise
    except BaseExceptionGroup as group:
        raise alone(group) from None
    return 0


async def _serve(settings: Settings) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope, settings.shutdown_grace_seconds)
            async with open_engine(settings) as engine:
                gc.collect()
                gc.freeze()  # what lives by now lives for good: a sweep's garbage is collected without looking through it
                logger.info("engine_started root={} pid={}", settings.root, os.getpid())
                if sys.stderr.isatty() and settings.log_format == "auto":
                    await _status_line(engine)
                await trio.sleep_forever()
    logger.info("engine_stopped root={}", settings.root)


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope, grace_seconds: float) -> None:
    async for _ in signals:
        logger.info("engine_stopping grace_seconds={}", grace_seconds)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda *_: os._exit(STOPPED_AT_ONCE))
        signal.setitimer(signal.ITIMER_REAL, max(grace_seconds, 0.1))
        scope.cancel()
        return


async def _status_line(engine: Engine) -> None:
    """One quiet line, rewritten in place."""
    last = ""
    while True:
        status = await engine.status()
        counts = status.counts
        waiting = counts.pending + counts.processing
        failed = counts.failed_permanent + counts.failed_retryable
        line = (
            f"pending {waiting}  lag {counts.lsn_max - counts.watermark}  rows {sum(status.rows.values())}  "
            f"failed {failed}  descriptors {_descriptors()}"
        )
        if line != last:
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
            last = line
        await trio.sleep(BEAT_SECONDS)


def _descriptors() -> int:
    """Open descriptors of this process; 0 where the system does not tell."""
    try:
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
