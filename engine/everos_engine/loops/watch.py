"""The watcher: file events, gathered for a moment, become changes. Events are a hint; the scan is the truth."""

from __future__ import annotations

import os
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import trio
import watchfiles
from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.desk import Desk, now_milliseconds
from everos_engine.loops.observe import key_in_root, observe_paths
from everos_engine.stores import queue
from everos_engine.system import files
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.queue import Observation

STEP_MILLISECONDS = 20
BEAT_MILLISECONDS = 5000
ALLOWANCE_SECONDS = 60.0
INDEX_DIRECTORY = ".index"


async def watch(desk: Desk) -> None:
    """Record events until cancelled; raises Transient when the root itself goes, so that the watcher is laid anew."""
    settings = desk.settings
    if not settings.watch:
        await trio.sleep_forever()
    stop = anyio.Event()
    try:
        desk.progress.watching = True
        desk.scan_now.value += 1  # what changed before the watches were laid has no event
        batches = watchfiles.awatch(
            settings.root,
            watch_filter=None,
            debounce=settings.watch_debounce_milliseconds,
            step=STEP_MILLISECONDS,
            stop_event=stop,
            ignore_permission_denied=False,
            rust_timeout=BEAT_MILLISECONDS,
            yield_on_timeout=True,
        )
        async with trio.open_nursery() as nursery, aclosing(batches):
            nursery.start_soon(_stop_when_cancelled, stop)
            desk.beat("watch", within_seconds=ALLOWANCE_SECONDS)
            async for batch in batches:
                desk.beat("watch", within_seconds=ALLOWANCE_SECONDS)
                paths = {path for _, path in batch if not _ours(settings, path)}
                if not os.path.isdir(settings.root):
                    message = f"the memory root {settings.root} is gone"
                    raise Transient(message)
                if paths:
                    await _record(desk, paths)
    finally:
        desk.progress.watching = False
        stop.set()


async def _stop_when_cancelled(stop: anyio.Event) -> None:
    """The watching thread cannot be cancelled, only told; without this a stop waits for its time-out of 5 s."""
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


async def _record(desk: Desk, paths: set[str]) -> None:
    def look() -> list[str]:
        observations = _observe(desk, paths)
        now = now_milliseconds()
        return desk.database.write(lambda tx: queue.record(tx, observations, source="watch", now_milliseconds=now))

    try:
        queued = await trio.to_thread.run_sync(look, limiter=desk.database.limiter)
    except Transient as error:
        logger.warning("events_left_to_scan count={} error={!r}", len(paths), str(error))
        desk.scan_now.value += 1
        return
    if queued:
        desk.wake_up()


def _observe(desk: Desk, paths: set[str]) -> list[Observation]:
    """A look at every path named, at all below a directory that appeared, and at all known below one that went."""
    settings = desk.settings
    keys: dict[str, None] = {}
    for path in paths:
        key = key_in_root(settings, path)
        if key is None:
            continue
        place = kinds.recognise(key, note_globs=settings.note.globs)
        if place is not None:
            keys[place.md_path] = None
        if os.path.isdir(path):  # noqa: PTH112 - str in, str out
            keys.update(dict.fromkeys(_below(settings, path)))
        elif place is None:
            keys.update(dict.fromkeys(desk.database.read(lambda tx, k=key: queue.known_below(tx, k))))  # type: ignore[misc]
    return observe_paths(settings, list(keys))


def _below(settings: Settings, directory: str) -> list[str]:
    def recognise(key: str) -> kinds.Place | None:
        return kinds.recognise(key, note_globs=settings.note.globs)

    return list(files.walk(settings.root, recognise, below=directory))


def _ours(settings: Settings, path: str) -> bool:
    below = os.path.relpath(path, settings.root)
    return below == INDEX_DIRECTORY or below.startswith(INDEX_DIRECTORY + os.sep)
