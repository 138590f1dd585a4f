"""Find and queue the changes for the paths that a person names, in any state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from everos_engine.keys import key_of
from everos_engine.loops.context import now_milliseconds
from everos_engine.loops.deletion_guard import to_hold
from everos_engine.loops.reconcile import probe
from everos_engine.settings import Settings
from everos_engine.stores import held, queue
from everos_engine.stores.database import Database, Transaction
from everos_engine.system.file_threads import FileThreads, open_threads


async def enqueue(
    settings: Settings, database: Database, paths: Sequence[str], *, threads: FileThreads | None = None
) -> tuple[list[str], int]:
    """Queue single paths in any state. Returns their keys and the newest lsn.

    Files that are gone count for the deletion guard like all other files. Too many of them are held. Raises
    OutsideRoot, and Transient for a path that cannot be looked at.
    """
    threads = threads or open_threads(deadline_seconds=settings.file_deadline_seconds)
    keys = [
        await threads.call(partial(key_of, settings, path), what="stat", name=os.path.join(settings.root, path))
        for path in paths
    ]
    observations, unseen = await probe(settings, threads, keys)
    for error in unseen.values():
        raise error
    now = now_milliseconds()

    def record(tx: Transaction) -> int:
        gone = [seen.md_path for seen in observations if seen.fingerprint is None]
        holding = {one.md_path: one.kind for one in to_hold(tx, settings, gone, now_milliseconds=now)}
        held.hold(tx, holding.items(), "mass_delete", now_milliseconds=now)
        todo = [seen for seen in observations if seen.md_path not in holding]
        if todo:
            queue.record(tx, todo, source="sync_path", now_milliseconds=now, force=True)
        return queue.newest(tx)

    return keys, await database.awrite(record)
