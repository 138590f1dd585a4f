"""Compare a full scan with the queue.

The functions here find what changed, whose fingerprint cannot be trusted, and what an audit reads next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from everos_engine.stores.database import Transaction, Value, drain
from everos_engine.stores.queue import Fingerprint4, Observation, Source, record, take

SCANNED_TABLE = """
CREATE TEMP TABLE IF NOT EXISTS scanned (md_path TEXT PRIMARY KEY, kind TEXT, mtime_ns INTEGER, size INTEGER, ino INTEGER,
    ctime_ns INTEGER) WITHOUT ROWID;
DELETE FROM temp.scanned;
"""
SCANNED_CHANGED = """
SELECT s.md_path, s.kind, s.mtime_ns, s.size, s.ino, s.ctime_ns, c.md_path IS NULL OR c.mtime_ns IS NULL FROM temp.scanned AS s
LEFT JOIN md_change_state AS c ON c.md_path = s.md_path
WHERE c.md_path IS NULL OR (c.mtime_ns, c.size, c.ino, c.ctime_ns) IS NOT (s.mtime_ns, s.size, s.ino, s.ctime_ns)
   OR (c.racy = 1 AND c.status IN ('done', 'failed'))
"""
SCANNED_VANISHED = """
SELECT c.md_path, c.kind, c.size, c.mtime_ns,
    (c.ino, c.size, c.mtime_ns) IN (SELECT ino, size, mtime_ns FROM temp.scanned)
    OR (c.kind = 'agent_skill' AND (c.size, c.mtime_ns) IN (SELECT size, mtime_ns FROM temp.scanned WHERE kind = 'agent_skill')),
    c.known_since
FROM md_change_state AS c
WHERE c.mtime_ns IS NOT NULL AND NOT EXISTS (SELECT 1 FROM temp.scanned AS s WHERE s.md_path = c.md_path)
"""
"""A file that has another name now keeps its inode. The inode of a skill also stands for its other files, so it is
not used."""


def load_full_scan(tx: Transaction, observations: Iterable[Observation]) -> None:
    """Put a whole full scan into a temporary table, for ``record_full_scan``."""
    drain(tx.execute(SCANNED_TABLE))
    rows: Iterable[tuple[Value, ...]] = (
        (seen.md_path, seen.kind, *seen.fingerprint) for seen in observations if seen.fingerprint is not None
    )
    drain(tx.executemany("INSERT OR REPLACE INTO temp.scanned VALUES (?, ?, ?, ?, ?, ?)", rows))


@dataclass(frozen=True, slots=True)
class Vanished:
    """A known file that is not there any more, with the size and mtime it had.

    ``elsewhere``: it is there under another name. ``known_since``: when it was first recorded, in milliseconds.
    """

    md_path: str
    kind: str
    size: int
    mtime_ns: int
    elsewhere: bool
    known_since: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """The result of a comparison.

    It has the paths queued, (size, mtime_ns) of files never seen before, what vanished, and the number of files known.
    """

    queued: list[str]
    appeared: list[tuple[int, int]]
    vanished: list[Vanished]
    known: int


def record_full_scan(
    tx: Transaction,
    *,
    source: Source,
    now_milliseconds: int,
    settle_milliseconds: int = 0,
    verified: frozenset[Observation] = frozenset(),
) -> Compared:
    """Queue all that a loaded full scan found changed, except for those ``verified`` by content.

    The vanished are not queued. The caller looks at each again and records it, so that a file created during the
    scan, or one that the deletion guard holds, does not count as deleted.
    """
    rows = list(tx.execute(SCANNED_CHANGED))
    changed = [
        Observation(cast("str", row[0]), cast("str", row[1]), cast("Fingerprint4", tuple(row[2:6]))) for row in rows
    ]
    changed = [seen for seen in changed if seen not in verified]
    appeared = [(cast("int", row[3]), cast("int", row[2])) for row in rows if row[6]]
    queued = (
        record(tx, changed, source=source, now_milliseconds=now_milliseconds, settle_milliseconds=settle_milliseconds)
        if changed
        else []
    )
    vanished = [_vanished(row) for row in tx.execute(SCANNED_VANISHED)]
    ((known,),) = tx.execute("SELECT count(*) FROM md_change_state WHERE mtime_ns IS NOT NULL")
    return Compared(queued, appeared, vanished, cast("int", known))


VANISHED = """
WITH gone AS MATERIALIZED (
    SELECT md_path, kind, size, mtime_ns, ino, known_since FROM md_change_state
    WHERE md_path IN (SELECT value FROM json_each(?)) AND mtime_ns IS NOT NULL
), present AS MATERIALIZED (
    SELECT kind, size, mtime_ns, ino FROM md_change_state
    WHERE mtime_ns IS NOT NULL AND size IN (SELECT size FROM gone) AND md_path NOT IN (SELECT md_path FROM gone)
)
SELECT md_path, kind, size, mtime_ns,
    (ino, size, mtime_ns) IN (SELECT ino, size, mtime_ns FROM present)
    OR (kind = 'agent_skill' AND (size, mtime_ns) IN (SELECT size, mtime_ns FROM present WHERE kind = 'agent_skill')),
    known_since
FROM gone
"""


def vanished(tx: Transaction, paths: Sequence[str]) -> list[Vanished]:
    """Return those of ``paths`` that the queue knows as files, for a caller that found them gone."""
    return [_vanished(row) for row in tx.execute(VANISHED, (json.dumps(list(paths)),))]


def _vanished(row: tuple[Value, ...]) -> Vanished:
    path, kind, size, mtime_ns, elsewhere, known_since = row
    return Vanished(
        cast("str", path),
        cast("str", kind),
        cast("int", size),
        cast("int", mtime_ns),
        elsewhere=bool(elsewhere),
        known_since=cast("int", known_since),
    )


KNOWN_LONG = """
UPDATE md_change_state SET known_since = 0
WHERE known_since > 0 AND (size, mtime_ns) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?))
"""


def carry_age(tx: Transaction, moved: Iterable[Vanished]) -> None:
    """Record that files with the content of ``moved`` are not new. A rename makes a file no younger."""
    old = sorted({(one.size, one.mtime_ns) for one in moved})
    if old:
        drain(tx.execute(KNOWN_LONG, (json.dumps(old),)))


def credit(tx: Transaction, found_by: Literal["scan", "watch"], count: int) -> None:
    """Count changes by who noticed them."""
    take(tx, f"found_by_{found_by}", count)


RACY = """
SELECT md_path, kind, mtime_ns, size, ino, ctime_ns, digest FROM md_change_state
WHERE racy = 1 AND status IN ('done', 'failed') AND digest IS NOT NULL AND mtime_ns IS NOT NULL
    AND (?1 IS NULL OR md_path IN (SELECT value FROM json_each(?1)))
"""
TRUST = """
UPDATE md_change_state SET racy = 0 WHERE md_path = ? AND digest = ? AND status IN ('done', 'failed')
    AND (mtime_ns, size, ino, ctime_ns) IS (?, ?, ?, ?)
"""


def racy(tx: Transaction, paths: Sequence[str] | None = None) -> list[tuple[Observation, bytes]]:
    """Return files at rest whose fingerprint cannot be trusted, with the digest of what was indexed.

    ``paths`` limits them. The default is all files.
    """
    asked = None if paths is None else json.dumps(list(paths))
    return [_with_digest(row) for row in tx.execute(RACY, (asked,))]


def trust(tx: Transaction, seen: Iterable[tuple[Observation, bytes]]) -> None:
    """Record that these were read again and are what was indexed. From now on their fingerprint is trusted."""
    drain(tx.executemany(TRUST, [(one.md_path, digest, *(one.fingerprint or ())) for one, digest in seen]))


def _with_digest(row: tuple[Value, ...]) -> tuple[Observation, bytes]:
    fingerprint = cast("Fingerprint4", tuple(row[2:6]))
    return Observation(cast("str", row[0]), cast("str", row[1]), fingerprint), cast("bytes", row[6])


AUDIT = """
SELECT md_path, kind, mtime_ns, size, ino, ctime_ns, digest FROM md_change_state
WHERE md_path > ? AND status IN ('done', 'failed') AND digest IS NOT NULL ORDER BY md_path LIMIT ?
"""


def to_audit(tx: Transaction, after: str, *, limit: int) -> list[tuple[Observation, bytes]]:
    """Return the next ``limit`` files at rest, in order of path, with the digest of what was indexed."""
    return [_with_digest(row) for row in tx.execute(AUDIT, (after, limit))]


def files(tx: Transaction) -> int:
    """Return how many files the queue knows."""
    ((known,),) = tx.execute("SELECT count(*) FROM md_change_state WHERE mtime_ns IS NOT NULL")
    return cast("int", known)


def known_below(tx: Transaction, directory: str) -> list[str]:
    """Return the known paths below a directory that may be gone."""
    sql = (
        "SELECT md_path FROM md_change_state WHERE md_path > ?1 || '/' AND md_path < ?1 || '0' AND mtime_ns IS NOT NULL"
    )
    return [cast("str", row[0]) for row in tx.execute(sql, (directory,))]
