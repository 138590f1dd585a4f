"""Paths that a person names: which changes they are, and queued whatever their state."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from everos_engine.errors import OutsideRoot
from everos_engine.loops.brake import to_hold
from everos_engine.loops.desk import now_milliseconds
from everos_engine.loops.observe import key_in_root, observe
from everos_engine.stores import held, queue
from everos_engine.system import files
from everos_engine.system.file_threads import open_threads
from everos_engine.text import kinds
from everos_engine.text.kinds.layout import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from everos_engine.settings import Settings
    from everos_engine.stores.database import Database, Transaction
    from everos_engine.system.file_threads import FileThreads


async def enqueue(
    settings: Settings, database: Database, paths: Sequence[str], *, threads: FileThreads | None = None
) -> tuple[list[str], int]:
    """Queue single paths whatever their state, and return their keys and the newest lsn.

    Files that are gone count for the deletion guard like all others: too many are held. Raises OutsideRoot, and Transient for one that cannot be looked at.
    """
    threads = threads or open_threads(deadline_seconds=settings.file_deadline_seconds)
    keys = [
        await threads.call(partial(key_of, settings, path), what="stat", name=os.path.join(settings.root, path))
        for path in paths
    ]
    observations, unseen = await observe(settings, threads, keys)
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


def key_of(settings: Settings, path: str) -> str:
    """The key of the change that ``path`` belongs to, or that ``path`` is as listed by us. Raises OutsideRoot."""
    if not _is_path(path):
        message = f"{path!r} is no path that a file can have: name a path below {settings.root}"
        raise OutsideRoot(message)
    listed = files.path_of(settings.root, path)
    if not os.path.lexists(full := os.path.join(settings.root, path)):
        path = listed if os.path.lexists(listed) else files.in_other_form(full) or path
    key = key_in_root(settings, path)
    linked = None if key is None else files.linked_directory(settings.root, files.path_of(settings.root, key))
    if linked is not None:
        message = (
            f"{path!r} lies behind the link {linked!r}, and links to directories are not followed: "
            "put the directory itself there, or name the file by the directory it is in"
        )
        raise OutsideRoot(message)
    place = None if key is None else kinds.recognise(key, note_globs=settings.note.globs)
    if place is None:
        raise OutsideRoot(_refusal(settings, path, key))
    return place.md_path


def _is_path(text: str) -> bool:
    """Whether the system could have a file of this name: no NUL, and nothing that has no bytes."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _refusal(settings: Settings, path: str, key: str | None) -> str:
    """Why a path cannot be queued, and what to name instead."""
    full = os.path.join(settings.root, path)
    if os.path.isdir(full) and (key is not None or os.path.samefile(full, settings.root)):
        return f"{path!r} is a directory: name files, or no path at all to bring everything in step"
    if key is None:
        return f"{path!r} is outside the memory root {settings.root}: name a path below it"
    near = nearest(key)
    where = f"the nearest layout is {near.layout}" if near is not None else "note.globs has no pattern for it"
    return f"{key!r} is of no kind the engine indexes: {where}; `everos-engine explain` says more"
