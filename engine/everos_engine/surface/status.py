"""The status block, from SQLite alone: no import of LanceDB, an answer in a blink."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everos_engine.stores import ledger, queue
from everos_engine.stores.database import Database
from everos_engine.system.locks import running_pid

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Transaction
    from everos_engine.stores.queue import Counts, Outcome


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``status`` shows; ``counts`` is None where nothing was ever indexed here.

    ``embedder_down`` is for how many seconds and why the running engine's embedding service does not serve.
    """

    root: str
    engine_pid: int | None
    counts: Counts | None
    rows: dict[str, int]
    last_scan_seconds_ago: float | None
    oldest_pending_seconds: float | None
    embedder_down: tuple[float, str] | None = None


def snapshot(settings: Settings) -> Snapshot:
    """Read one moment of the queue and the ledger."""
    pid = running_pid(settings.engine_directory / "engine.lock")
    path = settings.engine_directory / "engine.db"
    if not path.exists():
        return Snapshot(str(settings.root), pid, None, {}, None, None)
    database = Database(path, readonly=True)
    try:
        counts, rows, last_scan, outage = database.read(_read)
    finally:
        database.close()
    now = time.time() * 1000
    oldest = counts.oldest_pending_milliseconds
    return Snapshot(
        str(settings.root),
        pid,
        counts,
        rows,
        None if last_scan is None else round((now - int(last_scan)) / 1000, 3),
        None if oldest is None else round(max(0.0, now - oldest) / 1000, 3),
        None if outage is None or pid is None else (round(max(0.0, now - outage[0]) / 1000, 3), outage[1]),
    )


def failed(settings: Settings) -> list[Outcome]:
    """Every dead-lettered change."""
    path = settings.engine_directory / "engine.db"
    if not path.exists():
        return []
    database = Database(path, readonly=True)
    try:
        return database.read(queue.failed)
    finally:
        database.close()


def as_json(found: Snapshot) -> dict[str, object]:
    """The stable form of ``status --json``, documented in docs/status-json.md."""
    counts = found.counts
    queue_part = {
        "pending": counts.pending + counts.processing if counts else 0,
        "processing": counts.processing if counts else 0,
        "delayed": counts.delayed if counts else 0,
        "done": counts.done if counts else 0,
        "failed_retryable": counts.failed_retryable if counts else 0,
        "failed_permanent": counts.failed_permanent if counts else 0,
        "oldest_pending_seconds": found.oldest_pending_seconds,
    }
    newest, watermark = (counts.lsn_max, counts.watermark) if counts else (0, 0)
    return {
        "version": 1,
        "root": found.root,
        "engine": {"running": found.engine_pid is not None, "pid": found.engine_pid},
        "queue": queue_part,
        "lsn": {"max": newest, "last_processed": watermark, "lag": newest - watermark},
        "rows": found.rows,
        "embedder": {
            "down_seconds": found.embedder_down[0] if found.embedder_down else None,
            "reason": found.embedder_down[1] if found.embedder_down else None,
        },
        "last_scan_seconds_ago": found.last_scan_seconds_ago,
        "found_by": {
            "watch": counts.found_by_watch if counts else 0,
            "scan": counts.found_by_scan if counts else 0,
        },
    }


def as_text(found: Snapshot) -> str:
    """The block for people."""
    counts = found.counts
    if counts is None:
        return f"{found.root}: never indexed: start with `everos-engine run`, or `everos-engine sync` once"
    engine = "not running" if found.engine_pid is None else f"running (pid {found.engine_pid})"
    scanned = "never" if found.last_scan_seconds_ago is None else f"{found.last_scan_seconds_ago:.0f} s ago"
    oldest = "" if found.oldest_pending_seconds is None else f" (oldest {found.oldest_pending_seconds:.1f} s)"
    fix = " (eligible for `everos-engine fix --apply`)" if counts.failed_retryable else ""
    edit = " (fix md and re-save to recover; `everos-engine fix` lists them)" if counts.failed_permanent else ""
    rows = ", ".join(f"{kind} {count}" for kind, count in sorted(found.rows.items())) or "none"
    return "\n".join(
        [
            f"root: {found.root}",
            f"engine: {engine}",
            f"last scan: {scanned}",
            *_outage(found),
            "queue:",
            f"  pending: {counts.pending + counts.processing}{oldest}",
            f"  done: {counts.done}",
            f"  failed (retryable=TRUE): {counts.failed_retryable}{fix}",
            f"  failed (retryable=FALSE): {counts.failed_permanent}{edit}",
            "lsn:",
            f"  max: {counts.lsn_max}",
            f"  last_processed: {counts.watermark}",
            f"  lag: {counts.lsn_max - counts.watermark}",
            f"rows: {rows}",
        ]
    )


def _outage(found: Snapshot) -> list[str]:
    if found.embedder_down is None:
        return []
    seconds, reason = found.embedder_down
    return [f"embedder: down for {seconds:.0f} s, changes wait and are indexed when it answers: {reason}"]


def _read(tx: Transaction) -> tuple[Counts, dict[str, int], str | None, tuple[int, str] | None]:
    return queue.counts(tx), ledger.rows_per_kind(tx), queue.get_meta(tx, "last_scan"), queue.outage(tx)
