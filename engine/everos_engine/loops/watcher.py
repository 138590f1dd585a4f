"""Turn file events, gathered for a moment, into changes. Events are a hint, and the scan is the truth."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import trio
from loguru import logger
from watchfiles._rust_notify import RustNotify

from everos_engine.errors import Exhausted, Transient, exhausted
from everos_engine.keys import key_in_root
from everos_engine.loops.context import Context, now_milliseconds
from everos_engine.loops.deletion_guard import FEW, to_hold
from everos_engine.loops.reconcile import probe, root_trouble, verify_racy
from everos_engine.settings import Settings
from everos_engine.settings.paths import INDEX_DIRECTORY
from everos_engine.stores import full_scan, queue
from everos_engine.stores.database import Transaction
from everos_engine.stores.queue import Observation
from everos_engine.system import descriptors, files, limits
from everos_engine.system.file_threads import NoAnswer
from everos_engine.system.unit import unit
from everos_engine.text import kinds

STEP_MILLISECONDS, QUIET_STEP_MILLISECONDS = 20, 45
"""The library looks for events once a step, and reports them two steps later. A longer step saves wake-ups."""
QUIET_AFTER_MILLISECONDS = 10_000
WATCHER_DESCRIPTORS = 4
"""The descriptors that watching opens: inotify, two polls and their wake-up."""
LOOK_SECONDS = 2.0
"""How often the root's identity and the watching thread are checked."""
RETRY_SECONDS = 300.0
STOP_SECONDS = 2.0
"""A watching thread that is asked to end does so within its step of 20 ms, unless a directory hangs it."""
FIRST_PAUSE_SECONDS = 0.2
FAILURES = 6
"""This many failures of the events' library within RETRY_SECONDS are waited out, each twice as long. Then the scan
polls."""
CHECK_SECONDS = 60.0
BURST = 500
"""If one batch has more events than this, a full scan looks for events that the kernel's queue may have dropped."""
ALLOWANCE_SECONDS = 30.0
POLL_REMEDY = "until then changes are found by polling"
REMEDIES = {
    "watch_limit": "`echo fs.inotify.max_user_watches=524288 | sudo tee -a /etc/sysctl.conf && sudo sysctl -p`; ",
    "watch_failed": "if a file or directory is named here, rename it so that its name is UTF-8. ",
    "watch_hung": "check whether the server of this directory answers, or remove the link to it. ",
    "instance_limit": "`echo fs.inotify.max_user_instances=1024 | sudo tee -a /etc/sysctl.conf && sudo sysctl -p`; ",
}


class WatcherFailed(Transient):
    """The library of file events raised an error. Its watches report nothing any more, and new ones are needed.

    It raises when a name in a batch is not UTF-8, and then goes on raising.
    """


class DirectoryHangs(WatcherFailed):
    """A directory that would be watched does not answer. The library would stop the whole process in it."""


async def watch(context: Context) -> None:
    """Record events until cancelled, and set the watches again whenever they may be stale.

    If there are no events, or if they do not report every change, say so and have the scan poll instead.
    """
    mode = context.settings.watch.mode
    context.progress.polling = mode == "poll"
    if mode in {"poll", "off"}:
        await _idle(context)
    if mode == "auto":
        await _check_mounts(context)
    failures: deque[float] = deque(maxlen=FAILURES)
    while True:
        context.beat("watch", within_seconds=ALLOWANCE_SECONDS)
        try:
            await _listen(context)
            logger.warning("watches_renewed root={}", context.settings.root)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                await trio.sleep(LOOK_SECONDS)  # the root is gone: the scan says so
                continue
            await _degraded(context, error)
        except WatcherFailed as error:
            await _again(context, failures, error)


async def _again(context: Context, failures: deque[float], error: WatcherFailed) -> None:
    """Wait before new watches, longer after each failure. After too many failures let the scan poll for a while."""
    now = time.monotonic()
    while failures and now - failures[0] > RETRY_SECONDS:
        failures.popleft()
    if len(failures) == FAILURES or isinstance(error, DirectoryHangs):
        await _degraded(context, error)
        return
    pause = FIRST_PAUSE_SECONDS * 2 ** len(failures)
    failures.append(now)
    logger.warning("watch_restarted in_seconds={:.1f} error={!r}", pause, str(error))
    context.look_again()  # what its batch held has no other event
    await trio.sleep(pause)


async def _idle(context: Context) -> None:
    while True:
        context.beat("watch", within_seconds=ALLOWANCE_SECONDS)
        await trio.sleep(ALLOWANCE_SECONDS / 2)


async def _check_mounts(context: Context) -> None:
    """Poll if the root, or a file system mounted in it, does not report every change. For overlays only say so."""
    root, seconds = os.fspath(context.settings.root), context.settings.watch.poll_interval_seconds
    every = await trio.to_thread.run_sync(limits.mounts)
    own = limits.mount_below(root, every)
    silent = [mount for mount in (own, *limits.mounts_inside(root, every)) if limits.silence(mount)]
    reported = [mount for mount in silent if not limits.delivers_events(mount)]
    for mount in silent:
        if mount not in reported:
            logger.info("mount_layered point={!r} message={!r}", mount.point, limits.silence(mount))
    if reported:
        context.progress.polling = True
        what = "the memory root is" if reported[0] is own else f"{reported[0].point!r} in the memory root is"
        remedy = f"the engine scans every {seconds:g} s instead (watch.poll_interval_seconds). `everos-engine sync` finds everything now"
        await context.conditions.say("mount_silent", f"{what} on {limits.silence(reported[0])}", remedy)


async def _degraded(context: Context, error: OSError | WatcherFailed) -> None:
    """Go without events for now: report the limit and its remedy, poll, and try again later."""
    code = "watch_failed"
    if isinstance(error, DirectoryHangs):
        code = "watch_hung"
    if isinstance(error, OSError):
        code = "watch_limit" if error.errno == errno.ENOSPC or "limit" in str(error) else code
        if error.errno in {errno.EMFILE, errno.ENFILE} or "open files" in str(error):
            code = "instance_limit"
    context.progress.polling = True
    remedy = _raise(code) + POLL_REMEDY + f" every {context.settings.watch.poll_interval_seconds:g} s"
    reason = str(error).partition(" about ")[0].rstrip(".")
    await context.conditions.say(code, f"file events cannot be had: {reason}", remedy)
    context.look_again()
    with trio.move_on_after(RETRY_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_idle, context)
            await context.threads.returned.wait_transition()  # what hung may answer again
            nursery.cancel_scope.cancel()


def _raise(code: str) -> str:
    """Return what raises the limit that was hit: of the system, or of the user namespace if that one is smaller."""
    bounds = limits.inotify()
    least = {"watch_limit": bounds.watches_name, "instance_limit": bounds.instances_name}.get(code, "")
    remedy = REMEDIES.get(code, "")
    if not least.startswith("user."):
        return remedy
    wanted = remedy.partition("=")[2].partition(" ")[0]
    return f"this user namespace has a separate limit, raise it there: `echo {wanted} | tee /proc/sys/{least.replace('.', '/')}`; the system's: {remedy}"


async def _listen(context: Context) -> None:
    """Set the watches, and record what they report until they are stale.

    Raises OSError if they cannot be set, and WatcherFailed for any other error of their library.
    """
    laid_on, stop = await _identity(context), threading.Event()
    silent = await _silent_directory(context)
    if silent is not None:
        raise DirectoryHangs(f"the directory {silent!r} does not answer")
    send, receive = trio.open_memory_channel[set[str]](64)
    thread = trio.CancelScope(shield=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_cancelled, stop, thread)
            nursery.start_soon(_receive, context, receive)
            nursery.start_soon(_in_thread, thread, partial(_run, context, stop, send))
            await _until_stale(context, laid_on)
            nursery.cancel_scope.cancel()
    except* (OSError, WatcherFailed) as group:
        raise group.exceptions[0] from None
    finally:
        context.progress.watching = False
        stop.set()


def _run(context: Context, stop: threading.Event, send: trio.MemorySendChannel[set[str]]) -> None:
    """Watch in a separate thread. Setting thousands of watches takes time, and waiting for events blocks."""
    settings = context.settings
    with _lay(settings) as watches:
        if stop.is_set():
            return
        trio.from_thread.run_sync(_laid, context)
        is_quiet = False
        while True:
            step, timeout = (QUIET_STEP_MILLISECONDS, 0) if is_quiet else (STEP_MILLISECONDS, QUIET_AFTER_MILLISECONDS)
            with _translated():
                found = watches.watch(settings.watch.debounce_milliseconds, step, timeout, stop)
            if found == "stop":
                return
            is_quiet = found == "timeout"
            if isinstance(found, set):
                trio.from_thread.run(
                    send.send, {os.fsdecode(path.encode("utf-8", "surrogateescape")) for _, path in found}
                )


@contextmanager
def _translated() -> Iterator[None]:
    """Raise WatcherFailed for anything that the library raises, except for an OSError, which names its cause."""
    try:
        yield
    except (OSError, trio.Cancelled):
        raise
    except BaseException as error:  # a door: the library raises its own error, and a panic of Rust is no Exception
        raise WatcherFailed(f"the library of file events failed: {error}") from error


@contextmanager
def _lay(settings: Settings) -> Iterator[RustNotify]:
    """Watch the root until the end of the block."""
    watches = _new_watches(settings)
    try:
        yield watches
    finally:
        with _translated():
            watches.close()


def _new_watches(settings: Settings) -> RustNotify:
    paths, debug, polling, delay, recursive = [os.fspath(settings.root)], False, False, 300, True

    def lay(*, ignore_permission_denied: bool) -> RustNotify:
        with _translated():
            return RustNotify(
                paths, debug, polling, delay, recursive, ignore_permission_denied=ignore_permission_denied
            )

    try:
        return lay(ignore_permission_denied=False)
    except WatcherFailed as error:
        if not exhausted(error):
            raise
        if descriptors.none_left(wanted=WATCHER_DESCRIPTORS):
            raise Exhausted(f"no file descriptor is left to watch with: {error}") from error
        raise OSError(errno.EMFILE, str(error.__cause__)) from error  # the user's share of inotify instances
    except (
        PermissionError
    ):  # a blind directory, which the scan names. Ignoring it hides a watch limit, which _until_stale finds
        return lay(ignore_permission_denied=True)


def _laid(context: Context) -> None:
    context.progress.watching = True
    context.progress.watched_since_seconds = time.monotonic()
    context.look_again()  # what changed before the watches were set has no event


async def _silent_directory(context: Context) -> str | None:
    """Return the first directory that does not answer, or None. Links are followed, as the library does.

    The library holds the interpreter's lock while it walks the tree. A directory that hangs would stop every thread.
    """
    todo, known = [os.fspath(context.settings.root)], set[tuple[int, int]]()
    while todo:
        found = await context.threads.all(todo, files.directories_in, what="list", name=str)
        todo = []
        for directory, below in found:
            if isinstance(below, NoAnswer):
                return directory
            new = {identity: path for path, identity in below if identity not in known}
            known.update(new)
            todo += new.values()
    return None


async def _in_thread(scope: trio.CancelScope, run: Callable[[], None]) -> None:
    with scope:
        await trio.to_thread.run_sync(run, abandon_on_cancel=True)


async def _stop_when_cancelled(stop: threading.Event, thread: trio.CancelScope) -> None:
    """Ask the watching thread to end, since it cannot be cancelled.

    A thread that hangs in a directory is left behind.
    """
    try:
        await trio.sleep_forever()
    finally:
        stop.set()
        thread.deadline = trio.current_time() + STOP_SECONDS


async def _until_stale(context: Context, laid_on: tuple[int, int]) -> None:
    """Return once the root was replaced. Meanwhile check that there is a watch for each directory."""
    due, added = time.monotonic() + LOOK_SECONDS, 0
    short_before, exhausted_before = 0, context.exhaustion.value
    began = time.monotonic()
    while True:
        await trio.sleep(LOOK_SECONDS)
        context.beat("watch", within_seconds=ALLOWANCE_SECONDS)
        if await _identity(context) != laid_on:
            return
        if not context.progress.watching and time.monotonic() - began > context.settings.file_deadline_seconds:
            await _poll_meanwhile(context)
        if context.exhaustion.value != exhausted_before:
            if context.pressure.value <= 0:
                continue  # there is no descriptor to look with
            return  # directories that appeared meanwhile may have got no watch
        if time.monotonic() < due and added == context.progress.directories_added:
            continue
        added = context.progress.directories_added
        due = time.monotonic() + CHECK_SECONDS
        short = await _directories_unwatched(context)
        if short and short_before:
            if not context.progress.polling:
                context.progress.polling = True
                context.look_again()  # the scan may be in the midst of a long pause
            seconds = context.settings.watch.poll_interval_seconds
            message = (
                f"file events cannot be had of about {short} directories: the kernel's limit of watches is reached"
            )
            await context.conditions.say(
                "watch_limit", message, f"{_raise('watch_limit')}{POLL_REMEDY} every {seconds:g} s"
            )
        elif not short:
            await _well(context)
        else:
            due = time.monotonic() + LOOK_SECONDS  # directories come and go: look twice before saying anything
        short_before = short


async def _poll_meanwhile(context: Context) -> None:
    """Poll while the watches are still being set: in a very large tree, or in a directory that does not answer."""
    seconds = context.settings.watch.poll_interval_seconds
    message = "file events cannot be had yet: the watches are still being made, and a directory may not answer"
    await context.conditions.say("watch_failed", message, f"{POLL_REMEDY} every {seconds:g} s")
    if not context.progress.polling:
        context.progress.polling = True
        context.look_again()


async def _well(context: Context) -> None:
    """Record that every directory is watched: no limit holds, and polling ends unless the mount needs it."""
    await context.conditions.over("watch_limit", "instance_limit", "watch_failed", "watch_hung")
    context.progress.polling = "mount_silent" in context.conditions.now


async def _directories_unwatched(context: Context) -> int:
    """Return about how many directories have no watch, or 0 if that cannot be known."""
    watched, root = limits.own_watches(), os.fspath(context.settings.root)
    if watched is None:
        return 0
    try:
        there = await context.threads.call(partial(files.directories_below, root), what="list all", name=root)
    except NoAnswer:
        return 0
    return max(0, there - watched)


async def _identity(context: Context) -> tuple[int, int]:
    """Return which directory the root is. Raises OSError and NoAnswer."""
    root = context.settings.root
    found = await context.threads.call(lambda: os.stat(root), what="stat", name=os.fspath(root))
    return found.st_dev, found.st_ino


async def _receive(context: Context, batches: trio.MemoryReceiveChannel[set[str]]) -> None:
    async for batch in batches:
        if len(batch) > BURST:
            context.progress.burst = max(context.progress.burst, len(batch))
            context.look_again()
        paths = {path for path in batch if not _ours(context.settings, path)}
        if paths:
            with unit("watch", f"{len(paths)} events") as done:
                await _record(context, paths)
            if done.error is not None:
                context.look_again()


async def _record(context: Context, paths: set[str]) -> None:
    """Look at what a batch of events names, and queue it.

    A path that cannot be looked at is left to the next full scan.
    """
    settings = context.settings
    try:
        observations, again = await _probe(context, paths)
        verified = await verify_racy(
            settings, context.database, context.threads, [seen.md_path for seen in observations]
        )
        observations = [seen for seen in observations if seen not in verified]
        gone = [seen for seen in observations if seen.fingerprint is None]
        there = [seen for seen in observations if seen.fingerprint is not None]
        if gone and (len(gone) > FEW or await root_trouble(context.deletion_guard, context.threads) is not None):
            gone, again = [], True
        now, settle = now_milliseconds(), settings.settle_milliseconds

        def record(tx: Transaction) -> tuple[list[Observation], list[str]]:
            found = partial(queue.record, tx, source="watch", now_milliseconds=now, settle_milliseconds=settle)
            queued = found(there)  # first, so that a file that got another name is known under it
            if to_hold(tx, settings, [seen.md_path for seen in gone], now_milliseconds=now):
                return there, queued  # a full scan sees the whole tree, and holds them
            return there + gone, queued + found(gone)

        observations, queued = await context.database.awrite(record)
        again = again or len(observations) < len(there) + len(gone)
    except Transient as error:
        context.starved(error)
        logger.warning("events_left_to_scan count={} error={!r}", len(paths), str(error))
        context.look_again()
        return
    for seen in observations:
        context.progress.unseen.pop(seen.md_path, None)
    context.progress.reported += len(queued)
    if again:
        context.look_again()
    if queued:
        context.wake_up()


class _Named(NamedTuple):
    """What one event names: a change, or the changes below a directory, or a key that may have been a directory."""

    changes: Sequence[str]
    is_directory: bool
    gone: str | None


async def _probe(context: Context, paths: set[str]) -> tuple[list[Observation], bool]:
    """Look at every path named, at all paths below a new directory, and at all known paths below one that vanished.

    Also returns whether a full scan should follow. Files made in a new directory before its watch have no event.
    """
    named = await context.threads.all(sorted(paths), partial(_named, context.settings), what="stat", name=str)
    found = [seen for _, seen in named if isinstance(seen, _Named)]
    directories = sum(seen.is_directory for seen in found)
    context.progress.directories_added += directories
    keys = dict.fromkeys(key for seen in found for key in seen.changes)
    gone = [seen.gone for seen in found if seen.gone is not None]
    if gone:
        known = await context.database.aread(
            lambda tx: [path for key in gone for path in full_scan.known_below(tx, key)]
        )
        keys.update(dict.fromkeys(known))
    observations, unseen = await probe(context.settings, context.threads, list(keys))
    return observations, bool(directories or unseen or len(found) < len(named))


def _named(settings: Settings, event: str) -> _Named:
    path = files.without_links(settings.root, event)
    key = key_in_root(settings, path)
    if key is None:
        return _Named((), is_directory=False, gone=None)
    place = kinds.recognise(key, note_globs=settings.note.globs)
    changes = [] if place is None else [place.md_path]
    if os.path.isdir(path) and not os.path.islink(path):
        return _Named([*changes, *_below(settings, path)], is_directory=True, gone=None)
    return _Named(changes, is_directory=False, gone=key if place is None else None)


def _below(settings: Settings, directory: str) -> list[str]:
    def recognise(key: str) -> kinds.Place | None:
        return kinds.recognise(key, note_globs=settings.note.globs)

    return list(files.walk(settings.root, recognise, below=directory).found)


def _ours(settings: Settings, path: str) -> bool:
    below = os.path.relpath(path, settings.root)
    return below == INDEX_DIRECTORY or below.startswith(INDEX_DIRECTORY + os.sep)
