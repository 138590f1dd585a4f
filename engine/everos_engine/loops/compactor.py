"""Keep tables compact after they were written, and the SQLite files small. Nothing happens on a timer alone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio
from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.context import Context, now_milliseconds, wait_moved
from everos_engine.loops.erase import erase_due
from everos_engine.loops.recovery import expect_root
from everos_engine.stores import embeddings, ledger
from everos_engine.stores.versions import Version
from everos_engine.system.unit import unit

LONG_SECONDS = 3600.0
ERASE_LOOK_SECONDS = 600.0
ALLOWANCE_SECONDS = 60.0
MIN_VERSIONS = 2
"""The current version and the one before it. An optimize always leaves these two."""
MIN_REST_SECONDS = 0.05
MAX_PASSES = 4
EARLY_SHARE = 0.25
"""A share of the time for which versions are kept. A table that was not written for that long is compacted, due or
not. A table that is edited all the time is therefore not, and one that is edited now and then costs one optimize in
that time."""
MANY = 4
"""A table that is written without a pause is optimized all the same once it is this many times over its threshold."""


async def maintain(context: Context) -> None:
    """Optimize each table that is due, once commits pause. Then prune caches, and compact tables that are at rest.

    In a pause a table is optimized while edits go on, because an edit must not wait. If commits void that optimize, or
    if they never pause, the next one makes them wait.
    """
    voided: set[str] = set()
    rest = Rest(context)
    erase_at = trio.current_time()
    while True:
        seen = context.applied.value
        patience = _patience(context)
        wait = min(patience, rest.seconds())
        context.beat("maintain", within_seconds=wait + ALLOWANCE_SECONDS)
        moved = await wait_moved(context.applied, seen, at_most_seconds=wait)
        if moved:
            rest.wake()
        quiet = not moved and wait >= patience
        due = [kind for kind in context.index.open_kinds() if context.index.wants_optimize(kind)]
        for kind in due:
            if quiet or context.index.unoptimized(kind) >= MANY * context.settings.lancedb.optimize_after_commits:
                context.beat(
                    "maintain", within_seconds=context.settings.lancedb.write_deadline_seconds + ALLOWANCE_SECONDS
                )
                is_compact = False
                with unit("maintain", f"optimize {kind}"):
                    is_compact = await _optimize(context, kind, alone=kind in voided or not quiet)
                (voided.discard if is_compact else voided.add)(kind)
                rest.wake()
        if quiet:
            with unit("maintain", "prune caches"):
                await _prune(context)
        if rest.seconds() <= 0:
            await rest.compact()
        if trio.current_time() >= erase_at:  # also without a pause: what was deleted may not wait for one
            erase_at = trio.current_time() + ERASE_LOOK_SECONDS
            context.beat(
                "maintain", within_seconds=3 * context.settings.lancedb.write_deadline_seconds + ALLOWANCE_SECONDS
            )
            with unit("maintain", "erase"):
                if await erase_due(context):
                    rest.wake()


@dataclass(slots=True)
class Rest:
    """Compact a table that was not written to for as long as old versions are kept, until nothing is left to prune.

    An optimize leaves the versions before it for ``keep_versions_seconds``, so the last one before a pause leaves many
    files. The folder of versions says when it was last written to and how many there are, also after a restart. Two
    passes are needed. The first compacts what was written last, after ``EARLY_SHARE`` of that time. The second prunes
    what the first replaced. After ``MAX_PASSES`` the table is left alone until the next write, so that an idle engine
    is not woken forever.
    """

    context: Context
    _look_at: float | None = field(init=False)
    _passes: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Kind -> when we last wrote to its folder, and how many passes we made since another writer did."""

    def __post_init__(self) -> None:
        self._look_at = time.monotonic() + EARLY_SHARE * self._keep_seconds

    @property
    def _keep_seconds(self) -> float:
        return self.context.settings.lancedb.keep_versions_seconds

    def seconds(self) -> float:
        """Return how long until the tables should be looked at, in seconds.

        It is infinite if nothing is left to prune.
        """
        return float("inf") if self._look_at is None else self._look_at - time.monotonic()

    def wake(self) -> None:
        """Plan a look for the time when what was just written may be pruned, unless one is planned."""
        if self._look_at is None:
            self._look_at = time.monotonic() + EARLY_SHARE * self._keep_seconds

    async def compact(self) -> None:
        """Compact the tables whose old versions may go now, and plan the next look."""
        waits = []
        for kind in self.context.index.open_kinds():
            wait: float | None = self._keep_seconds
            with unit("maintain", f"compact {kind} at rest"):
                wait = await self._compact(kind)
            if wait is not None:
                waits.append(wait)
        self._look_at = time.monotonic() + max(MIN_REST_SECONDS, min(waits)) if waits else None

    async def _compact(self, kind: str) -> float | None:
        """Return the seconds until this table should be looked at again, or None if nothing is left to prune."""
        context, folder = self.context, self.context.index.directory / f"{kind}.lance" / "_versions"
        written, count = await trio.to_thread.run_sync(_versions, folder)
        ours, passes = self._passes.get(kind, (written, 0))
        passes = passes if ours == written else 0
        if count <= MIN_VERSIONS or passes >= MAX_PASSES:
            return None
        age = max(0.0, time.time() - written)  # a clock that was ahead makes it new
        is_early = context.index.unoptimized(kind) > 0
        rest_seconds = self._keep_seconds * (EARLY_SHARE if is_early else 1.0)
        if age < rest_seconds:
            return rest_seconds - age
        context.beat("maintain", within_seconds=context.settings.lancedb.write_deadline_seconds + ALLOWANCE_SECONDS)
        await _optimize(context, kind, alone=not is_early)  # early on an edit may come, and does not wait
        written, count = await trio.to_thread.run_sync(_versions, folder)
        self._passes[kind] = written, passes + 1
        return self._keep_seconds if count > MIN_VERSIONS else None


def _versions(folder: Path) -> tuple[float, int]:
    """Return when a table's folder of versions last changed, in seconds since the epoch, and the number of versions."""
    try:
        return folder.stat().st_mtime, len(os.listdir(folder))
    except OSError:
        return 0.0, 0


async def compact(context: Context) -> None:
    """Optimize every table that is due, once. This is for commands that write and end."""
    for kind in context.index.open_kinds():
        if context.index.wants_optimize(kind):
            await _optimize(context, kind, alone=True)
    await erase_due(context)


def _patience(context: Context) -> float:
    due = any(context.index.wants_optimize(kind) for kind in context.index.open_kinds())
    return context.settings.lancedb.optimize_idle_seconds if due else LONG_SECONDS


async def _optimize(context: Context, kind: str, *, alone: bool) -> bool:
    """Optimize one table. Returns whether it is compact now."""
    try:
        await expect_root(context)
        known = (await context.database.aread(ledger.incarnations)).get(kind)
        before = None if known is None else await context.index.recognise(kind, known.version)
        await context.index.optimize(kind, alone=alone)
        if before is not None:
            await _move_on(context, kind, before)
    except Transient as error:
        context.starved(error)
        level = "WARNING" if alone else "INFO"
        logger.log(level, "cascade_lancedb_optimize_failed kind={} error={!r}", kind, str(error))
        return False
    logger.debug("optimized kind={}", kind)
    return True


async def _move_on(context: Context, kind: str, before: Version) -> None:
    """Record the version that an optimize left, if only the optimize came after the recorded one.

    Otherwise the next commit finds the difference.
    """
    async with context.table(kind):
        known = (await context.database.aread(ledger.incarnations)).get(kind)
        if known is None or known.incarnation != context.index.incarnation_of(kind):
            return
        start = before if before.number > known.number else known.version
        reached = await context.index.advance(kind, start)
        if reached is not None:
            await context.database.awrite(lambda tx: ledger.moved_on(tx, kind, known.incarnation, version=reached))


async def _prune(context: Context) -> None:
    most = context.settings.embedder.cache_max_bytes
    dropped = await context.vectors.cache.use(
        lambda tx: embeddings.prune(tx, max_bytes=most, now_milliseconds=now_milliseconds()), otherwise=0
    )
    if dropped:
        logger.info("embedding_cache_pruned dropped={}", dropped)
    await trio.to_thread.run_sync(context.database.checkpoint, limiter=context.database.limiter)
