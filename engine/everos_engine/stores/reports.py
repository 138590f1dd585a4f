"""The queue in numbers, and where its changes stand, for ``status``, ``fix`` and ``sync``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from everos_engine.stores import held
from everos_engine.stores.database import Transaction, Value
from everos_engine.stores.queue import Status, newest, watermark


@dataclass(frozen=True, slots=True)
class Counts:
    """The queue in numbers."""

    pending: int
    processing: int
    done: int
    failed_retryable: int
    failed_permanent: int
    delayed: int
    lsn_max: int
    watermark: int
    oldest_pending_milliseconds: int | None
    found_by_scan: int
    found_by_watch: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where one path stands. ``status`` is None for a path that the queue does not know (any more).

    ``held`` is why the deletion of its file is held, if it is.
    """

    md_path: str
    status: Status | None
    retryable: bool | None = None
    retry_count: int = 0
    error: str | None = None
    lsn: int = 0
    updated: int = 0
    kind: str = ""
    held: held.Reason | None = None


COUNTS = """
SELECT count(*) FILTER (WHERE status = 'pending'), count(*) FILTER (WHERE status = 'processing'),
    count(*) FILTER (WHERE status = 'done'), count(*) FILTER (WHERE status = 'failed' AND retryable = 1),
    count(*) FILTER (WHERE status = 'failed' AND retryable = 0),
    count(*) FILTER (WHERE status = 'pending' AND not_before > 0),
    min(first_seen) FILTER (WHERE status IN ('pending', 'processing'))
FROM md_change_state
"""


def counts(tx: Transaction) -> Counts:
    """Return the whole queue in numbers, of one moment."""
    ((pending, processing, done, retryable, permanent, delayed, oldest),) = cast(
        "Iterable[tuple[int, int, int, int, int, int, int | None]]", tx.execute(COUNTS)
    )
    counters = dict(cast("Iterable[tuple[str, int]]", tx.execute("SELECT name, value FROM counter")))
    return Counts(
        pending=pending,
        processing=processing,
        done=done,
        failed_retryable=retryable,
        failed_permanent=permanent,
        delayed=delayed,
        lsn_max=newest(tx),
        watermark=watermark(tx),
        oldest_pending_milliseconds=oldest,
        found_by_scan=counters["found_by_scan"],
        found_by_watch=counters["found_by_watch"],
    )


OUTCOME = "SELECT md_path, status, retryable, retry_count, error, lsn, updated, kind FROM md_change_state"


def outcomes(tx: Transaction, paths: Sequence[str]) -> list[Outcome]:
    """Return where each of ``paths`` stands, in their order."""
    sql = f"{OUTCOME} WHERE md_path IN (SELECT value FROM json_each(?))"
    found = {outcome.md_path: outcome for outcome in map(_outcome, tx.execute(sql, (json.dumps(list(paths)),)))}
    return [found.get(path) or Outcome(path, None) for path in paths]


def standing(tx: Transaction, paths: Sequence[str]) -> list[Outcome]:
    """Return where each of ``paths`` stands, and why its deletion is held, if it is."""
    kept = held.reasons(tx, paths)
    return [replace(one, held=kept.get(one.md_path)) for one in outcomes(tx, paths)]


def failed(tx: Transaction, *, retryable: bool | None = None) -> list[Outcome]:
    """Return every dead-lettered change, or those of one sort, oldest first."""
    sql = f"{OUTCOME} WHERE status = 'failed' AND (?1 IS NULL OR retryable = ?1) ORDER BY retryable DESC, lsn"
    return [_outcome(row) for row in tx.execute(sql, (None if retryable is None else int(retryable),))]


def unanswered(tx: Transaction) -> list[Outcome]:
    """Return every change that waits for its file to answer, in order of path."""
    sql = f"{OUTCOME} WHERE status = 'pending' AND not_before > 0 AND waits_for = 'file' ORDER BY md_path"
    return [_outcome(row) for row in tx.execute(sql)]


def troubled(tx: Transaction) -> list[Outcome]:
    """Return every change that did not come through: the dead-lettered, and those whose file does not answer."""
    return failed(tx) + unanswered(tx)


def _outcome(row: tuple[Value, ...]) -> Outcome:
    path, status, retryable, retry_count, error, lsn, updated, kind = row
    return Outcome(
        cast("str", path),
        cast("Status", status),
        None if retryable is None else bool(retryable),
        cast("int", retry_count),
        cast("str | None", error),
        cast("int", lsn),
        cast("int", updated),
        cast("str", kind),
    )
