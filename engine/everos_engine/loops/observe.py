"""Looking at the disk and recording what differs from the queue: whole sweeps, and single paths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from everos_engine.loops.desk import now_milliseconds
from everos_engine.stores import queue
from everos_engine.stores.queue import Observation, Source
from everos_engine.system import files
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Database, Transaction


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one sweep found: files of a kind, changes queued, and the newest lsn once they were."""

    files: int
    queued: int
    lsn: int


async def sweep(settings: Settings, database: Database, *, source: Source) -> Sweep:
    """One sweep, recorded. Raises Transient, with nothing recorded, if any part of the tree cannot be read."""
    recognise = partial(kinds.recognise, note_globs=settings.note.globs)

    def observe() -> list[Observation]:
        seen = files.walk(settings.root, recognise)
        return [Observation(path, place.kind, _four(print_)) for path, (place, print_) in seen.items()]

    observations = await trio.to_thread.run_sync(observe)

    def record() -> Sweep:
        now = now_milliseconds()
        database.write(lambda tx: queue.load_sweep(tx, observations))
        count, vanished = database.write(lambda tx: queue.record_sweep(tx, source=source, now_milliseconds=now))
        gone = observe_paths(settings, vanished)

        def finish(tx: Transaction) -> Sweep:
            queued = queue.record(tx, gone, source=source, now_milliseconds=now)
            queue.set_meta(tx, "last_scan", str(now_milliseconds()))
            return Sweep(len(observations), count + len(queued), queue.newest(tx))

        return database.write(finish)

    return await trio.to_thread.run_sync(record, limiter=database.limiter)


def observe_paths(settings: Settings, paths: list[str]) -> list[Observation]:
    """Look at single files again; those of no kind count as gone. Raises Transient if a look fails."""
    seen = []
    for path in paths:
        place = kinds.recognise(path, note_globs=settings.note.globs)
        fingerprint = None if place is None else files.fingerprint(settings.root, place)
        kind = place.kind if place is not None else ""
        seen.append(Observation(path, kind, None if fingerprint is None else _four(fingerprint)))
    return seen


def key_in_root(settings: Settings, path: str) -> str | None:
    """The key of a path, absolute or relative to the root; None outside the root."""
    full = path if os.path.isabs(path) else os.path.join(settings.root, path)
    return files.key_of(settings.root, full)


def _four(found: files.Fingerprint) -> tuple[int, int, int, int]:
    return found.mtime_ns, found.size, found.ino, found.ctime_ns
