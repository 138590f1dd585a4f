"""Maintenance: keeps tables compact after they were written, and the SQLite files small. Never on a timer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.agree import expect_root
from everos_engine.loops.desk import now_milliseconds, wait_moved
from everos_engine.stores import embeddings, ledger
from everos_engine.system.unit import unit

if TYPE_CHECKING:
    from everos_engine.loops.desk import Desk
    from everos_engine.stores.versions import Version

LONG_SECONDS = 3600.0
ALLOWANCE_SECONDS = 60.0
MANY = 4
"""A table that is written without pause is optimized all the same once it is this many times over its threshold."""


async def maintain(desk: Desk) -> None:
    """After commits, once they pause, optimize each table that is due; then prune caches.

    In a pause a table is optimized beside whatever comes, for an edit must not wait; where commits came in between and
    voided that, or do not pause at all, they wait for it.
    """
    voided: set[str] = set()
    while True:
        seen = desk.applied.value
        desk.beat("maintain", within_seconds=_patience(desk) + ALLOWANCE_SECONDS)
        quiet = not await wait_moved(desk.applied, seen, at_most_seconds=_patience(desk))
        due = [kind for kind in desk.index.open_kinds() if desk.index.wants_optimize(kind)]
        for kind in due:
            if quiet or desk.index.unoptimized(kind) >= MANY * desk.settings.lancedb.optimize_after_commits:
                desk.beat("maintain", within_seconds=desk.settings.lancedb.write_deadline_seconds + ALLOWANCE_SECONDS)
                is_compact = False
                with unit("maintain", f"optimize {kind}"):
                    is_compact = await _optimize(desk, kind, alone=kind in voided or not quiet)
                (voided.discard if is_compact else voided.add)(kind)
        if quiet:
            with unit("maintain", "prune caches"):
                await _prune(desk)


async def compact(desk: Desk) -> None:
    """Optimize every table that is due, once: for commands that write and end."""
    for kind in desk.index.open_kinds():
        if desk.index.wants_optimize(kind):
            await _optimize(desk, kind, alone=True)


def _patience(desk: Desk) -> float:
    due = any(desk.index.wants_optimize(kind) for kind in desk.index.open_kinds())
    return desk.settings.lancedb.optimize_idle_seconds if due else LONG_SECONDS


async def _optimize(desk: Desk, kind: str, *, alone: bool) -> bool:
    """Whether the table is compact now."""
    try:
        await expect_root(desk)
        known = (await desk.database.aread(ledger.incarnations)).get(kind)
        before = None if known is None else await desk.index.recognise(kind, known.version)
        await desk.index.optimize(kind, alone=alone)
        if before is not None:
            await _move_on(desk, kind, before)
    except Transient as error:
        desk.starved(error)
        level = "WARNING" if alone else "INFO"
        logger.log(level, "cascade_lancedb_optimize_failed kind={} error={!r}", kind, str(error))
        return False
    logger.debug("optimized kind={}", kind)
    return True


async def _move_on(desk: Desk, kind: str, before: Version) -> None:
    """Note the version that an optimize left, if nothing but it came after what is noted. Else the next commit's look finds it."""
    async with desk.table(kind):
        known = (await desk.database.aread(ledger.incarnations)).get(kind)
        if known is None or known.incarnation != desk.index.incarnation_of(kind):
            return
        start = before if before.number > known.number else known.version
        reached = await desk.index.advance(kind, start)
        if reached is not None:
            await desk.database.awrite(lambda tx: ledger.moved_on(tx, kind, known.incarnation, version=reached))


async def _prune(desk: Desk) -> None:
    most = desk.settings.embedder.cache_max_bytes
    dropped = await desk.vectors.cache.use(
        lambda tx: embeddings.prune(tx, max_bytes=most, now_milliseconds=now_milliseconds()), otherwise=0
    )
    if dropped:
        logger.info("embedding_cache_pruned dropped={}", dropped)
    await trio.to_thread.run_sync(desk.database.checkpoint, limiter=desk.database.limiter)
