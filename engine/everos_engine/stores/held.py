"""Held deletions: files that vanished in a way that looks like an accident. Their rows stay until a person decides.

A held path keeps its row in the queue, with the fingerprint it had. It is let go automatically when the file comes
back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from everos_engine.stores import meta, queue
from everos_engine.stores.database import Transaction, Value, drain

SCHEMA = """
CREATE TABLE IF NOT EXISTS held (
    md_path TEXT PRIMARY KEY, kind TEXT NOT NULL, reason TEXT NOT NULL, since INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recent_deletions (
    at INTEGER NOT NULL, count INTEGER NOT NULL, known INTEGER NOT NULL
) STRICT;
"""
UPGRADE_TO_3 = ""
"""What version 3 changes in the tables of version 2. New tables and indexes come with SCHEMA."""
Reason = Literal[
    "mass_delete",
    "unreadable",
    "unmounted",
    "root_missing",
    "root_unreadable",
    "root_replaced",
    "root_empty",
    "marker_missing",
]
WHY: dict[Reason, str] = {
    "mass_delete": "so many files vanished within a minute that it may be an accident",
    "unreadable": "the directory they are in cannot be read",
    "unmounted": "the file system they are on is not mounted any more",
    "root_missing": "the memory root is gone",
    "root_unreadable": "the memory root cannot be read",
    "root_replaced": "another directory lies where the memory root was",
    "root_empty": "the memory root is empty",
    "marker_missing": "the root's marker file is gone",
}
BLIND_REMEDY = (
    "check the disk or the server it is on (`dmesg | tail` shows the kernel's messages). Every scan tries again"
)
"""For a directory that cannot be read although permission is given."""
REMEDY: dict[Reason, str] = {
    "mass_delete": "bring the files back, or run `everos-engine release` if they are meant to be gone",
    "unreadable": "have it readable again (permission, or the disk), or run `everos-engine release` if its files are meant to be gone",
    "unmounted": "mount it again, or run `everos-engine release` if its files are meant to be gone",
    "root_missing": "mount it or move it back. The engine looks for it all the time",
    "root_unreadable": "give the engine's user read permission on it",
    "root_replaced": "put the old one back, or restart the engine to index what lies there now",
    "root_empty": "mount it or bring the files back, or run `everos-engine release` if they are meant to be gone",
    "marker_missing": "check that this is the right disk, then run `everos-engine release`",
}
STICKY: Reason = "mass_delete"
"""The one reason that a later full scan does not decide again. Only the files' return or ``release`` ends it."""
MOUNTS = "mounts"
"""The fact that remembers which directories of the tree were mounts."""


@dataclass(frozen=True, slots=True)
class Held:
    """How many deletions are held for one reason, and since when (milliseconds since the epoch)."""

    reason: Reason
    count: int
    since: int


class Passed(NamedTuple):
    """Deletions that were let through together: when, how many, and how many files were known before them."""

    at_milliseconds: int
    files: int
    known: int


def recent(tx: Transaction, *, now_milliseconds: int, window_milliseconds: int) -> list[Passed]:
    """Return the unreleased deletions of the window that ends now, oldest first, and forget older ones.

    A time in the future comes from a clock that was set back. It counts if it is less than a window away.
    """
    sql = "DELETE FROM recent_deletions WHERE at NOT BETWEEN ?1 - ?2 AND ?1 + ?2"
    drain(tx.execute(sql, (now_milliseconds, window_milliseconds)))
    rows = tx.execute("SELECT at, count, known FROM recent_deletions ORDER BY rowid")
    return [Passed(*row) for row in cast("Iterable[tuple[int, int, int]]", rows)]


def let_through(tx: Transaction, passed: Passed) -> None:
    """Remember deletions that were let through, for all processes that record more of them."""
    drain(tx.execute("INSERT INTO recent_deletions VALUES (?, ?, ?)", passed))


HOLD = """
INSERT INTO held VALUES (?, ?, ?, ?) ON CONFLICT (md_path) DO UPDATE SET reason = excluded.reason
"""
HOLD_ALL = """
INSERT INTO held SELECT md_path, kind, ?1, ?2 FROM md_change_state WHERE mtime_ns IS NOT NULL
ON CONFLICT (md_path) DO UPDATE SET reason = CASE reason WHEN 'mass_delete' THEN reason ELSE excluded.reason END
"""
HEAL = """
DELETE FROM held WHERE md_path IN (SELECT md_path FROM temp.scanned)
    OR md_path NOT IN (SELECT md_path FROM md_change_state WHERE mtime_ns IS NOT NULL) RETURNING 1
"""


def hold(tx: Transaction, paths: Iterable[tuple[str, str]], reason: Reason, *, now_milliseconds: int) -> None:
    """Hold the deletion of (md_path, kind) pairs. One that is held already keeps its time."""
    drain(tx.executemany(HOLD, [(path, kind, reason, now_milliseconds) for path, kind in paths]))


def hold_all(tx: Transaction, reason: Reason, *, now_milliseconds: int) -> None:
    """Hold every file that the queue knows, because the root itself is not what it was."""
    drain(tx.execute(HOLD_ALL, (reason, now_milliseconds)))


def heal(tx: Transaction) -> int:
    """Let go of what the loaded full scan saw again, or what is deleted by now. Returns how many that were."""
    return len(list(tx.execute(HEAL)))


def sticking(tx: Transaction) -> set[str]:
    """Return the paths that wait for ``release``."""
    return {cast("str", path) for (path,) in tx.execute("SELECT md_path FROM held WHERE reason = ?", (STICKY,))}


def reconsider(tx: Transaction, still: Iterable[str]) -> None:
    """Let go of all but the sticky ones and the paths ``still`` to be held, which keep their time."""
    sql = "DELETE FROM held WHERE reason <> ? AND md_path NOT IN (SELECT value FROM json_each(?))"
    drain(tx.execute(sql, (STICKY, json.dumps(list(still)))))


def counts(tx: Transaction) -> list[Held]:
    """Return what is held, by reason, the most frequent first."""
    sql = "SELECT reason, count(*), min(since) FROM held GROUP BY reason ORDER BY count(*) DESC, reason"
    return [
        Held(cast("Reason", reason), cast("int", count), cast("int", since)) for reason, count, since in tx.execute(sql)
    ]


def reason_of(tx: Transaction, md_path: str) -> Held | None:
    """Return why and since when one path is held, or None if it is not."""
    for reason, since in tx.execute("SELECT reason, since FROM held WHERE md_path = ?", (md_path,)):
        return Held(cast("Reason", reason), 1, cast("int", since))
    return None


def reasons(tx: Transaction, md_paths: Sequence[str]) -> dict[str, Reason]:
    """Return why the deletions of those of ``md_paths`` that are held are held."""
    sql = "SELECT md_path, reason FROM held WHERE md_path IN (SELECT value FROM json_each(?))"
    return {
        cast("str", path): cast("Reason", reason) for path, reason in tx.execute(sql, (json.dumps(list(md_paths)),))
    }


def paths(tx: Transaction, *, limit: int) -> list[str]:
    """Return the first ``limit`` held paths in order."""
    return [cast("str", path) for (path,) in tx.execute("SELECT md_path FROM held ORDER BY md_path LIMIT ?", (limit,))]


def release(tx: Transaction, *, now_milliseconds: int) -> list[str]:
    """Queue every held deletion after all, and expect no missing mount to come back. Returns the paths.

    A deletion that a person asked for by its path, and that was refused, is tried again now. What was let through
    before counts as intended too, and the window begins again.
    """
    drain(tx.execute("DELETE FROM recent_deletions"))
    queue.hurry(tx, "root")
    meta.put(tx, MOUNTS, "[]")  # the next full scan enters the present ones
    rows = list(tx.execute("DELETE FROM held RETURNING md_path, kind"))
    gone: Sequence[queue.Observation] = [
        queue.Observation(cast("str", path), cast("str", kind), None) for path, kind in sorted(rows, key=_path)
    ]
    return queue.record(tx, gone, source="release", now_milliseconds=now_milliseconds, force=True) if gone else []


def _path(row: tuple[Value, ...]) -> str:
    return cast("str", row[0])


__all__ = [
    "MOUNTS",
    "SCHEMA",
    "STICKY",
    "Held",
    "Passed",
    "Reason",
    "counts",
    "heal",
    "hold",
    "hold_all",
    "let_through",
    "paths",
    "reason_of",
    "reasons",
    "recent",
    "reconsider",
    "release",
    "sticking",
]
