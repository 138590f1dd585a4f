"""Scan the whole tree: at the start, at an interval, after anything that may have lost events, and on request."""

from __future__ import annotations

import errno
import os
import shlex
import time
from contextlib import suppress

import trio
from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.context import Context, now_milliseconds, wait_moved
from everos_engine.loops.reconcile import AUDIT_POSITION, FullScan, audit, reconcile_tree
from everos_engine.loops.recovery import inspect
from everos_engine.stores import full_scan, held, meta
from everos_engine.stores.held import BLIND_REMEDY, REMEDY, WHY, Held
from everos_engine.system import files
from everos_engine.system.unit import unit

SCAN_ALLOWANCE_SECONDS = 600.0
GATHER_SECONDS = 0.2
"""A requested full scan waits a moment, so that one scan serves several requests."""
REST_FACTOR = 5.0
"""After a full scan, the next one waits this many times as long as the last one took."""
EVENT_GRACE_SECONDS = 5.0
"""An event that follows the full scan by no more than this still counts as having reported the change."""
STALL_BEAT_SECONDS = 2.0
STALL_SECONDS = 5.0
FORGET_SECONDS = 3600.0
AUDIT_FILES = 64
SHARE_FOUND_MANY = 20
MAX_QUOTED = 300
VOID_REMEDY = "nothing is deleted meanwhile. The next full scan tries again"
LOST_REMEDY = (
    "nothing is lost, because the full scan found them. To find them sooner, raise the kernel's queue: "
    "`echo fs.inotify.max_queued_events=131072 | sudo tee -a /etc/sysctl.conf && sudo sysctl -p`"
)
SILENT_REMEDY = (
    "start with `--poll` (watch.mode=poll), or shorten scan_interval_seconds. `everos-engine sync` finds everything now"
)


async def scan(context: Context) -> None:
    """Run full scans forever. Meanwhile notice stalls, and audit the tree's content a little at a time."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_notice_stalls, context)
        nursery.start_soon(_audit, context)
        await _scans(context)


async def _scans(context: Context) -> None:
    first = True
    while True:
        seen = context.scan_now.value
        context.beat("scan", within_seconds=SCAN_ALLOWANCE_SECONDS)
        began, waited = time.monotonic(), context.threads.waited_seconds
        with unit("scan", "a full scan") as done:
            try:
                await _scan_once(context, first=first)
            except Transient as error:
                context.starved(error)
                await context.conditions.say("full_scan_void", str(error), VOID_REMEDY)
            else:
                first = False
                await context.conditions.over("full_scan_void")
            await _say_held(context)
        if done.error is not None:
            await context.conditions.say(
                "full_scan_void", f"the full scan met a bug: {done.error!r}"[:MAX_QUOTED], VOID_REMEDY
            )
        took = (
            time.monotonic() - began - (context.threads.waited_seconds - waited)
        )  # waiting for a directory is no load
        pause = _interval(context)
        context.beat("scan", within_seconds=pause + SCAN_ALLOWANCE_SECONDS)
        await wait_moved(context.scan_now, seen, at_most_seconds=pause)
        await trio.sleep(max(GATHER_SECONDS, REST_FACTOR * took))


def _interval(context: Context) -> float:
    settings = context.settings
    if context.progress.polling:
        return min(settings.watch.poll_interval_seconds, settings.scan_interval_seconds)
    return settings.scan_interval_seconds


async def _scan_once(context: Context, *, first: bool) -> None:
    progress = context.progress
    listening = progress.watching and not first and time.monotonic() - progress.watched_since_seconds > GATHER_SECONDS
    burst, stall, progress.burst, progress.stall_seconds = progress.burst, progress.stall_seconds, 0, 0.0
    found = await reconcile_tree(
        context.settings,
        context.database,
        source="start" if first else "scan",
        deletion_guard=context.deletion_guard,
        threads=context.threads,
    )
    progress.last_scan_milliseconds = now_milliseconds()
    if found.queued:
        logger.info("full_scan files={} queued={}", found.files, len(found.queued))
        context.wake_up()
    await inspect(context)
    await _say_blind(context, found)
    if listening:
        now = time.monotonic()
        progress.unseen.update(dict.fromkeys(found.queued, now))
        if burst or stall:
            await _name_overflow(context, burst, stall)
    elif found.queued and not first and not progress.watching:  # there are no events that could report them
        await context.database.awrite(lambda tx: full_scan.credit(tx, "scan", len(found.queued)))
    await _count_unseen(context, blameless=not (burst or stall))


async def _name_overflow(context: Context, burst: int, stall_seconds: float) -> None:
    """Report the changes that events lost in the kernel's queue.

    No event came for them within the grace, after a burst or a stall. This full scan or one shortly before it may have
    found them. The first after a stall can come before the stall is noticed.
    """
    paths = set(context.progress.unseen)
    if not paths:
        return
    await trio.sleep(EVENT_GRACE_SECONDS)
    lost = len(paths & context.progress.unseen.keys())
    if lost:
        context.progress.lost_at_seconds = time.monotonic()
        cause = f"a burst of {burst} events" if burst else f"a stall of {stall_seconds:.0f} s"
        message = f"{lost} changes were found only by the full scan: after {cause} the kernel's event queue overflowed"
        await context.conditions.say("events_lost", message, LOST_REMEDY)


async def _count_unseen(context: Context, *, blameless: bool) -> None:
    """Count the changes that only the scan found, because no event reported them within the grace."""
    progress, unseen, now = context.progress, context.progress.unseen, time.monotonic()
    late = [path for path, at in unseen.items() if now - at > EVENT_GRACE_SECONDS]
    if late:  # SQLite first: what it refuses is counted by the next full scan
        await context.database.awrite(lambda tx: full_scan.credit(tx, "scan", len(late)))
    for path in late:
        unseen.pop(path, None)
    if now - progress.lost_at_seconds > FORGET_SECONDS:
        await context.conditions.over("events_lost")
    if not late:
        return
    if blameless:
        progress.silent += len(late)
    if progress.silent >= SHARE_FOUND_MANY and progress.silent > progress.reported:
        both = progress.silent + progress.reported
        message = (
            f"{progress.silent} of {both} changes were found only by full scans: file events do not reach the engine"
        )
        await context.conditions.say("events_missing", message, SILENT_REMEDY)
    else:
        await context.conditions.over("events_missing")


async def _say_blind(context: Context, found: FullScan) -> None:
    if not found.blind:
        await context.conditions.over("unreadable_directory")
        return
    key, reason = next(iter(found.blind.items()))
    directory = files.path_of(context.settings.root, key)
    more = f" and {len(found.blind) - 1} more" if len(found.blind) > 1 else ""
    message = (
        f"the directory {directory!r}{more} cannot be read ({reason}): what is in it keeps its rows and is not updated"
    )
    await context.conditions.say("unreadable_directory", message, _readable_again(directory, reason))


def _readable_again(directory: str, reason: str) -> str:
    """Return what makes a directory readable that answered with ``reason``."""
    if reason != os.strerror(errno.EACCES):
        return BLIND_REMEDY
    with suppress(OSError):
        who = "u" if os.stat(directory).st_uid == os.geteuid() else "a"
        return f"give the engine's user permission: `chmod {who}+rX {shlex.quote(directory)}`"
    return BLIND_REMEDY


async def _say_held(context: Context) -> None:
    """Report all that is held in one condition, or clear it if nothing is."""
    kept: list[Held] = await context.database.aread(held.counts)
    if not kept:
        await context.conditions.over("deletions_held")
        return
    total = sum(one.count for one in kept)
    message = f"{total} deletions are held: " + "; ".join(f"{one.count} because {WHY[one.reason]}" for one in kept)
    await context.conditions.say(
        "deletions_held", message, "; ".join(dict.fromkeys(REMEDY[one.reason] for one in kept))
    )


async def _notice_stalls(context: Context) -> None:
    """Ask for a full scan after this process was stopped, starved or suspended, because it may have missed events."""
    while True:
        wall, steady = time.time(), time.monotonic()
        await trio.sleep(STALL_BEAT_SECONDS)
        slept = max(time.monotonic() - steady, time.time() - wall) - STALL_BEAT_SECONDS
        if slept > STALL_SECONDS:
            logger.info("stalled seconds={:.1f}", slept)
            context.progress.stall_seconds = max(context.progress.stall_seconds, slept)
            context.look_again()


async def _audit(context: Context) -> None:
    """Read every file again once in ``audit_interval_hours``, a few at a time, and continue from an earlier process."""
    hours = context.settings.audit_interval_hours
    if not hours:
        return
    while True:
        known, position = await context.database.aread(
            lambda tx: (full_scan.files(tx), meta.get(tx, AUDIT_POSITION) or "")
        )
        await trio.sleep(max(1.0, hours * 3600 * AUDIT_FILES / max(known, AUDIT_FILES)))
        with unit("scan", f"an audit step after {position!r}"):
            _, queued, _ = await audit(
                context.settings, context.database, context.threads, after=position, limit=AUDIT_FILES
            )
            if queued:
                logger.warning("audit_found_changes count={} first={!r}", len(queued), queued[0])
                context.wake_up()
