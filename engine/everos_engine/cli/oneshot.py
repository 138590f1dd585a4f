"""Commands that do their work and end.

While an engine is running they hand it over, without one they do it themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from everos_engine.cli.logs import set_up
from everos_engine.cli.progress import show_status
from everos_engine.cli.signals import SIGNALS, Interrupted, in_grace_no_more, stop_on_signal
from everos_engine.cli.terminal import say
from everos_engine.diagnose.engine_state import read_engine_state
from everos_engine.diagnose.status import snapshot
from everos_engine.diagnose.wording import plural
from everos_engine.embed.circuit_breaker import WAITING
from everos_engine.engine import Engine, check_root, open_engine, open_queue, open_reader
from everos_engine.errors import AlreadyRunning, BadQuestion, EngineError, Transient, Unavailable, unwrap
from everos_engine.loops.context import now_milliseconds
from everos_engine.loops.deletion_guard import DeletionGuard, write_marker
from everos_engine.loops.reconcile import audit as audit_next
from everos_engine.loops.reconcile import reconcile_tree
from everos_engine.loops.requests import enqueue
from everos_engine.loops.scanner import AUDIT_FILES
from everos_engine.search import Filter
from everos_engine.settings import Settings
from everos_engine.stores import held, ledger, meta, queue, reports, versions
from everos_engine.stores.database import Database, Locked
from everos_engine.stores.reports import Outcome
from everos_engine.system import files, locks, wake
from everos_engine.system.control import BUSY, SLOW_TALK_SECONDS, ask
from everos_engine.system.file_threads import call_within, open_threads
from everos_engine.system.locks import running_pid

if TYPE_CHECKING:
    import argparse

T = TypeVar("T")
LOOK_SECONDS = 0.05
SILENCE_SECONDS = 5.0
MAX_LOOK_SECONDS = 60.0
"""How long the running engine may take to see that a table is gone."""
SILENT = "the running engine does not answer (`everos-engine doctor` says why); everything is queued, and is done when it continues"
SILENT_IN_WRITE = (
    "the running engine does not answer (`everos-engine doctor` says why) and holds the lock on its database, "
    "so nothing could be queued. Run the command again when the engine continues"
)
"""It was stopped inside a transaction."""


def sync(settings: Settings, paths: Sequence[str]) -> list[Outcome]:
    """Bring everything, or only ``paths``, in step. Returns what became of each path, or everything that is failed.

    A path is looked up from the root, or from the working directory if only that has such a file.
    """
    paths = [_locate(settings, path) for path in paths]

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.sync(paths)

    async def hand_over(database: Database) -> list[Outcome]:
        if paths:
            keys, lsn = await enqueue(settings, database, paths)
            await _reach(settings, database, lsn)
            return database.read(lambda tx: reports.standing(tx, keys))
        deletion_guard = DeletionGuard(settings)
        deletion_guard.capture_root()
        found = await reconcile_tree(settings, database, source="sync", deletion_guard=deletion_guard)
        newest = await _looked_at(settings, database)
        await _reach(settings, database, max(found.lsn, newest))
        return database.read(reports.troubled)

    return _do(settings, own, hand_over)


def _locate(settings: Settings, path: str) -> str:
    """Return the path that is meant. Raises NoAnswer if its directory hangs."""
    deadline = settings.file_deadline_seconds
    return call_within(lambda: files.locate(settings.root, path), name=path, seconds=deadline)


def audit(settings: Settings) -> list[str]:
    """Read every file again. Returns the paths whose content was not what was indexed, which are in step now."""
    found: list[str] = []

    async def own(engine: Engine) -> list[Outcome]:
        await engine.settle()
        found.extend(await engine.audit())
        return []

    async def hand_over(database: Database) -> list[Outcome]:
        end: str | None = ""
        threads = open_threads(deadline_seconds=settings.file_deadline_seconds)
        while end is not None:
            _, queued, end = await audit_next(settings, database, threads, after=end, limit=AUDIT_FILES)
            found.extend(queued)
        await _reach(settings, database, database.read(queue.newest))
        return []

    _do(settings, own, hand_over)
    return found


def release(settings: Settings) -> list[Outcome]:
    """Apply every held deletion. Returns what became of each."""

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.release()

    async def hand_over(database: Database) -> list[Outcome]:
        write_marker(settings)
        paths = database.write(lambda tx: held.release(tx, now_milliseconds=now_milliseconds()))
        await _reach(settings, database, database.read(queue.newest))
        return database.read(lambda tx: reports.outcomes(tx, paths))

    return _do(settings, own, hand_over)


def forget(settings: Settings, paths: Sequence[str], *, text: str | None, delete: bool) -> int:
    """Leave no trace of these files, or of a text, below the index. Returns by how many bytes it is smaller.

    Raises Transient if the running engine cannot do it now.
    """
    paths = [files.locate(settings.root, path) for path in paths]
    saved: list[int] = []

    async def own(engine: Engine) -> list[Outcome]:
        saved.append(await engine.forget(paths, text=text, delete=delete))
        return []

    async def hand_over(_: Database) -> list[Outcome]:
        details = {"paths": paths, "text": text, "delete": delete}
        answer = await trio.to_thread.run_sync(lambda: _ask_slowly(settings, details))
        if "error" in answer:
            raise BadQuestion(str(answer["error"]))
        saved.append(cast("int", answer["saved_bytes"]))
        return []

    _do(settings, own, hand_over)
    return saved[-1]


def _ask_slowly(settings: Settings, details: Mapping[str, object]) -> dict[str, object]:
    try:
        answer = ask(settings.control_socket, "forget", details, deadline_seconds=SLOW_TALK_SECONDS + SILENCE_SECONDS)
    except TimeoutError:
        answer = None
    if answer is None or answer.get("error") == BUSY:
        raise Transient(
            "the running engine could not do this in time, or the question is too long: stop it, then run the command again"
        )
    return answer


def fix(settings: Settings) -> list[Outcome]:
    """Try every retryable failure again. Returns what became of each."""

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.fix()

    async def hand_over(database: Database) -> list[Outcome]:
        paths = database.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=now_milliseconds()))
        await _reach(settings, database, database.read(queue.newest))
        return database.read(lambda tx: reports.outcomes(tx, paths))

    return _do(settings, own, hand_over)


def search(settings: Settings, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return results as plain data."""
    only = Filter(arguments.kind, arguments.owner, arguments.app, arguments.project)

    async def ask() -> list[dict[str, object]]:
        async with open_reader(settings) as engine:
            found = await engine.search(
                " ".join(arguments.query), mode=arguments.mode, only=only, limit=arguments.limit
            )
        return [result.as_data() for result in found]

    set_up(settings, reporting=True)
    return _alone(ask)


def _do(
    settings: Settings,
    own: Callable[[Engine], Awaitable[list[Outcome]]],
    hand_over: Callable[[Database], Awaitable[list[Outcome]]],
) -> list[Outcome]:
    async def work() -> list[Outcome]:
        holder = locks.holder(settings.engine_lock)
        if holder is None or holder.ends_by_itself:
            try:
                async with open_engine(settings, watching=False) as engine, trio.open_nursery() as nursery:
                    if screen is not None:
                        nursery.start_soon(show_status, engine, screen)
                    outcomes = await own(engine)
                    await engine.compact()
                    nursery.cancel_scope.cancel()
            except AlreadyRunning as error:
                if error.ends_by_itself:
                    raise
                # an engine started in between: it serves us
            else:
                return outcomes
        try:
            database = open_queue(settings)
            try:
                return await hand_over(database)
            finally:
                database.close()
        except Locked as error:
            if await trio.to_thread.run_sync(_is_silent, settings):
                raise Transient(SILENT_IN_WRITE) from error
            raise

    def said() -> None:
        say(f"stopping within {settings.shutdown_grace_seconds:g} s. A second signal stops immediately")

    async def until_signal() -> list[Outcome] | None:
        if threading.current_thread() is not threading.main_thread():
            return await work()  # signals reach the main thread only: who called us from another one handles them
        outcomes = None
        with trio.open_signal_receiver(*SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_on_signal, signals, nursery.cancel_scope, settings.shutdown_grace_seconds, said)
                outcomes = await work()
                nursery.cancel_scope.cancel()
        return outcomes

    check_root(settings)
    screen = set_up(settings, reporting=True)
    try:
        outcomes = _alone(until_signal)
    except KeyboardInterrupt:
        outcomes = None
    finally:
        if screen is not None:
            screen.clear()
    if outcomes is None:
        in_grace_no_more()
        raise Interrupted(_left(settings))
    return outcomes


def _left(settings: Settings) -> str:
    """Return what an interrupted command did, and what is left."""
    goes_on = "what is left is done by the next `everos-engine sync`, or by `everos-engine run`"
    try:
        counts = snapshot(settings).counts
    except EngineError:
        counts = None
    if counts is None:
        return f"interrupted; {goes_on}"
    waiting = counts.pending + counts.processing
    return f"interrupted: {plural(counts.done, 'file')} in step, {plural(waiting, 'change')} queued; {goes_on}"


def _alone(work: Callable[[], Awaitable[T]]) -> T:
    try:
        return trio.run(work)
    except BaseExceptionGroup as group:
        raise unwrap(group) from None


async def _looked_at(settings: Settings, database: Database) -> int:
    """Have the running engine look at tables that changed or are gone. Returns the newest lsn once it has."""

    def differing() -> set[tuple[str, str]]:
        known = database.read(ledger.incarnations)
        return {
            (kind, table.incarnation)
            for kind, table in known.items()
            if table.number and versions.follow(settings.lancedb_directory / f"{kind}.lance", table.version) is None
        }

    before = differing()
    if before:
        with suppress(TimeoutError), trio.move_on_after(MAX_LOOK_SECONDS):
            ask(settings.control_socket, "look")
            while before & differing():  # noqa: ASYNC110 - what another process does has no event here
                await trio.sleep(LOOK_SECONDS)
    return database.read(queue.newest)


def _is_silent(settings: Settings) -> bool:
    """Return whether the engine is running but does not answer."""
    return read_engine_state(settings).state in {"silent", "stopped"}


def _expect_answer(settings: Settings) -> None:
    """Raise Transient if the running engine does not answer."""
    if _is_silent(settings):
        raise Transient(SILENT)


async def _reach(settings: Settings, database: Database, lsn: int) -> None:
    """Wait for the running engine's watermark.

    Raises Transient if it goes away, its embedder is down for too long, a deletion waits because the root looks wrong,
    or the database was made again. The length of an outage is also counted by the monotonic clock, because the wall
    clock may be set.
    """
    patience_milliseconds = settings.embedder.outage_patience_seconds * 1000
    down_since: float | None = None
    wake.send(settings.wake_socket)
    asked = answered = time.monotonic()
    while not database.read(lambda tx: queue.reached(tx, lsn)):
        await trio.sleep(LOOK_SECONDS)
        if time.monotonic() - answered > SILENCE_SECONDS:
            await trio.to_thread.run_sync(_expect_answer, settings)
            answered = time.monotonic()
        if time.monotonic() - asked > 1:
            asked = time.monotonic()
            outage = database.read(meta.outage)
            down_since = None if outage is None else down_since or asked
            seen_milliseconds = 0.0 if down_since is None else (asked - down_since) * 1000
            if outage and max(now_milliseconds() - outage[0], seen_milliseconds) >= patience_milliseconds:
                raise Unavailable(f"{WAITING}: {outage[1]}; the changes are queued, and indexed when it answers")
            if (why := database.read(lambda tx: queue.refused(tx, lsn))) is not None:
                raise Transient(why)
            if database.is_replaced():
                raise Transient("the queue's database was damaged and is made again meanwhile: run the command again")
            if running_pid(settings.engine_lock) is None:
                raise Transient("the engine stopped before it was done; everything is queued: run the command again")
