"""The change queue: one row per path, claimed and marked in transactions that never lose an edit.

Every function here runs inside one transaction of ``stores.database`` and does one arrow of the state machine
drawn in the docs. Times are milliseconds since the epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from everos_engine.stores.database import Transaction, Value, drain

SCHEMA = """
CREATE TABLE IF NOT EXISTS md_change_state (
    md_path     TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,
    lsn         INTEGER NOT NULL,
    pos         INTEGER NOT NULL,
    status      TEXT NOT NULL CHECK (status IN ('pending', 'processing', 'done', 'failed')),
    claim_no    INTEGER,
    claim_lsn   INTEGER,
    owner       TEXT,
    not_before  INTEGER NOT NULL DEFAULT 0,
    mtime_ns    INTEGER,
    size        INTEGER,
    ino         INTEGER,
    ctime_ns    INTEGER,
    racy        INTEGER NOT NULL DEFAULT 0,
    digest      BLOB,
    retry_count INTEGER NOT NULL DEFAULT 0,
    retryable   INTEGER,
    error       TEXT,
    source      TEXT NOT NULL,
    first_seen  INTEGER NOT NULL,
    updated     INTEGER NOT NULL,
    waits_for   TEXT CHECK (waits_for IN ('retry', 'settle', 'embedder', 'root', 'descriptors', 'disk', 'file'))
                     CHECK ((waits_for IS NOT NULL) = (status = 'pending' AND not_before > 0)),
    failed_for  TEXT CHECK (failed_for IS NULL OR status = 'failed'),
    known_since INTEGER NOT NULL DEFAULT 0,
    CHECK ((status = 'processing') = (claim_no IS NOT NULL)),
    CHECK ((status = 'failed') = (retryable IS NOT NULL))
) STRICT;
CREATE INDEX IF NOT EXISTS change_ready   ON md_change_state (pos) WHERE status = 'pending' AND not_before = 0;
CREATE INDEX IF NOT EXISTS change_delayed ON md_change_state (not_before, pos) WHERE status = 'pending' AND not_before > 0;
CREATE INDEX IF NOT EXISTS change_clock   ON md_change_state (updated) WHERE status = 'pending' AND not_before > 0;
CREATE INDEX IF NOT EXISTS change_claimed ON md_change_state (owner, pos) WHERE status = 'processing';
CREATE INDEX IF NOT EXISTS idx_md_change_retryable ON md_change_state (retryable, lsn) WHERE status = 'failed';
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) STRICT, WITHOUT ROWID;
INSERT INTO counter VALUES ('lsn', 0), ('claim', 0), ('found_by_scan', 0), ('found_by_watch', 0)
    ON CONFLICT (name) DO NOTHING;
"""
UPGRADE_TO_3 = """
UPDATE md_change_state SET not_before = 0 WHERE not_before > 0;
ALTER TABLE md_change_state ADD COLUMN waits_for TEXT CHECK (waits_for IN ('retry', 'settle', 'embedder', 'root', 'descriptors', 'disk', 'file'))
    CHECK ((waits_for IS NOT NULL) = (status = 'pending' AND not_before > 0));
ALTER TABLE md_change_state ADD COLUMN failed_for TEXT CHECK (failed_for IS NULL OR status = 'failed');
ALTER TABLE md_change_state ADD COLUMN known_since INTEGER NOT NULL DEFAULT 0;
UPDATE md_change_state SET failed_for = '{"max_file_bytes": "", "embedder": ""}' WHERE status = 'failed' AND retryable = 0;
"""
"""What version 3 changes in the tables of version 2.

A change that waited without a typed reason is ready now. One that failed without it is tried once more, since it may
have failed because of a setting."""

Status = Literal["pending", "processing", "done", "failed"]
WaitsFor = Literal["retry", "settle", "embedder", "root", "descriptors", "disk", "file"]
OUTSIDE: tuple[WaitsFor, ...] = ("embedder", "root", "descriptors", "disk", "file")
"""Reasons that lie outside a change and its file. An engine that starts does not know whether they still hold."""
"""Why a pending change may not be claimed before a set time."""
Fingerprint4 = tuple[int, int, int, int]
Source = Literal["watch", "start", "scan", "sync", "sync_path", "rebuild", "audit", "release"]


class Observation(NamedTuple):
    """What a look at the disk saw. ``fingerprint`` is None if there is no file (any more)."""

    md_path: str
    kind: str
    fingerprint: Fingerprint4 | None


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's hold on one change.

    ``claim_no`` is unique, ``first_seen`` is when the oldest edit was queued, ``source`` is who found the newest.
    """

    md_path: str
    kind: str
    claim_no: int
    claim_lsn: int
    pos: int
    retry_count: int
    first_seen: int
    source: Source


TAKE = "UPDATE counter SET value = value + ? WHERE name = ? RETURNING value"


def take(tx: Transaction, name: str, count: int) -> int:
    """Advance a counter by ``count``. Returns the first of the numbers taken."""
    ((last,),) = tx.execute(TAKE, (count, name))
    return cast("int", last) - count + 1


KNOWN = """
SELECT md_path, mtime_ns, size, ino, ctime_ns, racy, status FROM md_change_state
WHERE md_path IN (SELECT value FROM json_each(?))
"""

SETTLED = """CASE
        WHEN ?10 = 0 OR status = 'processing' THEN 0
        WHEN status = 'pending' THEN CASE WHEN retry_count = 0 AND not_before <= ?9 + ?10 THEN not_before ELSE 0 END
        WHEN ?9 - updated BETWEEN 0 AND ?10 THEN updated + ?10 ELSE 0 END"""
"""When a change that is recorded again at ?9 may be claimed, if it has ?10 milliseconds to settle."""
RECORD = f"""
INSERT INTO md_change_state
    (md_path, kind, lsn, pos, status, mtime_ns, size, ino, ctime_ns, source, first_seen, updated, known_since)
VALUES (?1, ?2, ?3, ?3, 'pending', ?4, ?5, ?6, ?7, ?8, ?9, ?9, ?9)
ON CONFLICT (md_path) DO UPDATE SET
    kind = CASE excluded.kind WHEN '' THEN kind ELSE excluded.kind END,
    lsn = excluded.lsn,
    pos = CASE WHEN status IN ('pending', 'processing') THEN pos ELSE excluded.lsn END,
    first_seen = CASE WHEN status IN ('pending', 'processing') THEN first_seen ELSE excluded.first_seen END,
    status = CASE WHEN status = 'processing' THEN status ELSE 'pending' END,
    not_before = {SETTLED}, waits_for = CASE WHEN {SETTLED} > 0 THEN 'settle' END,
    retry_count = 0, retryable = NULL, error = NULL, failed_for = NULL, racy = 0,
    known_since = CASE WHEN mtime_ns IS NULL THEN excluded.known_since ELSE known_since END,
    mtime_ns = excluded.mtime_ns, size = excluded.size, ino = excluded.ino, ctime_ns = excluded.ctime_ns,
    source = CASE
        WHEN status IN ('pending', 'processing') AND source IN ('sync', 'rebuild')
            AND excluded.source NOT IN ('rebuild', 'release') THEN source
        ELSE excluded.source END,
    updated = excluded.updated
"""


def record(
    tx: Transaction,
    observations: Sequence[Observation],
    *,
    source: Source,
    now_milliseconds: int,
    force: bool = False,
    settle_milliseconds: int = 0,
) -> list[str]:
    """Queue what differs from what is known. Returns the paths queued, in order.

    A repeated fingerprint writes nothing, unless it is racy (a later write of the same size could have left it) and the
    change is at rest. ``force`` queues with any fingerprint. A change that a person named, or whose table was made
    again, keeps that source until it is applied, because all of its rows are to be written. A pending change keeps its
    place in the line. One that was marked within the last ``settle_milliseconds`` becomes claimable when they are over,
    so that a file written without pause is not indexed without pause.
    """
    paths = json.dumps([observation.md_path for observation in observations])
    known = {row[0]: row for row in tx.execute(KNOWN, (paths,))}
    queued = [seen for seen in observations if force or _is_news(seen, known.get(seen.md_path))]
    if not queued:
        return []
    first = take(tx, "lsn", len(queued))
    if source == "watch":
        take(tx, "found_by_watch", len(queued))
    rows: list[tuple[Value, ...]] = [
        (
            seen.md_path,
            seen.kind,
            first + offset,
            *(seen.fingerprint or (None, None, None, None)),
            source,
            now_milliseconds,
            0 if force else settle_milliseconds,
        )
        for offset, seen in enumerate(queued)
    ]
    drain(tx.executemany(RECORD, rows))
    return [seen.md_path for seen in queued]


def _is_news(seen: Observation, row: tuple[Value, ...] | None) -> bool:
    if row is None:
        return seen.fingerprint is not None
    _, mtime_ns, size, ino, ctime_ns, racy, status = row
    if seen.fingerprint is None:
        return mtime_ns is not None
    if (mtime_ns, size, ino, ctime_ns) != seen.fingerprint:
        return True
    return bool(racy) and status in {"done", "failed"}


WAKE_DELAYED = """
UPDATE md_change_state SET not_before = 0, waits_for = NULL WHERE status = 'pending' AND not_before > 0 AND not_before <= ?
"""
WAKE_AFTER_CLOCK = """
UPDATE md_change_state SET not_before = 0, waits_for = NULL WHERE status = 'pending' AND not_before > 0 AND updated > ?
"""
"""A wait that began in the future. The clock was set back since, and its end may be far away."""
WAKE_TOO_FAR = """
UPDATE md_change_state SET not_before = 0, waits_for = NULL WHERE status = 'pending' AND not_before > 0 AND not_before > ?
"""
"""A wait that lasts longer than any can."""
LONGEST_WAIT_MILLISECONDS = 4_500_000
"""The longest wait that a service can ask for (an hour, by Retry-After), with a quarter of jitter."""
CLAIM = """
UPDATE md_change_state SET status = 'processing', claim_no = ?1 + next.nth, claim_lsn = lsn, owner = ?2, updated = ?3
FROM (
    SELECT md_path AS path, row_number() OVER (ORDER BY pos) - 1 AS nth FROM md_change_state
    WHERE status = 'pending' AND not_before = 0 ORDER BY pos LIMIT ?4
) AS next
WHERE md_path = next.path
RETURNING md_path, kind, claim_no, claim_lsn, pos, retry_count, first_seen, source
"""


def claim(
    tx: Transaction,
    owner: str,
    *,
    limit: int,
    now_milliseconds: int,
    longest_wait_milliseconds: int = LONGEST_WAIT_MILLISECONDS,
) -> list[Claim]:
    """Claim up to ``limit`` ready changes, oldest first. No other worker has one of them until it is marked.

    No change waits longer than ``longest_wait_milliseconds``, counted from now, even if the clock was set back.
    """
    drain(tx.execute(WAKE_DELAYED, (now_milliseconds,)))
    drain(tx.execute(WAKE_AFTER_CLOCK, (now_milliseconds,)))
    drain(tx.execute(WAKE_TOO_FAR, (now_milliseconds + longest_wait_milliseconds,)))
    first = take(tx, "claim", limit)
    rows = tx.execute(CLAIM, (first, owner, now_milliseconds, limit))
    claims = [Claim(*row) for row in cast("Iterable[tuple[str, str, int, int, int, int, int, Source]]", rows)]
    return sorted(claims, key=lambda held: held.pos)


FORGET = "DELETE FROM md_change_state WHERE md_path = ? AND claim_no = ? AND lsn = claim_lsn"
DONE = """
UPDATE md_change_state SET
    status = CASE WHEN lsn = claim_lsn THEN 'done' ELSE 'pending' END,
    pos = CASE WHEN lsn = claim_lsn THEN pos ELSE claim_lsn + 1 END,
    mtime_ns = CASE WHEN lsn = claim_lsn THEN ?2 ELSE mtime_ns END,
    size = CASE WHEN lsn = claim_lsn THEN ?3 ELSE size END,
    ino = CASE WHEN lsn = claim_lsn THEN ?4 ELSE ino END,
    ctime_ns = CASE WHEN lsn = claim_lsn THEN ?5 ELSE ctime_ns END,
    racy = CASE WHEN lsn = claim_lsn THEN ?6 ELSE racy END,
    digest = CASE WHEN lsn = claim_lsn THEN ?8 ELSE digest END,
    not_before = CASE WHEN lsn = claim_lsn OR ?9 = 0 THEN 0 ELSE ?7 + ?9 END,
    waits_for = CASE WHEN lsn = claim_lsn OR ?9 = 0 THEN NULL ELSE 'settle' END,
    claim_no = NULL, claim_lsn = NULL, owner = NULL, retry_count = 0, updated = ?7
WHERE md_path = ?10 AND claim_no = ?1
"""


def mark_done(
    tx: Transaction,
    held: Claim,
    fingerprint: Fingerprint4 | None,
    *,
    racy: bool,
    now_milliseconds: int,
    digest: bytes | None = None,
    settle_milliseconds: int = 0,
) -> None:
    """Mark the change as applied, as read with ``fingerprint`` and ``digest``.

    Without a fingerprint the file is gone, and its row goes too. A change edited meanwhile goes back to pending behind
    the edits that were applied, and has time to settle.
    """
    if fingerprint is None:
        drain(tx.execute(FORGET, (held.md_path, held.claim_no)))
    values = fingerprint or (None, None, None, None)
    drain(
        tx.execute(
            DONE, (held.claim_no, *values, int(racy), now_milliseconds, digest, settle_milliseconds, held.md_path)
        )
    )


FAILED = """
UPDATE md_change_state SET
    status = CASE WHEN lsn = claim_lsn THEN 'failed' ELSE 'pending' END,
    retryable = CASE WHEN lsn = claim_lsn THEN ?2 END,
    error = CASE WHEN lsn = claim_lsn THEN ?3 END,
    pos = CASE WHEN lsn = claim_lsn THEN pos ELSE claim_lsn + 1 END,
    mtime_ns = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?4 ELSE mtime_ns END,
    size = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?5 ELSE size END,
    ino = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?6 ELSE ino END,
    ctime_ns = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?7 ELSE ctime_ns END,
    racy = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?8 ELSE racy END,
    digest = CASE WHEN lsn = claim_lsn AND ?4 IS NOT NULL THEN ?10 ELSE digest END,
    failed_for = CASE WHEN lsn = claim_lsn THEN ?12 END,
    claim_no = NULL, claim_lsn = NULL, owner = NULL, updated = ?9
WHERE md_path = ?11 AND claim_no = ?1
"""


def mark_failed(
    tx: Transaction,
    held: Claim,
    error: str,
    *,
    retryable: bool,
    fingerprint: Fingerprint4 | None = None,
    racy: bool = False,
    digest: bytes | None = None,
    failed_for: Mapping[str, str] | None = None,
    now_milliseconds: int,
) -> None:
    """Dead-letter the change, unless it was edited meanwhile. Then the edit is tried too.

    ``failed_for`` maps each setting that is to blame to its value now. See ``requeue_for_settings``.
    """
    values = fingerprint or (None, None, None, None)
    blamed = json.dumps(dict(failed_for)) if failed_for else None
    row = (held.claim_no, int(retryable), error, *values, int(racy), now_milliseconds, digest, held.md_path, blamed)
    drain(tx.execute(FAILED, row))


POSTPONE = """
UPDATE md_change_state SET status = 'pending',
    not_before = CASE WHEN lsn = claim_lsn THEN ?2 ELSE 0 END,
    waits_for = CASE WHEN lsn = claim_lsn AND ?2 > 0 THEN ?7 END,
    retry_count = CASE WHEN lsn = claim_lsn THEN retry_count + ?3 ELSE 0 END,
    error = ?4, claim_no = NULL, claim_lsn = NULL, owner = NULL, updated = ?5
WHERE md_path = ?6 AND claim_no = ?1
"""


def postpone(
    tx: Transaction,
    held: Claim,
    error: str | None,
    *,
    not_before: int,
    now_milliseconds: int,
    waits_for: WaitsFor = "retry",
    counts_as_retry: bool = True,
) -> None:
    """Put the change back to pending, claimable from ``not_before`` on. No worker sleeps on it."""
    row = (held.claim_no, not_before, int(counts_as_retry), error, now_milliseconds, held.md_path, waits_for)
    drain(tx.execute(POSTPONE, row))


HURRY = """
UPDATE md_change_state SET not_before = 0, waits_for = NULL WHERE status = 'pending' AND not_before > 0
    AND waits_for IN (SELECT value FROM json_each(?))
"""


def hurry(tx: Transaction, *reasons: WaitsFor) -> None:
    """Make every change ready that waits for one of these reasons."""
    drain(tx.execute(HURRY, (json.dumps(reasons),)))


RELEASE = """
UPDATE md_change_state SET status = 'pending', claim_no = NULL, claim_lsn = NULL, owner = NULL, not_before = 0, waits_for = NULL
WHERE status = 'processing' AND owner = ? RETURNING 1
"""


def recover(tx: Transaction, dead_owners: Iterable[str]) -> int:
    """Hand back everything that these owners held. Returns how many changes that was."""
    return sum(len(list(tx.execute(RELEASE, (owner,)))) for owner in dead_owners)


CLAIMED = "SELECT claim_no FROM md_change_state WHERE status = 'processing' AND owner = ?"


def claimed(tx: Transaction, owner: str) -> list[int]:
    """Return the numbers of an owner's claims."""
    return [cast("int", number) for (number,) in tx.execute(CLAIMED, (owner,))]


HAND_BACK = """
UPDATE md_change_state SET status = 'pending', claim_no = NULL, claim_lsn = NULL, owner = NULL, not_before = 0, waits_for = NULL
WHERE status = 'processing' AND owner = ? AND claim_no IN (SELECT value FROM json_each(?)) RETURNING 1
"""


def hand_back(tx: Transaction, owner: str, claim_numbers: Sequence[int]) -> int:
    """Hand back claims that their owner no longer knows. Returns how many there were."""
    return len(list(tx.execute(HAND_BACK, (owner, json.dumps(list(claim_numbers))))))


def owners(tx: Transaction) -> list[str]:
    """Return the owners of the present claims."""
    return [
        cast("str", row[0])
        for row in tx.execute("SELECT DISTINCT owner FROM md_change_state WHERE status = 'processing'")
    ]


WATERMARK = """
SELECT min(pos) FROM (
    SELECT min(pos) AS pos FROM md_change_state WHERE status = 'pending' AND not_before = 0
    UNION ALL SELECT min(pos) FROM md_change_state WHERE status = 'pending' AND not_before > 0
    UNION ALL SELECT min(pos) FROM md_change_state WHERE status = 'processing'
)
"""


def newest(tx: Transaction) -> int:
    """Return the newest lsn."""
    ((value,),) = tx.execute("SELECT value FROM counter WHERE name = 'lsn'")
    return cast("int", value)


def watermark(tx: Transaction) -> int:
    """Return the highest lsn with every change at or below it applied or dead-lettered."""
    ((oldest,),) = tx.execute(WATERMARK)
    return newest(tx) if oldest is None else cast("int", oldest) - 1


UNREACHED = """
SELECT 1 FROM md_change_state
WHERE status IN ('pending', 'processing') AND pos <= ? AND NOT (not_before > 0 AND waits_for IS 'file') LIMIT 1
"""


def reached(tx: Transaction, lsn: int) -> bool:
    """Return whether every change up to ``lsn`` is applied, dead-lettered, or waits for a file that does not answer."""
    return watermark(tx) >= lsn or not list(tx.execute(UNREACHED, (lsn,)))


def rebuilding(tx: Transaction) -> int | None:
    """Return the newest lsn of the changes that wait because their table was recreated, or None."""
    sql = "SELECT max(lsn) FROM md_change_state WHERE status IN ('pending', 'processing') AND source = 'rebuild'"
    ((lsn,),) = tx.execute(sql)
    return cast("int | None", lsn)


WAITS_FOR_ROOT = """
SELECT md_path, error FROM md_change_state
WHERE status = 'pending' AND not_before > 0 AND pos <= ? AND waits_for = 'root' ORDER BY pos LIMIT 1
"""


def refused(tx: Transaction, lsn: int) -> str | None:
    """Return the first change up to ``lsn`` that waits for a person to repair the root, and why, or None."""
    for path, error in tx.execute(WAITS_FOR_ROOT, (lsn,)):
        return f"{path!s}: {error!s}"
    return None


def ready(tx: Transaction) -> int:
    """Return how many changes could be claimed now."""
    sql = "SELECT count(*) FROM md_change_state WHERE status = 'pending' AND not_before = 0"
    ((count,),) = tx.execute(sql)
    return cast("int", count)


BEGAN_IN_THE_FUTURE = "SELECT max(updated) FROM md_change_state WHERE status = 'pending' AND not_before > 0"


def next_due(
    tx: Transaction, *, now_milliseconds: int, longest_wait_milliseconds: int = LONGEST_WAIT_MILLISECONDS
) -> int | None:
    """Return when the first delayed change becomes claimable, or None.

    It is now if the clock was set back since the delay.
    """
    sql = "SELECT min(not_before) FROM md_change_state WHERE status = 'pending' AND not_before > 0"
    ((due,),) = tx.execute(sql)
    ((began,),) = tx.execute(BEGAN_IN_THE_FUTURE)
    if due is None:
        return None
    is_far = cast("int", due) > now_milliseconds + longest_wait_milliseconds
    if is_far or cast("int", began) > now_milliseconds:
        return min(cast("int", due), now_milliseconds)
    return cast("int", due)


REQUEUE = """
UPDATE md_change_state SET status = 'pending', lsn = ?2, pos = ?2, retry_count = 0, retryable = NULL, error = NULL,
    failed_for = NULL, not_before = 0, waits_for = NULL, first_seen = ?3, updated = ?3
WHERE md_path = ?1 AND status = 'failed'
"""


RETRYABLE = "SELECT md_path FROM md_change_state WHERE status = 'failed' AND retryable = 1 ORDER BY lsn"


def requeue_failed(tx: Transaction, *, now_milliseconds: int) -> list[str]:
    """Give every failed retryable=TRUE change a new lsn and a clean start. Returns their paths."""
    paths = [cast("str", row[0]) for row in tx.execute(RETRYABLE)]
    _requeue(tx, paths, now_milliseconds)
    return paths


FAILED_FOR = (
    "SELECT md_path, failed_for FROM md_change_state WHERE status = 'failed' AND failed_for IS NOT NULL ORDER BY lsn"
)


def requeue_for_settings(tx: Transaction, values: Mapping[str, str], *, now_milliseconds: int) -> list[str]:
    """Queue what failed because of a setting that has another value now. Returns the paths.

    ``values`` maps the name of each setting that a change can fail for to its value today.
    """
    paths = [
        cast("str", path)
        for path, blamed in tx.execute(FAILED_FOR)
        if any(values.get(name, value) != value for name, value in json.loads(cast("str", blamed)).items())
    ]
    _requeue(tx, paths, now_milliseconds)
    return paths


def _requeue(tx: Transaction, paths: Sequence[str], now_milliseconds: int) -> None:
    first = take(tx, "lsn", len(paths)) if paths else 0
    drain(tx.executemany(REQUEUE, [(path, first + nth, now_milliseconds) for nth, path in enumerate(paths)]))


PATHS_OF_KIND = "SELECT md_path FROM md_change_state WHERE kind = ?"
FINGERPRINTS = """
SELECT md_path, mtime_ns, size, ino, ctime_ns FROM md_change_state WHERE md_path IN (SELECT value FROM json_each(?))
"""


def fingerprints(tx: Transaction, paths: Sequence[str]) -> dict[str, Fingerprint4]:
    """Return the recorded fingerprints of those of ``paths`` that are known as files."""
    rows = tx.execute(FINGERPRINTS, (json.dumps(list(paths)),))
    return {cast("str", row[0]): cast("Fingerprint4", tuple(row[1:])) for row in rows if row[1] is not None}


def requeue_kind(tx: Transaction, kind: str, *, now_milliseconds: int) -> int:
    """Queue every known file of a kind again, because its table is a new incarnation."""
    paths = [cast("str", row[0]) for row in tx.execute(PATHS_OF_KIND, (kind,))]
    return requeue_paths(tx, paths, kind, now_milliseconds=now_milliseconds)


def requeue_paths(tx: Transaction, paths: Sequence[str], kind: str, *, now_milliseconds: int) -> int:
    """Queue these paths again in any state. A path without a row counts as a file that vanished."""
    known = fingerprints(tx, paths)
    seen = [Observation(path, kind, known.get(path)) for path in paths]
    return len(record(tx, seen, source="rebuild", now_milliseconds=now_milliseconds, force=True)) if seen else 0
