"""Make ledger and tables agree, at the start and in each full scan. Anything that happened to a table is repaired.

Two stores without a common transaction need an order. A table's identity is noted in SQLite before the table is
created, and the files of a table that is lost are queued before it is forgotten in memory. If the second half fails,
SQLite speaks of a table that is not there. Every look at the tables finds that and repairs it.
"""

from __future__ import annotations

import os
import time

import trio
from loguru import logger

from everos_engine.errors import Damaged, RootAway, Transient, Unexpected
from everos_engine.loops.context import Context, now_milliseconds
from everos_engine.loops.reconcile import is_root_lost
from everos_engine.stores import lance, ledger, meta, queue
from everos_engine.stores.database import Transaction
from everos_engine.stores.index import Found
from everos_engine.stores.lance import PROBE_WORD, ForeignTable, Model, TableDamaged, Unrecognised
from everos_engine.stores.ledger import Remembered
from everos_engine.stores.versions import Version
from everos_engine.text import kinds

PROBES = 2
PROBE_PAUSE_SECONDS = 0.3
PROBE_REST_SECONDS = 30.0
"""A probe reads the whole table. If the table is sound, failing searches ask for no second probe within this time."""
START_PATIENCE_SECONDS = 5.0
"""How long a start waits for the embedder to name its model. After that the worker takes care of it."""
REBUILD_MILLISECONDS = 3_600_000
"""A table is rebuilt automatically at most once in this time. A disk that damages what is written to it needs a
person."""
REBUILT = "table_rebuilt:"
CONDITION = "index_damaged"


async def reconcile_index(context: Context) -> None:
    """Make every kind's ledger and table agree, before the loops start.

    A kind that cannot be looked at now is left to the full scans. Raises Fatal if a table belongs to another program.
    """
    context.unchecked.update(kinds.KINDS)
    await inspect(context)


async def inspect(context: Context) -> Transient | None:
    """Look at every kind's table, and repair those that changed outside the engine.

    A table may be gone, replaced, restored, damaged or written by another program. This costs some system calls for
    each kind, and a whole read of a table whose files were changed. It does nothing while the root is away. Returns why
    a kind is not in step, the first reason there is.
    """
    if await is_root_lost(context.deletion_guard, context.threads):
        return None
    model, first = None, None
    for kind in kinds.KINDS:
        if kind in context.unchecked and model is None and os.path.lexists(context.index.place_of(kind)):
            model = await _model_now(context)
        async with context.table(kind):
            try:
                await reconcile_table(context, kind, model)
            except Damaged:  # the database's: the stores are opened again
                raise
            except Transient as error:
                first = first or error
                if not isinstance(error, TableDamaged):  # that one has a condition
                    context.starved(error)
                    logger.warning("index_not_checked kind={} error={!r}", kind, str(error))
    return first


async def reconcile_table(context: Context, kind: str, model: Model | None = None) -> None:
    """Make one kind's ledger and table agree. The caller holds ``context.table(kind)``.

    ``model`` is the one that answers today, None if it is not known. Raises Transient if the table cannot be looked at
    now.
    """
    await expect_root(context)
    known = (await context.database.aread(ledger.incarnations)).get(kind)
    tampered = await context.index.tampered(kind)
    doubtful = tampered or kind in context.unchecked or kind in context.index.shunned
    if doubtful and await _set_aside_if_damaged(context, kind, PROBE_WORD):
        known = None
    try:
        found = await context.index.found(kind)
    except Unexpected as error:
        if not await _set_aside_if_damaged(context, kind, PROBE_WORD):
            raise error from None
        known = found = None
    except ForeignTable as error:
        if known is None:
            raise
        # its manifest may be damaged, or another program put it in the place of ours. A copy is kept in both cases
        await _set_aside(context, kind, str(error))
        known = found = None
    if found is None and known is None:
        pass
    elif found is None and known is not None and known.number == 0 and not await _has_rows(context, kind):
        pass  # its birth did not come to an end, and nothing is missing
    elif (
        found is None
        or known is None
        or found.incarnation != known.incarnation
        or (model is not None and found.model != model.name)
    ):
        await _void(context, kind, found, model)
    elif known.version != found.version and await context.index.recognise(kind, known.version) is None:
        await _reconcile(context, kind, known)
    elif known.version != found.version:
        await context.database.awrite(lambda tx: ledger.moved_on(tx, kind, found.incarnation, version=found.version))
    if kind in context.unchecked:
        await context.index.tampered(kind)  # what it is compared with from now on
        context.unchecked.discard(kind)


async def heal(context: Context, kind: str, error: Transient, *, words: str = PROBE_WORD) -> bool:
    """Do what a failed commit or search of a kind calls for. The caller holds ``context.table(kind)``.

    Returns whether the table was replaced. Only an unknown error casts doubt on a table. A deadline, a lack of
    descriptors or a lost race proves nothing. Raises Transient while the root is out of reach, and TableDamaged if the
    table may not be rebuilt yet.
    """
    if isinstance(error, Unrecognised):
        await reconcile_table(context, kind)
        return True
    if not isinstance(error, Unexpected):
        return False
    await expect_root(context)
    if await _is_lost(context, kind):
        await reconcile_table(context, kind)
        return True
    return await _set_aside_if_damaged(context, kind, words)


async def repair_reads(context: Context, words: str) -> bool:
    """Check the tables that could not be searched. Returns whether one of them was damaged and is rebuilt."""
    healed = False
    for kind in sorted(context.index.doubted):
        context.index.doubted.discard(kind)
        if time.monotonic() - context.probed.get(kind, float("-inf")) < PROBE_REST_SECONDS:
            continue
        async with context.table(kind):
            try:
                changed = await heal(context, kind, Unexpected("a search of it failed"), words=words)
            except TableDamaged:
                changed = True
        if not changed:
            context.probed[kind] = time.monotonic()
        healed = healed or changed
    return healed


async def recreate_table(context: Context, kind: str, model: Model) -> int:
    """Give a kind a new table for ``model``, and queue its files again. The caller holds ``context.table(kind)``.

    Returns how many files were queued. SQLite comes first. The next look finds an identity without a table, but every
    commit would refuse a table that SQLite does not know.
    """
    incarnation = lance.new_incarnation()

    def note(tx: Transaction) -> int:
        filled = ledger.has_rows(tx, kind)
        ledger.void(tx, kind)
        ledger.remember(tx, kind, incarnation, version=Version(0, b""), model=model.name)
        return queue.requeue_kind(tx, kind, now_milliseconds=now_milliseconds()) if filled else 0

    count = await context.database.awrite(note)
    version = await context.index.create(kind, model, incarnation)
    await context.database.awrite(lambda tx: ledger.moved_on(tx, kind, incarnation, version=version))
    context.wake_up()
    return count


async def expect_root(context: Context) -> None:
    """Raise Transient if the root is not the one of the start.

    LanceDB makes the directories of what it writes. A root that was moved away would be created again, empty, and would
    be in the way of the one that is moved back.
    """
    if await is_root_lost(context.deletion_guard, context.threads):
        raise RootAway("the memory root is not there: its index is written when it is back")


def _begin_again(tx: Transaction, kind: str) -> int:
    """Clear the ledger of a kind whose table is gone, and queue all of its files.

    Returns how many changes were queued.
    """
    ledger.void(tx, kind)
    ledger.forget(tx, kind)
    return queue.requeue_kind(tx, kind, now_milliseconds=now_milliseconds())


async def _has_rows(context: Context, kind: str) -> bool:
    return await context.database.aread(lambda tx: ledger.has_rows(tx, kind))


async def _is_lost(context: Context, kind: str) -> bool:
    return await context.index.newest(kind) is None


async def _set_aside_if_damaged(context: Context, kind: str, words: str) -> bool:
    """Set a table aside if it is proven damaged. Returns whether that was so.

    Raises TableDamaged if that happened less than an hour ago. Then the table is not read any more, and a condition
    says so.
    """
    reason = await _damage(context, kind, words)
    if reason is None:
        if context.index.shunned.pop(kind, None) is not None:
            await _end_condition(context)
        return False
    rebuilt = await context.database.aread(lambda tx: meta.get(tx, REBUILT + kind))
    since = now_milliseconds() - int(rebuilt or 0)
    if rebuilt is not None and 0 <= since < REBUILD_MILLISECONDS:
        context.index.shunned[kind] = reason
        minutes = (REBUILD_MILLISECONDS - since) // 60_000 + 1
        await context.conditions.say(
            CONDITION,
            f"the table {kind!r} was made again within the last hour, and is damaged once more: {reason}",
            f"check the disk; it is made again in {minutes} minutes, or, with the engine stopped, after "
            f"`rm -r {context.index.place_of(kind)}` by `everos-engine sync`",
        )
        raise TableDamaged(f"the table {kind!r} is damaged: {reason}")
    await _set_aside(context, kind, reason)
    return True


async def _set_aside(context: Context, kind: str, reason: str) -> None:
    kept = await context.index.set_aside(kind)

    def note(tx: Transaction) -> int:
        meta.put(tx, REBUILT + kind, str(now_milliseconds()))
        return _begin_again(tx, kind)

    count = await context.database.awrite(note)
    logger.warning("index_damaged kind={} requeued={} kept={!r} error={!r}", kind, count, str(kept), reason)
    await _end_condition(context)
    context.wake_up()


async def _end_condition(context: Context) -> None:
    if not context.index.shunned:
        await context.conditions.over(CONDITION)


async def _damage(context: Context, kind: str, words: str) -> str | None:
    """Return why a kind's table cannot be read, after a second probe. None if it can, or if nothing is proven."""
    for tries_left in range(PROBES - 1, -1, -1):
        try:
            await context.index.probe(kind, words)
        except ForeignTable as error:  # a damaged manifest may not name its maker. A table that we did not make stays
            if (await context.database.aread(ledger.incarnations)).get(kind) is None:
                raise
            return str(error)
        except Unexpected as error:
            if not tries_left:
                return str(error)
            await trio.sleep(PROBE_PAUSE_SECONDS)
        except Transient:
            return None  # a deadline, or no descriptor: it says nothing of the table
        else:
            break
    return None


async def _model_now(context: Context) -> Model | None:
    """Return the model that answers today, or None while it does not answer. The first commit finds out then."""
    try:
        with trio.move_on_after(START_PATIENCE_SECONDS):
            return await context.vectors.model()
    except Transient as error:
        logger.warning("embedder_silent error={!r}", str(error))
    return None


async def _void(context: Context, kind: str, found: Found | None, model: Model | None) -> None:
    """Start the kind again from markdown, because the ledger describes another table than the present one."""
    if found is None:
        count = await context.database.awrite(lambda tx: _begin_again(tx, kind))
        context.index.forget(kind)
        logger.warning("index_removed kind={} requeued={}", kind, count)
    else:
        await context.database.awrite(lambda tx: _begin_again(tx, kind))
        count = await recreate_table(context, kind, model or Model(found.model, context.index.dimension_of(kind)))
        logger.warning("index_replaced kind={} requeued={}", kind, count)
    context.wake_up()


async def _reconcile(context: Context, kind: str, known: Remembered) -> None:
    """Repair a table with a version that is not our own: compare every key and content hash, and queue what differs.

    If another program committed, all files of the kind are queued, because a row can be altered while its content hash
    is kept. Their rows are written again with cached vectors. A commit of our own that was cut off, by a crash or by
    its deadline, left keys unknown and altered nothing else. Rows with a duplicate key, and rows that belong to no file
    of the kind, are deleted.
    """
    context.index.reopen(kind)
    left = await context.index.newest(kind)
    if left is None:
        raise Unrecognised(f"the table {kind!r} is not there any more: it is made again from markdown")
    (rows, twice), hashes = (
        await context.index.keys(kind),
        await context.database.aread(lambda tx: ledger.hashes(tx, kind)),
    )
    differing = {key for key in rows.keys() | hashes.keys() if rows.get(key) != hashes.get(key)} | twice
    globs = context.settings.note.globs
    strays = {key for key in differing - hashes.keys() if not _is_of(kind, key[0], globs)}
    doubted = differing - strays
    may_be_ours = context.index.may_have_cut_off(kind) or (
        kind in context.unchecked and not all(hashes.values())  # a crash left the intention of a commit
    )

    def note(tx: Transaction) -> int:
        ledger.doubt(tx, [(path, entry_id, kind) for path, entry_id in doubted])
        now, paths, count = now_milliseconds(), {path for path, _ in doubted}, 0
        if not may_be_ours:
            count = queue.requeue_kind(tx, kind, now_milliseconds=now)
            paths -= {path for path, _ in hashes}
        return count + queue.requeue_paths(tx, sorted(paths), kind, now_milliseconds=now)

    count = await context.database.awrite(note)
    if twice or strays:
        left = await context.index.commit(kind, [], sorted(twice | strays), left=left)
    await context.database.awrite(
        lambda tx: ledger.remember(tx, kind, known.incarnation, version=left, model=known.model)
    )
    context.wake_up()
    if differing or not may_be_ours:
        logger.warning("index_reconciled kind={} keys={} requeued={}", kind, len(differing), count)


def _is_of(kind: str, path: str, globs: tuple[str, ...]) -> bool:
    place = kinds.recognise(path, note_globs=globs)
    return place is not None and place.kind == kind and place.md_path == path
