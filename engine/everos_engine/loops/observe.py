"""Looking at the disk and recording what differs from the queue: whole sweeps, single paths, and the audit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio
from loguru import logger

from everos_engine.errors import BadFile, Transient
from everos_engine.loops.brake import WHY, Brake, let_go, without_moved
from everos_engine.loops.desk import now_milliseconds
from everos_engine.stores import held, meta, queue, sweeps
from everos_engine.stores.queue import Observation, Source
from everos_engine.system import files, limits
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Database, Transaction
    from everos_engine.stores.held import Held, Reason
    from everos_engine.stores.sweeps import Vanished

AUDIT_POSITION = "audit_position"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one sweep found: files of a kind, paths queued, the newest lsn then, blind directories, what is held."""

    files: int
    queued: Sequence[str]
    lsn: int
    blind: Mapping[str, str]
    directories: int
    held: Sequence[Held]


@dataclass(frozen=True, slots=True)
class _Look:
    """A walk, and what was wrong with the root before or after it."""

    walked: files.Walk[kinds.Place]
    trouble: Reason | None


async def sweep(settings: Settings, database: Database, *, source: Source, brake: Brake) -> Sweep:
    """One sweep, recorded. What vanished in a suspicious way is held instead of deleted.

    Raises Transient, with nothing recorded, if the root cannot be read; all files count as held then.
    """
    recognise = partial(kinds.recognise, note_globs=settings.note.globs)

    def look() -> _Look:
        before = brake.trouble()
        if before not in {"root_missing", "root_unreadable"}:
            walked = files.walk(settings.root, recognise)
            return _Look(walked, brake.trouble() or before)
        message = f"the sweep stopped: {WHY[before]}"
        raise files.SweepAborted(message)

    try:
        seen = await trio.to_thread.run_sync(look)
    except files.SweepAborted:
        reason = await trio.to_thread.run_sync(brake.trouble)
        if reason is not None:
            await database.awrite(lambda tx: held.hold_all(tx, reason, now_milliseconds=now_milliseconds()))
        raise
    record = partial(_record, settings, database, seen, source)
    return await trio.to_thread.run_sync(record, limiter=database.limiter)


def observe_paths(settings: Settings, paths: Sequence[str]) -> list[Observation]:
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


def verify_racy(
    settings: Settings, database: Database, paths: Sequence[str] | None = None
) -> frozenset[queue.Observation]:
    """Read those of ``paths`` (of all) whose fingerprint is not to be trusted; the ones that are what was indexed.

    Git's rule: a file observed within a tick of its last change could change again and keep its fingerprint.
    """
    same, settled = set(), []
    for seen, digest in database.read(lambda tx: sweeps.racy(tx, paths)):
        place = kinds.recognise(seen.md_path, note_globs=settings.note.globs)
        if place is None:
            continue
        try:
            reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
        except (Transient, BadFile, files.Vanished):
            continue
        if reading.digest == digest and _four(reading.fingerprint) == seen.fingerprint:
            same.add(seen)
            if not reading.racy:
                settled.append((seen, digest))
    if settled:
        database.write(lambda tx: sweeps.trust(tx, settled))
    return frozenset(same)


def audit(settings: Settings, database: Database, *, after: str, limit: int) -> tuple[int, list[str], str | None]:
    """Read the next ``limit`` files in order of path and queue those whose content is not what was indexed.

    (files read, paths queued, the path to go on after); None at the end of the tree.
    """
    todo = database.read(lambda tx: sweeps.to_audit(tx, after, limit=limit))
    differing = [seen for seen, digest in todo if _differs(settings, seen.md_path, digest)]
    now = now_milliseconds()
    end = todo[-1][0].md_path if len(todo) == limit else None

    def note(tx: Transaction) -> list[str]:
        queued = queue.record(tx, differing, source="audit", now_milliseconds=now, force=True)
        meta.put(tx, AUDIT_POSITION, end or "")
        if end is None:
            meta.put(tx, "last_audit", str(now))
        return queued

    return len(todo), database.write(note), end


def _differs(settings: Settings, md_path: str, digest: bytes) -> bool:
    place = kinds.recognise(md_path, note_globs=settings.note.globs)
    if place is None:
        return False
    try:
        return files.read(settings.root, place, max_file_bytes=settings.max_file_bytes).digest != digest
    except (Transient, BadFile, files.Vanished):  # gone or out of reach: a sweep's business
        return False


def _record(
    settings: Settings,
    database: Database,
    look: _Look,
    source: Source,
) -> Sweep:
    walked, trouble = look.walked, look.trouble
    now, settle = now_milliseconds(), settings.settle_milliseconds
    observations = [Observation(path, place.kind, _four(print_)) for path, (place, print_) in walked.found.items()]
    verified = verify_racy(settings, database)
    database.write(lambda tx: sweeps.load_sweep(tx, observations))

    def compare(tx: Transaction) -> tuple[sweeps.Compared, set[str], list[str]]:
        compared = sweeps.record_sweep(
            tx, source=source, now_milliseconds=now, settle_milliseconds=settle, verified=verified
        )
        return compared, held.sticking(tx), _lost_mounts(settings, tx)

    compared, sticking, unmounted = database.write(compare)
    dark: dict[Reason, Sequence[str]] = {"unreadable": list(walked.blind), "unmounted": unmounted}
    excluded = [] if trouble else [one for one in compared.vanished if _is_of_no_kind(settings, one)]
    vanished = [one for one in compared.vanished if one.md_path not in sticking and one not in excluded]
    in_sight = [] if trouble else [one for one in vanished if _shade(one.md_path, dark) is None]
    looks = dict(zip(in_sight, observe_paths(settings, [one.md_path for one in in_sight]), strict=True))
    again = [seen for seen in looks.values() if seen.fingerprint is not None]
    vanished = [one for one in vanished if one not in looks or looks[one].fingerprint is None]
    if excluded:
        logger.info("files_excluded count={} first={!r}", len(excluded), excluded[0].md_path)

    def finish(tx: Transaction) -> Sweep:
        # Another process may have recorded or held some of them since they were compared.
        settled = held.sticking(tx)
        still = {one.md_path for one in sweeps.vanished(tx, [one.md_path for one in vanished])} - settled
        left = [one for one in vanished if one.md_path in still]
        going, holding = _sort(tx, settings, left, compared, trouble=trouble, dark=dark, now_milliseconds=now)
        held.judge_anew(tx, [path for paths in holding.values() for path, _ in paths])
        for reason, paths in holding.items():
            held.hold(tx, paths, reason, now_milliseconds=now)
        held.heal(tx)
        gone = [Observation(one.md_path, one.kind, None) for one in going + excluded]
        queued = queue.record(tx, again + gone, source=source, now_milliseconds=now)
        meta.put(tx, "last_scan", str(now_milliseconds()))
        return Sweep(
            len(observations),
            compared.queued + queued,
            queue.newest(tx),
            walked.blind,
            walked.directories,
            held.counts(tx),
        )

    return database.write(finish)


def _is_of_no_kind(settings: Settings, one: Vanished) -> bool:
    """Check whether the settings no longer match a known file: its rows go, and nothing was lost on the disk."""
    return kinds.recognise(one.md_path, note_globs=settings.note.globs) is None


def _sort(  # noqa: PLR0913 - what vanished, and all that may explain it
    tx: Transaction,
    settings: Settings,
    vanished: list[Vanished],
    compared: sweeps.Compared,
    *,
    trouble: Reason | None,
    dark: Mapping[Reason, Sequence[str]],
    now_milliseconds: int,
) -> tuple[list[Vanished], dict[Reason, list[tuple[str, str]]]]:
    """Which of the vanished are deleted, and which are held for what."""
    if trouble is not None:
        return [], {trouble: [(one.md_path, one.kind) for one in vanished]}
    holding: dict[Reason, list[tuple[str, str]]] = {}
    open_to_doubt = []
    for one in vanished:
        shade = _shade(one.md_path, dark)
        if shade is not None:
            holding.setdefault(shade, []).append((one.md_path, one.kind))
        else:
            open_to_doubt.append(one)
    gone, moved = without_moved(open_to_doubt, compared.appeared)
    sweeps.carry_age(tx, moved)
    known = sweeps.files(tx)
    if let_go(tx, settings, gone, moved=len(moved), known=known, now_milliseconds=now_milliseconds):
        return gone + moved, holding
    holding["mass_delete"] = [(one.md_path, one.kind) for one in gone]
    return moved, holding


def _shade(path: str, dark: Mapping[Reason, Sequence[str]]) -> Reason | None:
    """Why nothing can be said of a path, if it is out of sight or lies below a directory that is."""
    for reason, directories in dark.items():
        if any(path == directory or path.startswith(directory + "/") for directory in directories):
            return reason
    return None


def _lost_mounts(settings: Settings, tx: Transaction) -> list[str]:
    """Directories of the tree that were mounts at an earlier sweep and are none now, by key."""
    root = os.fspath(settings.root)
    inside = {files.key_of(settings.root, mount.point) or "" for mount in limits.mounts_inside(root, limits.mounts())}
    known = set(json.loads(meta.get(tx, held.MOUNTS) or "[]"))
    if inside - known:
        meta.put(tx, held.MOUNTS, json.dumps(sorted(inside | known)))
    return sorted(known - inside)


def _four(found: files.Fingerprint) -> tuple[int, int, int, int]:
    return found.mtime_ns, found.size, found.ino, found.ctime_ns
