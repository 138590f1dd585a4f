"""The part that all commands share: hand the work to the running engine, or open an engine and do it here."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from everos_engine.cli.logs import set_up
from everos_engine.cli.progress import show_status
from everos_engine.cli.signals import SIGNALS, Interrupted, in_grace_no_more, stop_on_signal
from everos_engine.cli.terminal import say
from everos_engine.diagnose.engine_state import read_engine_state
from everos_engine.diagnose.status import snapshot
from everos_engine.diagnose.wording import plural
from everos_engine.embed.circuit_breaker import WAITING
from everos_engine.engine import Engine, check_root, open_engine, open_queue
from everos_engine.errors import AlreadyRunning, EngineError, Transient, Unavailable, unwrap
from everos_engine.loops.context import now_milliseconds
from everos_engine.settings import Settings
from everos_engine.stores import meta, queue
from everos_engine.stores.database import Database, Locked
from everos_engine.stores.reports import Outcome
from everos_engine.system import locks, wake
from everos_engine.system.locks import running_pid

T = TypeVar("T")
LOOK_SECONDS = 0.05
SILENCE_SECONDS = 5.0
SILENT = "the running engine does not answer (`everos-engine doctor` says why); everything is queued, and is done when it continues"
SILENT_IN_WRITE = (
    "the running engine does not answer (`everos-engine doctor` says why) and holds the lock on its database, "
    "so nothing could be queued. Run the command again when the engine continues"
)
"""It was stopped inside a transaction."""


def run_or_delegate(
    settings: Settings,
    own: Callable[[Engine], Awaitable[list[Outcome]]],
    hand_over: Callable[[Database], Awaitable[list[Outcome]]],
) -> list[Outcome]:
    """Do the work with ``own`` in an engine opened here, or with ``hand_over`` if an engine is running.

    Raises Interrupted if a signal ends it, and Transient if the running engine does not answer.
    """

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
        outcomes = run_alone(until_signal)
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


def run_alone(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` in Trio. Raises the one error of a group by itself."""
    try:
        return trio.run(work)
    except BaseExceptionGroup as group:
        raise unwrap(group) from None


def _is_silent(settings: Settings) -> bool:
    """Return whether the engine is running but does not answer."""
    return read_engine_state(settings).state in {"silent", "stopped"}


def _expect_answer(settings: Settings) -> None:
    """Raise Transient if the running engine does not answer."""
    if _is_silent(settings):
        raise Transient(SILENT)


async def wait_until_applied(settings: Settings, database: Database, lsn: int) -> None:
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
