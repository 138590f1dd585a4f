"""``everos-engine run``: the engine until a signal, with a status line on a terminal."""

from __future__ import annotations

import gc
import os

import trio
from loguru import logger

from everos_engine.cli.logs import set_up
from everos_engine.cli.progress import Screen, show_status
from everos_engine.cli.signals import SIGNALS, in_grace_no_more, stop_on_signal
from everos_engine.engine import open_engine
from everos_engine.errors import EngineError, unwrap
from everos_engine.settings import Settings


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM. A second signal stops immediately. The exit status is 0 after a graceful stop."""
    screen = set_up(settings)
    try:
        trio.run(_serve, settings, screen)
    except EngineError:
        raise
    except BaseExceptionGroup as group:
        raise unwrap(group) from None
    finally:
        in_grace_no_more()
        if screen is not None:
            screen.clear()
    return 0


async def _serve(settings: Settings, screen: Screen | None) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            grace_seconds = settings.shutdown_grace_seconds
            nursery.start_soon(
                stop_on_signal,
                signals,
                nursery.cancel_scope,
                grace_seconds,
                lambda: logger.info("engine_stopping grace_seconds={}", grace_seconds),
            )
            async with open_engine(settings) as engine:
                gc.freeze()  # objects made by now stay for good, so the garbage collector need not look through them after each scan
                logger.info("engine_started root={} pid={}", settings.root, os.getpid())
                if screen is not None:
                    await show_status(engine, screen)
                await trio.sleep_forever()
    logger.info("engine_stopped root={}", settings.root)
