"""Erase what no file holds any more: old rows and versions, unused vectors, free pages and set-aside copies.

A deletion only marks a row. Its text stays in the table's files until the fragment is rewritten, in the full-text index
until that is built again, and in older versions until they are pruned. `erase_table` does all three and changes no row.
A crash at any point therefore leaves a correct table, and the next call starts again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import trio
from loguru import logger

from everos_engine.errors import BadQuestion, Transient
from everos_engine.loops.context import Context, now_milliseconds
from everos_engine.loops.recovery import expect_root
from everos_engine.settings.paths import SET_ASIDE
from everos_engine.stores import embeddings, lance, ledger, meta
from everos_engine.stores.database import Transaction
from everos_engine.system import files
from everos_engine.text import kinds
from everos_engine.text.kinds import Kind
from everos_engine.text.kinds.parsers import embed_text

MARK = "erased_"
"""The prefix before the kind, in ``meta``. The value is the version that was erased last, and when."""
HOUR_MILLISECONDS = 3_600_000
FORGOTTEN = "(forgotten)"
EVERY_PATH = "SELECT md_path FROM md_change_state"


async def forget(context: Context, keys: Sequence[str], text: str | None) -> int:
    """Leave no byte below the index of what ``keys`` held, of ``text``, or of anything that no file holds now.

    Returns by how many bytes the files of the index shrank. Raises BadQuestion if a file still holds it.
    """
    await expect_root(context)
    holding = await _holding(context, keys, text)
    if holding:
        named = ", ".join(repr(path) for path in holding[:5]) + (
            f" and {len(holding) - 5} more" if len(holding) > 5 else ""
        )
        raise BadQuestion(
            f"{named}: still in the memory. Remove it from there first, then run the command again. `everos-engine forget --delete PATH` removes the file too"
        )
    before = await _size(context)
    for kind in kinds.KINDS:
        await _erase(context, kind, keep_seconds=0)
    await trio.to_thread.run_sync(_remove_copies, context.settings.lancedb_directory, context.settings.engine_directory)
    await _drop_vectors(context, unused_since_milliseconds=None)
    await context.database.awrite(lambda tx: _scrub(tx, keys, text))
    await trio.to_thread.run_sync(context.database.vacuum, limiter=context.database.limiter)
    await context.vectors.cache.vacuum()
    return before - await _size(context)


async def erase_due(context: Context) -> bool:
    """Erase each table with writes that were not erased for ``lancedb.erase_after_hours``, and then the unused vectors.

    Returns whether a table was erased. Its older versions go with the next compaction after
    ``lancedb.keep_versions_seconds``.
    """
    hours = context.settings.lancedb.erase_after_hours
    if not hours:
        return False
    now, erased = now_milliseconds(), False
    for kind in context.index.open_kinds():
        try:
            erased |= await _erase_if_due(
                context, kind, now_milliseconds=now, after_milliseconds=int(hours * HOUR_MILLISECONDS)
            )
        except Transient as error:
            context.starved(error)
            logger.info("table_erase_failed kind={} error={!r}", kind, str(error))
    if erased:
        await _drop_vectors(context, unused_since_milliseconds=now - int(hours * HOUR_MILLISECONDS))
    return erased


async def _erase(context: Context, kind: str, *, keep_seconds: float) -> int:
    """Erase one table, and record its new version if the recorded one was the last.

    Otherwise the next commit compares them.
    """
    async with context.table(kind):
        known = (await context.database.aread(ledger.incarnations)).get(kind)
        ours = known is not None and await context.index.recognise(kind, known.version) is not None
        await context.index.erase(kind, keep_seconds=keep_seconds)
        newest = await context.index.newest(kind)
        if known is not None and ours and newest is not None:
            await context.database.awrite(lambda tx: ledger.moved_on(tx, kind, known.incarnation, version=newest))
        return 0 if newest is None else newest.number


async def _erase_if_due(context: Context, kind: str, *, now_milliseconds: int, after_milliseconds: int) -> bool:
    """Erase a table if its version changed long enough ago since the recorded one. Returns whether it was erased."""
    newest = await context.index.newest(kind)
    version = 0 if newest is None else newest.number
    known = await context.database.aread(lambda tx: meta.get(tx, MARK + kind))
    at, since = json.loads(known) if known else (0, now_milliseconds)
    if due := bool(known) and version != at and not 0 <= now_milliseconds - since < after_milliseconds:
        await expect_root(context)
        at, since = (
            await _erase(context, kind, keep_seconds=context.settings.lancedb.keep_versions_seconds),
            now_milliseconds,
        )
        logger.info("table_erased kind={} version={}", kind, at)
    mark = json.dumps([at, since])
    if mark != known:
        await context.database.awrite(lambda tx: meta.put(tx, MARK + kind, mark))
    return due


async def _holding(context: Context, keys: Sequence[str], text: str | None) -> list[str]:
    """Return the files that still hold what is to be forgotten."""
    root = context.settings.root
    if text is None:
        return [key for key in keys if os.path.lexists(files.path_of(root, key))]
    paths = await context.database.aread(lambda tx: [str(path) for (path,) in tx.execute(EVERY_PATH)])
    found = set(await trio.to_thread.run_sync(_files_with, root, paths, text))
    for kind in kinds.KINDS:
        names = [*lance.KEY_COLUMNS, *kinds.KINDS[kind].text_columns]
        await context.index.visit(kind, names, lambda rows: found.update(_rows_with(rows, text)))
    return sorted(found)


def _rows_with(rows: Sequence[Mapping[str, object]], text: str) -> list[str]:
    return [
        str(row["md_path"]) for row in rows if any(isinstance(value, str) and text in value for value in row.values())
    ]


def _add_hashes(live: set[bytes], kind: Kind, rows: Sequence[Mapping[str, object]]) -> None:
    live.update(embeddings.text_hash(embed_text(kind, row)) for row in rows)


def _files_with(root: Path, paths: Sequence[str], text: str) -> list[str]:
    """Return the files that hold a text, in their bytes or in their names."""
    needle, found = text.encode("utf-8", "surrogateescape"), []
    for path in paths:
        with suppress(OSError), open(files.path_of(root, path), "rb") as file:
            if text in path or needle in file.read():
                found.append(path)
    return found


async def _drop_vectors(context: Context, *, unused_since_milliseconds: int | None) -> None:
    """Drop the cached vectors of texts that no row holds and that were not used for a moment."""
    live: set[bytes] = set()
    for kind, known in kinds.KINDS.items():
        await context.index.visit(kind, known.embed_columns, partial(_add_hashes, live, known))
    dropped = await context.vectors.cache.use(
        lambda tx: embeddings.keep_only(tx, live, unused_since_milliseconds=unused_since_milliseconds), otherwise=0
    )
    if dropped:
        logger.info("embedding_cache_erased dropped={}", dropped)


def _remove_copies(lancedb: Path, engine: Path) -> None:
    """Remove the copies of damaged stores that were set aside."""
    for place in (lancedb, engine):
        for path in place.iterdir() if place.is_dir() else ():
            if path.name == SET_ASIDE or ".damaged" in path.name:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _scrub(tx: Transaction, keys: Sequence[str], text: str | None) -> None:
    """Remove paths and a text from every table of the queue's database."""
    tables = [str(name) for (name,) in tx.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'")]
    for table in tables:
        columns = [
            (str(column[1]), bool(column[5]))
            for column in tx.execute(f'PRAGMA main.table_info("{table}")')
            if column[2] == "TEXT"
        ]
        names = {name for name, _ in columns}
        for key in keys if "md_path" in names else ():
            _done(tx, f'DELETE FROM main."{table}" WHERE md_path = ?', key)
        needles = [*keys, *([] if text is None else [text])]
        for name, is_key in columns:
            for needle in needles if not is_key else ():
                _done(
                    tx,
                    f'UPDATE main."{table}" SET "{name}" = replace("{name}", ?1, \'{FORGOTTEN}\') WHERE instr("{name}", ?1)',
                    needle,
                )
            if is_key and text is not None:
                _done(tx, f'DELETE FROM main."{table}" WHERE instr("{name}", ?)', text)


def _done(tx: Transaction, statement: str, value: str) -> None:
    for _ in tx.execute(statement, (value,)):
        pass


async def _size(context: Context) -> int:
    index = context.settings.engine_directory.parent

    def count() -> int:
        return sum(path.lstat().st_size for path in index.rglob("*") if path.is_file())

    return cast("int", await trio.to_thread.run_sync(count))
