"""Tables and ledger agree whatever happens to the tables: lost, replaced, written by others, and while SQLite fails."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import lancedb
import pytest
import trio
from loguru import logger

from derived import described, indexed
from everos_engine.engine import Engine, open_engine
from everos_engine.errors import Transient
from everos_engine.loops import recovery
from everos_engine.settings import Settings
from everos_engine.stores import ledger, meta
from everos_engine.stores.lance import TableDamaged
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from test_damaged_index import garble_data, quiet, remove_indexes
from writer import fact, facts, put

FILES = 5
KIND = "atomic_fact"


def write_files(root: Path) -> None:
    for number in range(FILES):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))


def table_of(settings: Settings) -> Path:
    return settings.lancedb_directory / f"{KIND}.lance"


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[Engine]:
    """An engine without the scan loop's own looks, in step."""
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
            await engine.settle()
            yield engine


async def in_step(engine: Engine, *, rows: int = FILES) -> None:
    """The index is the tree, each row once, and every file is found by a word of its own."""
    assert await indexed(engine) == described(engine.settings)
    for number in range(rows):
        assert len(await engine.search(f"word{number}")) == 1, number
    counts = (await engine.status()).counts
    assert counts.pending == counts.processing == counts.failed_retryable == counts.failed_permanent == 0


# Versions that are not our own


async def _open(settings: Settings) -> tuple[lancedb.AsyncConnection, lancedb.AsyncTable]:
    connection = await lancedb.connect_async(str(settings.lancedb_directory))
    return connection, await connection.open_table(KIND)


async def _delete_one(table: lancedb.AsyncTable) -> None:
    await table.delete("md_path = 'users/u1/.atomic_facts/3.md'")


async def _add_one_of_no_file(table: lancedb.AsyncTable) -> None:
    batch = (await table.query().limit(1).to_arrow()).to_pylist()
    await table.add([{**batch[0], "md_path": "users/u1/.atomic_facts/none.md"}])


async def _add_one_of_no_kind(table: lancedb.AsyncTable) -> None:
    batch = (await table.query().limit(1).to_arrow()).to_pylist()
    await table.add([{**batch[0], "md_path": "elsewhere", "content_hash": "no hash"}])


async def _duplicate_all(table: lancedb.AsyncTable) -> None:
    await table.add((await table.query().to_arrow()).to_pylist())


async def _alter_one(table: lancedb.AsyncTable) -> None:
    await table.update({"fact": "'something else'", "content_hash": "'00'"}, where="md_path LIKE '%/2.md'")


async def _alter_one_but_not_its_hash(table: lancedb.AsyncTable) -> None:
    await table.update({"fact": "'something else'"}, where="md_path LIKE '%/2.md'")


async def _delete_all(table: lancedb.AsyncTable) -> None:
    await table.delete("true")


FOREIGN = [
    _delete_one,
    _add_one_of_no_file,
    _add_one_of_no_kind,
    _duplicate_all,
    _alter_one,
    _alter_one_but_not_its_hash,
    _delete_all,
]


def _foreign(settings: Settings, change: Callable[[lancedb.AsyncTable], Awaitable[None]]) -> None:
    """Commit to the table behind the engine's back, from an asyncio loop of its own."""
    import asyncio

    async def commit() -> None:
        connection, table = await _open(settings)
        await change(table)
        table.close()
        connection.close()

    asyncio.run(commit())


@pytest.mark.parametrize("change", FOREIGN)
@pytest.mark.parametrize("noticed_by", ["settle", "commit", "sync path", "restart"])
async def test_a_commit_of_somebody_else_is_found_and_undone(
    change: Callable[[lancedb.AsyncTable], Awaitable[None]], noticed_by: str, root: Path
) -> None:
    write_files(root)
    settings = quiet(root)
    async with served(settings) as engine:
        await trio.to_thread.run_sync(_foreign, settings, change)
        if noticed_by == "settle":
            await engine.settle()
            await in_step(engine)
        elif noticed_by == "sync path":
            await engine.sync(["users/u1/.atomic_facts/0.md"])
            await engine.settle()
            await in_step(engine)
        elif noticed_by == "commit":
            put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
            await engine.settle()
            await in_step(engine)
    if noticed_by == "restart":
        async with served(settings) as engine:
            await in_step(engine)


async def test_a_commit_of_somebody_else_between_two_of_ours_is_found_by_the_commit_itself(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    async with served(settings) as engine:
        await trio.to_thread.run_sync(_foreign, settings, _delete_one)
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
        await engine.sync(["users/u1/.atomic_facts/0.md"])
        await engine.settle()
        await in_step(engine)


async def test_a_backup_that_went_another_way_to_the_same_version_is_not_taken_for_ours(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    async with served(settings):
        pass
    kept = root / "backup"
    shutil.copytree(table_of(settings), kept)
    put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
    async with served(settings) as engine:
        ours = await engine.context.index.newest(KIND)
    shutil.rmtree(table_of(settings))
    kept.rename(table_of(settings))
    await trio.to_thread.run_sync(_foreign, settings, _delete_one)
    async with served(settings) as engine:
        theirs = await engine.context.index.newest(KIND)
        assert ours is not None
        assert theirs is not None
        await in_step(engine)


async def test_a_compaction_by_somebody_else_changes_no_row_and_queues_nothing(root: Path) -> None:
    async def optimize(table: lancedb.AsyncTable) -> None:
        await table.optimize()

    write_files(root)
    settings = quiet(root)
    async with served(settings) as engine:
        for number in range(FILES):
            await engine.sync([f"users/u1/.atomic_facts/{number}.md"])
        before = await engine.context.index.newest(KIND)
        await trio.to_thread.run_sync(_foreign, settings, optimize)
        after = await engine.context.index.newest(KIND)
        assert after is not None
        assert before is not None
        assert after.number > before.number
        messages: list[str] = []
        sink = logger.add(messages.append, format="{message}")
        await engine.settle()
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
        await engine.settle()
        logger.remove(sink)
        assert not [text for text in messages if "index_reconciled" in text]
        await in_step(engine)


async def test_our_own_compactions_and_commits_are_recognised(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    settings = replace(settings, lancedb=replace(settings.lancedb, optimize_after_commits=1))
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    async with served(settings) as engine:
        for acquire in range(4):
            put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, f"word0 edited {acquire}")))
            await engine.settle()
            await engine.compact()
            newest = await engine.context.index.newest(KIND)
            known = (await engine.context.database.aread(ledger.incarnations))[KIND]
            assert known.version == newest
    async with served(settings) as engine:
        await in_step(engine)
    logger.remove(sink)
    assert not [text for text in messages if "index_reconciled" in text]


async def test_sync_of_a_path_writes_its_rows_again_even_if_the_ledger_has_them(root: Path) -> None:
    write_files(root)
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        await engine.settle()
        await trio.to_thread.run_sync(_foreign, settings, _delete_one)
        # as if an engine of long ago had taken the foreign version for its own
        newest = await engine.context.index.newest(KIND)
        assert newest is not None
        known = (await engine.context.database.aread(ledger.incarnations))[KIND]
        await engine.context.database.awrite(
            lambda tx: ledger.remember(tx, KIND, known.incarnation, version=newest, model=known.model)
        )
        engine.context.index.reopen(KIND)
        await engine.settle()
        assert len(await engine.search("word3")) == 0
        texts = sum(len(call) for call in fake.calls)
        await engine.sync(["users/u1/.atomic_facts/3.md"])
        await in_step(engine)
        assert sum(len(call) for call in fake.calls) == texts


# Birth and loss of a table, while SQLite fails


async def _with_failing_write(engine: Engine, at: int, then: Callable[[], Awaitable[object]]) -> bool:
    """Whether there was an n-th transaction of SQLite to fail; what fails is tried again by the engine or by another call."""
    database, count = engine.context.database, 0
    inner = database.write

    def write(work: Callable[..., object]) -> object:
        nonlocal count
        count += 1
        if count == at:
            message = "the disk is full"
            raise Transient(message, counts_as_retry=False)
        return inner(work)

    database.write = write  # type: ignore[method-assign,assignment]
    try:
        for _ in range(3):
            try:
                await then()
            except Transient:
                continue
            break
    finally:
        database.write = inner  # type: ignore[method-assign]
    return count >= at


def _lose(settings: Settings) -> None:
    shutil.rmtree(table_of(settings))


def _lose_all(settings: Settings) -> None:
    shutil.rmtree(settings.lancedb_directory)


def _damage(settings: Settings) -> None:
    garble_data(table_of(settings))


def _nothing(_settings: Settings) -> None:
    """The table is to be born."""


@pytest.mark.parametrize("happens", [_nothing, _lose, _lose_all, _damage])
async def test_a_table_is_born_or_made_again_although_a_transaction_fails(
    happens: Callable[[Settings], None], root: Path, tmp_path: Path
) -> None:
    at, failed = 1, True
    while failed and at < 40:
        place = tmp_path / f"root{at}"
        place.mkdir()
        settings = quiet(place)
        with trio.fail_after(HANG_SECONDS):
            async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
                if happens is not _nothing:
                    write_files(place)
                    await engine.settle()
                    happens(settings)
                    engine.context.index.rotate()
                    put(place, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
                else:
                    write_files(place)
                failed = await _with_failing_write(engine, at, engine.settle)
                await engine.settle()
                await in_step(engine)
        at += 1
    assert at > 3


async def test_the_tables_folder_removed_under_a_running_engine_costs_no_attempt(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    async with served(settings) as engine:
        shutil.rmtree(settings.lancedb_directory)
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
        await engine.sync(["users/u1/.atomic_facts/0.md"])
        retries = await engine.context.database.aread(
            lambda tx: max(int(str(row[0])) for row in tx.execute("SELECT retry_count FROM md_change_state"))
        )
        assert retries == 0
        await engine.settle()
        await in_step(engine)
    logger.remove(sink)
    assert "restart" not in "".join(messages)


async def test_a_search_after_the_table_was_lost_waits_for_no_restart(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    async with served(settings) as engine:
        remove_indexes(table_of(settings))
        engine.context.index.rotate()
        await engine.search("word3")
        await engine.settle()
        await in_step(engine)


# At most once an hour by itself


async def test_a_table_damaged_twice_within_an_hour_becomes_a_condition(root: Path) -> None:
    write_files(root)
    put(root, "users/u1/user.md", "---\ntype: user_profile\nuser_id: u1\nsummary: heron\n---\n")
    settings = quiet(root)
    async with served(settings) as engine:
        _damage(settings)
        engine.context.index.rotate()
        await engine.search("word3")
        await engine.settle()
        await in_step(engine)
        kept = settings.lancedb_directory.parent / "set-aside" / f"{KIND}.lance"
        assert kept.is_dir()
        _damage(settings)
        engine.context.index.rotate()
        assert len(await engine.search("heron")) == 1, "the other kinds are searched"
        assert "index_damaged" in engine.context.conditions.now
        with pytest.raises(TableDamaged):
            await engine.settle()
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
        with pytest.raises(TableDamaged):
            await engine.settle()
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        assert "index_damaged" in engine.context.conditions.now
        assert len(await engine.search("heron")) == 1
        long_ago = "1"
        await engine.context.database.awrite(lambda tx: meta.put(tx, recovery.REBUILT + KIND, long_ago))
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        await in_step(engine)
        assert "index_damaged" not in engine.context.conditions.now


# A deadline proves nothing


async def test_reads_slower_than_their_deadline_do_not_cost_the_table(root: Path) -> None:
    write_files(root)
    settings = quiet(root)
    async with served(settings) as engine:
        incarnation = engine.context.index.incarnation_of(KIND)
    slow = replace(settings, lancedb=replace(settings.lancedb, read_deadline_seconds=1e-9, write_deadline_seconds=1e-9))
    async with open_engine(slow, embedder=FakeEmbedder(), watching=False) as engine:
        with pytest.raises(Transient):
            await engine.settle()
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "word0 edited")))
        with pytest.raises(Transient):
            await engine.settle()
    async with served(settings) as engine:
        assert engine.context.index.incarnation_of(KIND) == incarnation
        await in_step(engine)


# One file's rows that LanceDB cannot take


class _Choosy:
    """The bridge to a LanceDB that raises an error of its own, which nobody has heard of, for rows of some paths."""

    def __init__(self, inner: object, refuses: str) -> None:
        self.inner, self.refuses = inner, refuses

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def write(self, function: Callable[..., Awaitable[object]], *args: object, deadline_seconds: float) -> object:
        for argument in args:
            for batch in argument if isinstance(argument, list) else []:
                if hasattr(batch, "column") and self.refuses in batch.column("md_path").to_pylist():
                    message = "lance error: some day this works"
                    raise RuntimeError(message)
        return await self.inner.write(function, *args, deadline_seconds=deadline_seconds)  # type: ignore[attr-defined]


async def test_rows_that_lancedb_cannot_take_hold_up_no_neighbour(root: Path) -> None:
    write_files(root)
    settings = replace(quiet(root), worker_max_retry=2)
    refused = "users/u1/.atomic_facts/2.md"
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        index = engine.context.index
        inner = index.bridge
        index.bridge = _Choosy(inner, refused)  # type: ignore[assignment]
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        assert len(await indexed(engine)) == FILES - 1
        assert (await engine.status()).counts.failed_retryable == 1
        assert not (settings.lancedb_directory.parent / "set-aside").exists(), "the table is sound"
        index.bridge = inner
        await engine.fix()
        await in_step(engine)
