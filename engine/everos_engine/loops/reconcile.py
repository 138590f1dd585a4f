"""Look at the disk and record what differs from the queue: full scans, single paths, and the audit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import trio
from loguru import logger

from everos_engine.errors import BadFile, Exhausted, Transient
from everos_engine.loops.context import now_milliseconds
from everos_engine.loops.deletion_guard import DeletionGuard, may_delete, without_moved
from everos_engine.settings import Settings
from everos_engine.stores import full_scan, held, meta, queue
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.full_scan import Vanished
from everos_engine.stores.held import WHY, Held, Reason
from everos_engine.stores.queue import Observation, Source
from everos_engine.system import files, limits
from everos_engine.system.file_threads import Call, FileThreads, NoAnswer, open_threads
from everos_engine.text import kinds

AUDIT_POSITION = "audit_position"


@dataclass(frozen=True, slots=True)
class FullScan:
    """The result of a full scan.

    It has the number of matching files, the paths queued, the newest lsn then, the unreadable directories, and what is
    held.
    """

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


async def reconcile_tree(
    settings: Settings,
    database: Database,
    *,
    source: Source,
    deletion_guard: DeletionGuard,
    threads: FileThreads | None = None,
) -> FullScan:
    """Run one full scan and record it. Files that vanished in a suspicious way are held instead of deleted.

    Raises Transient, with nothing recorded, if the root cannot be read. All files count as held then.
    """
    threads = threads or open_threads(deadline_seconds=settings.file_deadline_seconds)
    try:
        seen = await _walk(settings, threads, deletion_guard)
    except files.ScanAborted:
        reason = await root_trouble(deletion_guard, threads)
        if reason is not None:
            await database.awrite(lambda tx: held.hold_all(tx, reason, now_milliseconds=now_milliseconds()))
        raise
    async with database.scanning:
        return await _record(settings, database, threads, seen, source)


async def root_trouble(deletion_guard: DeletionGuard, threads: FileThreads) -> Reason | None:
    """Return what is wrong with the root as a whole, or None. A root that does not answer counts as unreadable."""
    try:
        return await threads.call(deletion_guard.trouble, what="root", name=os.fspath(deletion_guard.settings.root))
    except NoAnswer:
        return "root_unreadable"


async def is_root_lost(deletion_guard: DeletionGuard, threads: FileThreads) -> bool:
    """Return whether the root, and the index in it, was replaced since the start or does not answer."""
    return await root_trouble(deletion_guard, threads) in {"root_missing", "root_unreadable", "root_replaced"}


async def _walk(settings: Settings, threads: FileThreads, deletion_guard: DeletionGuard) -> _Look:
    """Walk the tree level by level. A directory that does not answer is skipped, and its neighbours are still seen."""
    before = await root_trouble(deletion_guard, threads)
    if before in {"root_missing", "root_unreadable"}:
        raise files.ScanAborted(f"the full scan stopped: {WHY[before]}")
    walker = files.Walker(settings.root, partial(kinds.recognise, note_globs=settings.note.globs))
    todo: Sequence[str] = [os.fspath(settings.root)]
    late: Sequence[Call[str, files.Visit[kinds.Place]]] = []
    while todo or late:
        if todo:
            calls = await threads.each(todo, walker.visit, what="list", name=str)
            over, late = calls.over, [*late, *calls.late]
        else:
            over, late = late, []
        visits = []
        for call in over:
            try:
                visits.append(await threads.wait(call))
            except NoAnswer as error:
                walker.lose(call.item, str(error))
        todo = await trio.to_thread.run_sync(_added, walker, visits)
    return _Look(walker.walk(), await root_trouble(deletion_guard, threads) or before)


def _added(walker: files.Walker[kinds.Place], visits: Sequence[files.Visit[kinds.Place]]) -> Sequence[str]:
    return [directory for visit in visits for directory in walker.add(visit)]


def probe_path(settings: Settings, path: str) -> Observation:
    """Look at a single file again. A file that no kind matches counts as gone.

    Raises Transient if the look fails.
    """
    place = kinds.recognise(path, note_globs=settings.note.globs)
    fingerprint = None if place is None else files.fingerprint(settings.root, place)
    return Observation(
        path, place.kind if place is not None else "", None if fingerprint is None else _four(fingerprint)
    )


async def probe(
    settings: Settings, threads: FileThreads, paths: Sequence[str]
) -> tuple[list[Observation], dict[str, Transient]]:
    """Look at single files again. Returns what was seen, and by path why the other files could not be looked at.

    Raises Exhausted if there is no descriptor to look with.
    """

    def look(path: str) -> Observation | Transient:
        try:
            return probe_path(settings, path)
        except Exhausted:
            raise
        except Transient as error:
            return error

    seen: list[Observation] = []
    unseen: dict[str, Transient] = {}
    root = settings.root
    for path, found in await threads.all(paths, look, what="stat", name=lambda path: files.path_of(root, path)):
        if isinstance(found, Transient):
            unseen[path] = found
        else:
            seen.append(found)
    return seen, unseen


async def verify_racy(
    settings: Settings, database: Database, threads: FileThreads, paths: Sequence[str] | None = None
) -> frozenset[queue.Observation]:
    """Read those of ``paths`` (default: all) whose fingerprint cannot be trusted.

    Returns those whose content was indexed.

    This is Git's rule. A file observed within a tick of its last change could change again and keep its fingerprint.
    """

    def compare(doubtful: tuple[Observation, bytes]) -> files.Reading | None:
        seen, digest = doubtful
        reading = _read(settings, seen.md_path)
        is_same = reading is not None and reading.digest == digest and _four(reading.fingerprint) == seen.fingerprint
        return reading if is_same else None

    doubtful = await database.aread(lambda tx: full_scan.racy(tx, paths))
    if not doubtful:
        return frozenset()
    same, settled = set(), []
    for (seen, digest), reading in await threads.all(doubtful, compare, what="read", name=_name_in(settings)):
        if isinstance(reading, files.Reading):
            same.add(seen)
            if not reading.racy:
                settled.append((seen, digest))
    if settled:
        await database.awrite(lambda tx: full_scan.trust(tx, settled))
    return frozenset(same)


async def audit(
    settings: Settings, database: Database, threads: FileThreads, *, after: str, limit: int
) -> tuple[int, list[str], str | None]:
    """Read the next ``limit`` files in order of path, and queue those whose content differs from what was indexed.

    Returns (files read, paths queued, the path to go on after). The last is None at the end of the tree.
    """

    def differs(todo: tuple[Observation, bytes]) -> bool:
        reading = _read(settings, todo[0].md_path)
        return reading is not None and reading.digest != todo[1]

    todo = await database.aread(lambda tx: full_scan.to_audit(tx, after, limit=limit))
    read = await threads.all(todo, differs, what="read", name=_name_in(settings))
    differing = [seen for (seen, _), found in read if found is True]
    now = now_milliseconds()
    end = todo[-1][0].md_path if len(todo) == limit else None

    def note(tx: Transaction) -> list[str]:
        queued = queue.record(tx, differing, source="audit", now_milliseconds=now, force=True)
        meta.put(tx, AUDIT_POSITION, end or "")
        if end is None:
            meta.put(tx, "last_audit", str(now))
        return queued

    return len(todo), await database.awrite(note), end


def _read(settings: Settings, md_path: str) -> files.Reading | None:
    """Return the content of a change, or None if it cannot be read. The next full scan looks at that file."""
    place = kinds.recognise(md_path, note_globs=settings.note.globs)
    if place is None:
        return None
    try:
        return files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
    except (Transient, BadFile, files.Vanished):
        return None


def _name_in(settings: Settings) -> Callable[[tuple[Observation, bytes]], str]:
    return lambda one: files.path_of(settings.root, one[0].md_path)


async def _record(
    settings: Settings, database: Database, threads: FileThreads, look: _Look, source: Source
) -> FullScan:
    """Record a walk.

    Files are read and looked at between the transactions, so that a hanging file blocks none of them.
    """
    walked, trouble = look.walked, look.trouble
    now, settle = now_milliseconds(), settings.settle_milliseconds
    verified = await verify_racy(settings, database, threads)

    def compare(tx: Transaction) -> tuple[full_scan.Compared, set[str], list[str]]:
        found = walked.found.items()
        full_scan.load_full_scan(tx, [Observation(path, place.kind, _four(print_)) for path, (place, print_) in found])
        compared = full_scan.record_full_scan(
            tx, source=source, now_milliseconds=now, settle_milliseconds=settle, verified=verified
        )
        return compared, held.sticking(tx), _lost_mounts(settings, tx)

    compared, sticking, unmounted = await database.awrite(compare)
    dark: dict[Reason, Sequence[str]] = {"unreadable": list(walked.blind), "unmounted": unmounted}
    excluded = [] if trouble else [one for one in compared.vanished if _is_of_no_kind(settings, one)]
    vanished = [one for one in compared.vanished if one.md_path not in sticking and one not in excluded]
    in_sight = [] if trouble else [one.md_path for one in vanished if _shade(one.md_path, dark) is None]
    seen, unseen = await probe(settings, threads, in_sight)
    again = [one for one in seen if one.fingerprint is not None]
    dark["unreadable"] = [*walked.blind, *unseen]
    found = {one.md_path for one in again}
    vanished = [one for one in vanished if one.md_path not in found]
    if excluded:
        logger.info("files_excluded count={} first={!r}", len(excluded), excluded[0].md_path)

    def finish(tx: Transaction) -> FullScan:
        # Another process may have recorded or held some of them since they were compared.
        settled = held.sticking(tx)
        still = {one.md_path for one in full_scan.vanished(tx, [one.md_path for one in vanished])} - settled
        left = [one for one in vanished if one.md_path in still]
        going, holding = _sort(tx, settings, left, compared, trouble=trouble, dark=dark, now_milliseconds=now)
        held.reconsider(tx, [path for paths in holding.values() for path, _ in paths])
        for reason, paths in holding.items():
            held.hold(tx, paths, reason, now_milliseconds=now)
        held.heal(tx)
        gone = [Observation(one.md_path, one.kind, None) for one in going + excluded]
        queued = queue.record(tx, again + gone, source=source, now_milliseconds=now)
        meta.put(tx, "last_scan", str(now_milliseconds()))
        return FullScan(
            len(walked.found),
            compared.queued + queued,
            queue.newest(tx),
            walked.blind,
            walked.directories,
            held.counts(tx),
        )

    return await database.awrite(finish)


def _is_of_no_kind(settings: Settings, one: Vanished) -> bool:
    """Return whether the settings no longer match a known file. Its rows go, although nothing was lost on the disk."""
    return kinds.recognise(one.md_path, note_globs=settings.note.globs) is None


def _sort(
    tx: Transaction,
    settings: Settings,
    vanished: list[Vanished],
    compared: full_scan.Compared,
    *,
    trouble: Reason | None,
    dark: Mapping[Reason, Sequence[str]],
    now_milliseconds: int,
) -> tuple[list[Vanished], dict[Reason, list[tuple[str, str]]]]:
    """Sort the vanished files: those that are deleted, and by reason those that are held."""
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
    full_scan.carry_age(tx, moved)
    known = full_scan.files(tx)
    if may_delete(tx, settings, gone, moved=len(moved), known=known, now_milliseconds=now_milliseconds):
        return gone + moved, holding
    holding["mass_delete"] = [(one.md_path, one.kind) for one in gone]
    return moved, holding


def _shade(path: str, dark: Mapping[Reason, Sequence[str]]) -> Reason | None:
    """Return why a path cannot be seen: it is unreadable or lies below a directory that is. None if it can be seen."""
    for reason, directories in dark.items():
        if any(path == directory or path.startswith(directory + "/") for directory in directories):
            return reason
    return None


def _lost_mounts(settings: Settings, tx: Transaction) -> list[str]:
    """Return the directories, by key, that were mount points at an earlier full scan and are not now."""
    root = os.fspath(settings.root)
    inside = {files.key_of(settings.root, mount.point) or "" for mount in limits.mounts_inside(root, limits.mounts())}
    known = set(json.loads(meta.get(tx, held.MOUNTS) or "[]"))
    if inside - known:
        meta.put(tx, held.MOUNTS, json.dumps(sorted(inside | known)))
    return sorted(known - inside)


def _four(found: files.Fingerprint) -> tuple[int, int, int, int]:
    return found.mtime_ns, found.size, found.ino, found.ctime_ns
