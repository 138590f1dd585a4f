"""Explain why one path is or is not searchable, from the disk, the queue, the ledger and the engine. Never writes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

from everos_engine.diagnose import exclusion
from everos_engine.diagnose.engine_state import EngineState, read_engine_state
from everos_engine.diagnose.verdict import Diagnosis, diagnose
from everos_engine.diagnose.wording import commands_in
from everos_engine.errors import BadFile, EngineError
from everos_engine.settings import Settings
from everos_engine.stores import ledger, meta, queue_facts
from everos_engine.stores.database import Database, Transaction
from everos_engine.system import files, limits, locks
from everos_engine.system.file_threads import NoAnswer, call_within
from everos_engine.text import diff, kinds
from everos_engine.text.entries import Document, Place

MAX_NAMED = 20
BRIEF_SECONDS = 2.0
DiskState = Literal["there", "gone", "unreadable", "too_large", "damaged", "unsteady", "hung"]


@dataclass(frozen=True, slots=True)
class Disk:
    """The result of a look at the file. ``error`` says why it could not be read or parsed."""

    state: DiskState
    fingerprint: files.Fingerprint | None = None
    document: Document | None = None
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the queue and the ledger know. ``orphaned`` is True if the claim's owner is dead.

    ``outage`` is (milliseconds since the epoch, reason) while the embedder does not answer.
    """

    change: queue_facts.Change | None = None
    held: queue_facts.Held | None = None
    entries: dict[str, bytes] | None = None
    last_scan_milliseconds: int | None = None
    outage: tuple[int, str] | None = None
    table_known: bool = False
    orphaned: bool = False
    trouble: str | None = None

    @property
    def rows(self) -> int:
        """Return the rows that the index holds of the path, by the ledger."""
        return sum(1 for content_hash in (self.entries or {}).values() if content_hash)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All facts that a diagnosis rests on, of one moment (milliseconds since the epoch).

    ``readonly_mount`` is the mount point of an index that cannot be written.
    """

    settings: Settings
    program: str
    path: str
    key: str | None
    place: Place | None
    excluded: exclusion.Exclusion | None
    disk: Disk
    known: Remembered
    engine: EngineState
    table_there: bool
    now_milliseconds: int
    readonly_mount: str | None = None

    @property
    def plan(self) -> diff.Plan | None:
        """Return what must be written for the index to hold what the file says, or None if it cannot be parsed."""
        return None if self.disk.document is None else diff.plan(self.disk.document, self.known.entries or {})


@dataclass(frozen=True, slots=True)
class Explanation:
    """The evidence, the diagnosis, and how many rows the index itself holds (None: not asked)."""

    evidence: Evidence
    diagnosis: Diagnosis
    index_rows: int | None = None


def explain(settings: Settings, asked: str, *, program: str = "everos-engine", rows: bool = False) -> Explanation:
    """Explain one path, absolute, relative to the root, or to the working directory.

    No state of the path makes it raise.

    ``rows`` also counts them in LanceDB, which takes a second. None if the table does not open.
    """
    evidence = gather(settings, asked, program=program)
    return Explanation(evidence, diagnose(evidence), _index_rows(evidence) if rows else None)


def _index_rows(evidence: Evidence) -> int | None:
    change, place = evidence.known.change, evidence.place
    kind = place.kind if place is not None else "" if change is None else change.kind
    key = place.md_path if place is not None else evidence.key
    if not kind or key is None:
        return 0
    from everos_engine.stores.table_facts import count_of
    from everos_engine.system.asyncio_thread import run_once

    try:
        return run_once(lambda: count_of(evidence.settings.lancedb_directory, kind, key))
    except (RuntimeError, OSError, ValueError):
        return None


def gather(settings: Settings, asked: str, *, program: str) -> Evidence:
    """Read the disk and the database once."""
    path, key, place, excluded, hung = _find(settings, asked, program=program)
    known = _remember(settings, place.md_path if place is not None else key)
    disk = hung or (Disk("gone") if place is None or excluded is not None else _look_within(settings, place, known))
    kind = place.kind if place is not None else known.change.kind if known.change is not None else ""
    return Evidence(
        settings=settings,
        program=program,
        path=path,
        key=key,
        place=place,
        excluded=excluded,
        disk=disk,
        known=known,
        engine=read_engine_state(settings),
        table_there=bool(kind) and (settings.lancedb_directory / f"{kind}.lance").is_dir(),
        now_milliseconds=time.time_ns() // 1_000_000,
        readonly_mount=limits.mount_of(settings.root).point if files.is_readonly(settings.root) else None,
    )


def _find(
    settings: Settings, asked: str, *, program: str
) -> tuple[str, str | None, Place | None, exclusion.Exclusion | None, Disk | None]:
    """Return what a path is.

    It is the path, its key, its place, the rule that excludes it, and what is known of a path that does not answer.
    """

    def find() -> tuple[str, str | None, Place | None, exclusion.Exclusion | None]:
        path = files.locate(settings.root, asked)
        key = files.key_of(settings.root, path)
        place = None if key is None else kinds.recognise(key, note_globs=settings.note.globs)
        return path, key, place, exclusion.exclusion(settings, path, program=program)

    try:
        return *call_within(find, name=asked, seconds=settings.file_deadline_seconds), None
    except NoAnswer as error:
        path = os.path.normpath(os.path.join(settings.root, asked))
        inside = path.startswith(os.path.join(settings.root, ""))
        key = files.key_of(settings.root, path) if inside else None
        place = None if key is None else kinds.recognise(key, note_globs=settings.note.globs)
        return path, key, place, None, Disk("hung", error=error)


def _look_within(settings: Settings, place: Place, known: Remembered) -> Disk:
    """Look at the file, but wait only briefly for one that the engine waits for already."""
    waits = known.change is not None and known.change.waits_for == "file"
    seconds = min(BRIEF_SECONDS, settings.file_deadline_seconds) if waits else settings.file_deadline_seconds
    try:
        return call_within(lambda: _look(settings, place), name=place.md_path, seconds=seconds)
    except NoAnswer as error:
        return Disk("hung", error=error)


def as_json(found: Explanation) -> dict[str, object]:
    """Return the stable form of ``explain --json``, documented in docs/explain.md."""
    evidence, diagnosis = found.evidence, found.diagnosis
    return {
        "version": 1,
        "root": str(evidence.settings.root),
        "path": evidence.path,
        "key": evidence.place.md_path if evidence.place is not None else evidence.key,
        "kind": evidence.place.kind if evidence.place is not None else None,
        "verdict": diagnosis.verdict,
        "code": diagnosis.code,
        "cause": diagnosis.cause,
        "remedy": diagnosis.remedy,
        "commands": commands_in(diagnosis.remedy),
        "next": diagnosis.next,
        "disk": _disk_json(evidence),
        "queue": _queue_json(evidence),
        "entries": _entries_json(evidence),
        "rows": {"ledger": evidence.known.rows, "index": found.index_rows},
        "engine": {"state": evidence.engine.state, "pid": evidence.engine.pid},
    }


def _look(settings: Settings, place: Place) -> Disk:
    seen = None
    try:
        seen = files.fingerprint(settings.root, place)
        reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
    except files.Vanished:
        return Disk("gone")
    except BadFile as error:
        large = seen is not None and seen.size > settings.max_file_bytes
        return Disk("too_large" if large else "unreadable", seen, error=error)
    except EngineError as error:
        denied = isinstance(error.__cause__, PermissionError)
        return Disk("unreadable" if denied else "unsteady", seen, error=error)
    try:
        return Disk("there", reading.fingerprint, kinds.parse(place, reading.sources))
    except BadFile as error:
        return Disk("damaged", reading.fingerprint, error=error)


def _remember(settings: Settings, key: str | None) -> Remembered:
    path = settings.engine_database
    if key is None or not path.exists():
        return Remembered()

    def read(tx: Transaction) -> Remembered:
        change = queue_facts.change(tx, key)
        held = queue_facts.held(tx, key)
        scan = meta.get(tx, "last_scan")
        return Remembered(
            change=change,
            held=held[0] if held else None,
            entries=ledger.known(tx, [key])[key],
            last_scan_milliseconds=None if scan is None else int(scan),
            outage=meta.outage(tx),
            table_known=change is not None and change.kind in ledger.incarnations(tx),
            orphaned=change is not None and change.owner is not None and _dead(settings, change.owner),
        )

    try:
        database = Database(path, readonly=True)
        try:
            return database.read(read)
        finally:
            database.close()
    except Exception as error:  # noqa: BLE001 - doctor reports what is wrong with the database, and explain reports the file
        return Remembered(trouble=str(error) or type(error).__name__)


def _dead(settings: Settings, owner: str) -> bool:
    return locks.is_dead(settings.engine_directory / "owners", owner)


def _disk_json(evidence: Evidence) -> dict[str, object]:
    disk = evidence.disk
    fingerprint = None if disk.fingerprint is None else disk.fingerprint._asdict()
    return {"state": disk.state, "fingerprint": fingerprint, "error": None if disk.error is None else str(disk.error)}


def _queue_json(evidence: Evidence) -> dict[str, object] | None:
    change = evidence.known.change
    if change is None:
        return None
    names = ("mtime_ns", "size", "ino", "ctime_ns")
    same = change.fingerprint == (None if evidence.disk.fingerprint is None else tuple(evidence.disk.fingerprint))
    due = max(0, change.not_before - evidence.now_milliseconds) / 1000 if change.not_before else None
    return {
        "status": change.status,
        "lsn": change.lsn,
        "fingerprint": None if change.fingerprint is None else dict(zip(names, change.fingerprint, strict=True)),
        "same_as_disk": same,
        "found_by": change.source.removesuffix("_path"),
        "retries": change.retry_count,
        "most_retries": evidence.settings.worker_max_retry,
        "retryable": change.retryable,
        "error": change.error,
        "due_in_seconds": due,
        "ahead": change.ahead if change.status == "pending" else None,
        "updated_seconds_ago": max(0, evidence.now_milliseconds - change.updated) / 1000,
        "held_since_seconds": (
            None
            if evidence.known.held is None
            else max(0, evidence.now_milliseconds - evidence.known.held.since) / 1000
        ),
    }


def _entries_json(evidence: Evidence) -> dict[str, object] | None:
    plan, document = evidence.plan, evidence.disk.document
    if plan is None or document is None:
        return None
    known = evidence.known.entries or {}
    return {
        "total": len(document.entries) + len(document.problems),
        "as_indexed": plan.unchanged,
        "new": [{"id": e.entry_id, "line": e.line} for e in plan.upserts if e.entry_id not in known],
        "changed": [{"id": e.entry_id, "line": e.line} for e in plan.upserts if e.entry_id in known],
        "gone": list(plan.deletes),
        "warnings": [
            {"id": p.entry_id, "line": p.line, "message": p.message, "remedy": p.remedy} for p in document.warnings
        ],
        "bad": [
            {"id": p.entry_id, "line": p.line, "message": p.message, "remedy": p.remedy} for p in document.problems
        ],
    }
