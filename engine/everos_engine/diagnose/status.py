"""The status block, from SQLite and the control socket alone: no import of LanceDB, an answer in a blink."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from everos_engine.diagnose.engine_state import EngineState, number, read_engine_state
from everos_engine.diagnose.wording import Style, ago, plural, shown, size
from everos_engine.keys import key_of
from everos_engine.settings import Settings
from everos_engine.stores import conditions, ledger, meta, queue_facts, reports
from everos_engine.stores.conditions import Condition
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.held import REMEDY, WHY, Held
from everos_engine.stores.reports import Counts, Outcome
from everos_engine.system import files

HELD_NOTE = "deletions_held"
Place = Literal["there", "empty", "missing"]


@dataclass(frozen=True, slots=True)
class StatusFacts:
    """What the database says, of one moment, with times in milliseconds.

    ``outage`` is (since, why) of the embedder's outage.
    """

    counts: Counts
    rows: Mapping[str, int]
    last_scan: int | None
    held: Sequence[Held]
    conditions: Sequence[Condition]
    outage: tuple[int, str] | None
    warnings: tuple[int, str, str] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``status`` shows. ``moment`` is None if nothing was ever indexed in the ``place`` that is there now."""

    root: str
    engine: EngineState
    moment: StatusFacts | None
    now_milliseconds: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    place: Place = "there"

    @property
    def counts(self) -> Counts | None:
        """Return the queue in numbers."""
        return None if self.moment is None else self.moment.counts

    @property
    def rows(self) -> Mapping[str, int]:
        """Return the rows per kind."""
        return {} if self.moment is None else self.moment.rows

    def since(self, milliseconds: int | None) -> float | None:
        """Return the seconds since a time."""
        return None if milliseconds is None else round(max(0, self.now_milliseconds - milliseconds) / 1000, 3)


def snapshot(settings: Settings) -> Snapshot:
    """Read one moment of the queue and the ledger, and ask the running engine for its snapshot."""
    engine = read_engine_state(settings)
    path = settings.engine_database
    if not path.exists():
        return Snapshot(str(settings.root), engine, None, place=_place(settings))
    database = Database(path, readonly=True)
    try:
        return Snapshot(str(settings.root), engine, database.read(_status_facts))
    finally:
        database.close()


def _place(settings: Settings) -> Place:
    if not settings.root.is_dir():
        return "missing"
    return "there" if os.listdir(settings.root) else "empty"


def failed(settings: Settings) -> list[Outcome]:
    """Return every dead-lettered change."""
    path = settings.engine_database
    if not path.exists():
        return []
    database = Database(path, readonly=True)
    try:
        return database.read(reports.failed)
    finally:
        database.close()


def unknown(settings: Settings, paths: Sequence[str]) -> set[str]:
    """Return the keys of those ``paths`` that are not on disk and are not indexed or queued.

    Raises OutsideRoot for a path that the engine does not index.
    """
    keys = [key_of(settings, files.locate(settings.root, path)) for path in paths]
    gone = [key for key in keys if not os.path.lexists(files.path_of(settings.root, key))]
    path = settings.engine_database
    if not gone or not path.exists():
        return set(gone)
    database = Database(path, readonly=True)
    try:
        return {one.md_path for one in database.read(lambda tx: reports.outcomes(tx, gone)) if one.status is None}
    finally:
        database.close()


def as_json(found: Snapshot) -> dict[str, object]:
    """Return the stable form of ``status --json``, documented in docs/status-json.md."""
    moment, counts, engine = found.moment, found.counts, found.engine
    newest, watermark = (counts.lsn_max, counts.watermark) if counts else (0, 0)
    by_watch, by_scan = (counts.found_by_watch, counts.found_by_scan) if counts else (0, 0)
    outage, held = (moment.outage, moment.held) if moment else (None, ())
    return {
        "version": 1,
        "root": found.root,
        "engine": {
            "running": engine.running,
            "pid": engine.pid,
            "state": engine.state,
            "stalled": [asdict(stall) for stall in engine.stalls],
        },
        "queue": {
            "pending": counts.pending + counts.processing if counts else 0,
            "processing": counts.processing if counts else 0,
            "delayed": counts.delayed if counts else 0,
            "done": counts.done if counts else 0,
            "failed_retryable": counts.failed_retryable if counts else 0,
            "failed_permanent": counts.failed_permanent if counts else 0,
            "oldest_pending_seconds": found.since(counts.oldest_pending_milliseconds) if counts else None,
        },
        "lsn": {"max": newest, "last_processed": watermark, "lag": newest - watermark},
        "rows": dict(found.rows),
        "last_scan_seconds_ago": found.since(moment.last_scan) if moment else None,
        "found_by": {"watch": by_watch, "scan": by_scan, "scan_share": _share(by_scan, by_watch)},
        "held": {
            "count": sum(one.count for one in held),
            "oldest_seconds": found.since(min((one.since for one in held), default=None)),
            "reasons": {one.reason: one.count for one in held},
        },
        "embedder": {
            "down_seconds": found.since(outage[0]) if outage and engine.running else None,
            "reason": outage[1] if outage and engine.running else None,
        },
        "warnings": {"count": moment.warnings[0] if moment and moment.warnings else 0},
        "conditions": [asdict(condition) for condition in _notes(found)],
        "descriptors": dict(engine.descriptors),
    }


def as_text(found: Snapshot, style: Style | None = None, *, program: str = "everos-engine") -> str:
    """Return the runbook's block, then what else there is to know. ``program`` is how its hints call this command."""
    return "\n".join(_lines(found, style or Style())).replace("`everos-engine ", f"`{program} ")


def _lines(found: Snapshot, style: Style) -> list[str]:
    moment = found.moment
    if moment is None:
        lines = [f"{shown(found.root)}: {_unindexed(found)}"]
        return [*lines, *_engine(found, style)] if found.engine.running else lines
    counts = moment.counts
    return [
        "queue:",
        f"  pending: {counts.pending + counts.processing}",
        f"  done: {counts.done}",
        _failed("TRUE", counts.failed_retryable, "eligible for `everos-engine fix --apply`", style),
        _failed("FALSE", counts.failed_permanent, "fix md and re-save to recover", style),
        "lsn:",
        f"  max: {counts.lsn_max}",
        f"  last_processed: {counts.watermark}",
        f"  lag: {counts.lsn_max - counts.watermark}",
        "rows:" if moment.rows else "rows: none",
        *(f"  {kind}: {count}" for kind, count in sorted(moment.rows.items())),
        *_waiting(found),
        f"last scan: {_ago(found.since(moment.last_scan))}",
        _found_by(counts),
        *_held(found, moment, style),
        *_warnings(moment, style),
        *_engine(found, style),
        *_memory(found),
        *_outage(found, moment, style),
        *(_note(note, style) for note in _notes(found)),
        f"root: {shown(found.root)}",
    ]


def _unindexed(found: Snapshot) -> str:
    """Return what to do if there is no index. It may be elsewhere, with the disk or directory that belongs here."""
    start = "start with `everos-engine run`, or `everos-engine sync` once"
    if found.place == "missing":
        return "there is no such directory. Mount it or move it back. Its index is in it, and an engine that served it waits"
    if found.place == "empty":
        return f"empty, and never indexed. If a file system belongs here, mount it first. Otherwise {start}"
    return f"never indexed: {start}"


def _failed(retryable: str, count: int, hint: str, style: Style) -> str:
    line = f"  failed (retryable={retryable}): {count}"
    return style(f"{line} ({hint})", "yellow") if count else line


def _waiting(found: Snapshot) -> list[str]:
    counts = found.counts
    age = found.since(counts.oldest_pending_milliseconds) if counts else None
    if counts is None or age is None:
        return []
    delayed = f", {counts.delayed} of them delayed" if counts.delayed else ""
    return [f"oldest pending: {ago(age)}{delayed}"]


def _found_by(counts: Counts) -> str:
    total = counts.found_by_scan + counts.found_by_watch
    share = _share(counts.found_by_scan, counts.found_by_watch)
    return f"found by scan only: {counts.found_by_scan} of {total}" + (f" ({share:.0%})" if share is not None else "")


def _held(found: Snapshot, moment: StatusFacts, style: Style) -> list[str]:
    if not moment.held:
        return []
    since = ago(found.since(min(one.since for one in moment.held)) or 0.0)
    why = "; ".join(f"{one.count} because {WHY[one.reason]}" for one in moment.held)
    total = plural(sum(one.count for one in moment.held), "deletion")
    remedy = "; ".join(dict.fromkeys(REMEDY[one.reason] for one in moment.held))
    return [style.wrap(f"{total} for {since}: {why}; {remedy}", indent=6, first=f"{style('held:', 'yellow')} ")]


def _warnings(moment: StatusFacts, style: Style) -> list[str]:
    if moment.warnings is None:
        return []
    count, path, first = moment.warnings
    text = f"{plural(count, 'file')} indexed with a warning, the first {shown(path)}: {shown(first)}"
    return [style.wrap(text, indent=6, first=f"{style('warnings:', 'yellow')} ")]


def _engine(found: Snapshot, style: Style) -> list[str]:
    engine = found.engine
    words = {
        "absent": style("not running (`everos-engine run` starts it)", "yellow"),
        "answers": style(f"running (pid {engine.pid})", "green"),
        "mute": f"running (pid {engine.pid})",
        "silent": style(f"pid {engine.pid} does not answer: see `everos-engine doctor engine`", "red"),
        "stopped": style(f"pid {engine.pid} is stopped: `kill -CONT {engine.pid}`", "red"),
        "hidden": "its lock may not be read by this user",
    }
    stalls = [
        style(f"stalled: {stall.loop} has not moved for {ago(stall.seconds)}: see `everos-engine doctor engine`", "red")
        for stall in engine.stalls
    ]
    return [f"engine: {words[engine.state]}", *stalls]


def _memory(found: Snapshot) -> list[str]:
    memory = found.engine.memory
    if not memory.get("ceiling_bytes"):
        return []
    return [
        f"memory: {size(int(number(memory.get('rss_bytes'))))} resident of at most {size(int(number(memory['ceiling_bytes'])))}"
    ]


def _outage(found: Snapshot, moment: StatusFacts, style: Style) -> list[str]:
    if moment.outage is None or not found.engine.running:
        return []
    seconds = ago(found.since(moment.outage[0]) or 0.0)
    text = f"embedder: down for {seconds}, changes wait and are indexed when it answers: {moment.outage[1]}"
    return [style(text, "yellow")]


def _note(note: Condition, style: Style) -> str:
    return style.wrap(f"{note.message}; {note.remedy}", indent=6, first=f"{style('note:', 'yellow')} ")


def _notes(found: Snapshot) -> list[Condition]:
    """Return what lasts while an engine runs. Of one that is gone nothing is known."""
    if found.moment is None or not found.engine.running:
        return []
    return [note for note in found.moment.conditions if note.code != HELD_NOTE]


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{ago(seconds)} ago"


def _share(by_scan: int, by_watch: int) -> float | None:
    return round(by_scan / (by_scan + by_watch), 4) if by_scan + by_watch else None


def _status_facts(tx: Transaction) -> StatusFacts:
    last_scan = meta.get(tx, "last_scan")
    return StatusFacts(
        counts=reports.counts(tx),
        rows=ledger.rows_per_kind(tx),
        last_scan=None if last_scan is None else int(last_scan),
        held=queue_facts.held_counts(tx),
        conditions=conditions.kept(tx),
        outage=meta.outage(tx),
        warnings=queue_facts.warnings(tx),
    )
