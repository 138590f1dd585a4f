"""Ledger and index are made to agree before the loops start: whatever happened to the tables heals by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from loguru import logger

from everos_engine.errors import RootAway, Transient, Unexpected
from everos_engine.loops.desk import now_milliseconds
from everos_engine.stores import ledger, queue
from everos_engine.stores.lance import Model
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.loops.desk import Desk
    from everos_engine.stores.database import Transaction

LOOKS = 3
LOOK_PAUSE_SECONDS = 0.3
START_PATIENCE_SECONDS = 5.0
"""How long a start waits for the embedder to say which model it is; the worker sees to it later."""


async def agree(desk: Desk) -> None:
    """Make ledger and index agree: a table that is gone, replaced, restored or half written heals by itself."""
    remembered = await desk.database.aread(ledger.incarnations)
    for kind in kinds.KINDS:
        reason = await _damage(desk, kind)
        if reason is not None:
            logger.warning("index_damaged kind={} error={!r}", kind, reason)
            await desk.index.discard(kind)
    lives = await desk.index.lives()
    model = await _model_now(desk) if lives else None
    for kind in kinds.KINDS:
        life, known = lives.get(kind), remembered.get(kind)
        if life is None and known is None:
            continue
        if life is None or known is None or life[0] != known[0] or (model is not None and life[2] != model.name):
            await _void(desk, kind, life, model)
        elif life[1] != known[1]:
            await _reconcile(desk, kind, life)


async def heal(desk: Desk, kind: str) -> None:
    """Begin a kind anew from markdown, with cached vectors, if its table cannot be read any more.

    Raises Transient while the root is out of reach, and the table with it.
    """
    await expect_root(desk)
    reason = await _damage(desk, kind)
    if reason is None:
        return
    await desk.index.discard(kind)
    count = await desk.database.awrite(lambda tx: begin_anew(tx, kind))
    logger.warning("index_damaged kind={} requeued={} error={!r}", kind, count, reason)
    desk.wake_up()


async def expect_root(desk: Desk) -> None:
    """Raises Transient where the root is not the one we began with.

    LanceDB makes the directories of what it writes: a root that was moved away would lie there again, empty, in the way of
    the one that is moved back.
    """
    if await trio.to_thread.run_sync(desk.brake.is_lost):
        message = "the memory root is not there: its index is written when it is back"
        raise RootAway(message)


def begin_anew(tx: Transaction, kind: str) -> int:
    """The ledger of a kind whose table is gone: nothing is indexed, everything is queued; how many changes."""
    ledger.void(tx, kind)
    ledger.forget(tx, kind)
    return queue.requeue_kind(tx, kind, now_milliseconds=now_milliseconds())


async def _damage(desk: Desk, kind: str) -> str | None:
    """Why a kind's table cannot be read, asked again before it is believed; None where it can, or none is there."""
    for tries_left in range(LOOKS - 1, -1, -1):
        try:
            await desk.index.check(kind)
        except Unexpected as error:
            if not tries_left:
                return str(error)
            await trio.sleep(LOOK_PAUSE_SECONDS)
        except Transient:
            return None  # a deadline, or no descriptor: it says nothing of the table
        else:
            break
    return None


async def _model_now(desk: Desk) -> Model | None:
    """The model that answers today; None while it does not answer, then the first commit will tell."""
    try:
        with trio.move_on_after(START_PATIENCE_SECONDS):
            return await desk.vectors.model()
    except Transient as error:
        logger.warning("embedder_silent error={!r}", str(error))
    return None


async def _void(desk: Desk, kind: str, life: tuple[str, int, str] | None, model: Model | None) -> None:
    """The ledger speaks of another table than the one there is: start the kind again from markdown."""
    if life is not None:
        chosen = model or Model(life[2], desk.index.dimension_of(kind))
        life = (await desk.index.create(kind, chosen), 0, chosen.name)

    def note(tx: Transaction) -> int:
        ledger.void(tx, kind)
        ledger.forget(tx, kind)
        if life is not None:
            ledger.remember(tx, kind, life[0], version=life[1], model=life[2])
        return queue.requeue_kind(tx, kind, now_milliseconds=now_milliseconds())

    count = await desk.database.awrite(note)
    logger.warning("index_replaced kind={} requeued={}", kind, count)


async def _reconcile(desk: Desk, kind: str, life: tuple[str, int, str]) -> None:
    """The table is not of the version we left: compare every key, and queue the files that differ."""
    rows, known = await desk.index.keys(kind), await desk.database.aread(lambda tx: ledger.hashes(tx, kind))
    differing = {key for key in rows.keys() | known.keys() if rows.get(key) != known.get(key)}

    def note(tx: Transaction) -> int:
        ledger.doubt(tx, [(path, entry_id, kind) for path, entry_id in differing])
        ledger.remember(tx, kind, life[0], version=life[1], model=life[2])
        paths = sorted({path for path, _ in differing})
        return queue.requeue_paths(tx, paths, kind, now_milliseconds=now_milliseconds())

    count = await desk.database.awrite(note)
    if differing:
        logger.info("index_reconciled kind={} keys={} requeued={}", kind, len(differing), count)
