"""The scan is the truth: a sweep of the whole tree at the start, on a beat, and on demand."""

from __future__ import annotations

from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.desk import Desk, now_milliseconds, wait_moved
from everos_engine.loops.observe import sweep

SWEEP_ALLOWANCE_SECONDS = 120.0


async def scan(desk: Desk) -> None:
    """Sweep at the start, every ``scan_interval_seconds``, and whenever ``scan_now`` moves."""
    while True:
        seen = desk.scan_now.value
        desk.beat("scan", within_seconds=SWEEP_ALLOWANCE_SECONDS)
        try:
            found = await sweep(desk.settings, desk.database, source="scan")
        except Transient as error:
            logger.warning("sweep_void error={!r}", str(error))
        else:
            desk.progress.last_scan_milliseconds = now_milliseconds()
            if found.queued:
                logger.info("sweep files={} queued={}", found.files, found.queued)
                desk.wake_up()
        desk.beat("scan", within_seconds=desk.settings.scan_interval_seconds + SWEEP_ALLOWANCE_SECONDS)
        await wait_moved(desk.scan_now, seen, at_most_seconds=desk.settings.scan_interval_seconds)
