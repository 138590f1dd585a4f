"""The door to SQLite: whatever it raises comes out as one of our families, and a damaged file is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from everos_engine.errors import Damaged, DiskFull, EngineError, Transient, Unexpected
from everos_engine.stores import database as door
from everos_engine.stores import queue
from everos_engine.stores.database import Database, Transaction, open_or_replace

DAMAGE = {apsw.CorruptError, apsw.NotADBError}


class NewInSqlite(apsw.Error):
    """A type that a later version of the library may add."""


def kinds_of(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds_of(kind)


@pytest.mark.parametrize("when", ["write", "read", "rollback"])
@pytest.mark.parametrize("kind", sorted(kinds_of(apsw.Error), key=lambda kind: kind.__name__))
def test_whatever_sqlite_raises_is_translated_and_the_next_transaction_works(
    kind: type[Exception], when: str, tmp_path: Path
) -> None:
    database = Database(tmp_path / "engine.db", schema=queue.SCHEMA)

    def fail(tx: Transaction) -> None:
        if when == "rollback":
            list(tx.execute("ROLLBACK"))  # as SQLite does by itself for some errors
        raise kind(f"the trap: {kind.__name__}")

    with pytest.raises(EngineError) as raised:
        (database.read if when == "read" else database.write)(fail)
    assert isinstance(raised.value.__cause__, kind)
    assert isinstance(raised.value, Damaged) == (kind in DAMAGE)
    if kind in {apsw.Error, NewInSqlite}:
        assert isinstance(raised.value, Unexpected)
    if isinstance(raised.value, Transient):
        assert not raised.value.counts_as_retry, "no single change is to blame for the database"
    assert database.write(lambda tx: queue.take(tx, "lsn", 1)) == 1
    database.close()


@pytest.mark.parametrize("kind", [apsw.FullError, apsw.IOError, apsw.CantOpenError])
def test_a_disk_without_room_is_named_and_never_called_damaged(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "engine.db", schema=queue.SCHEMA)
    monkeypatch.setattr(door, "LITTLE_BYTES", 1 << 62)  # more than any disk has left

    def fail(_tx: Transaction) -> None:
        raise kind

    with pytest.raises(DiskFull, match="make room"):
        database.write(fail)
    assert not (tmp_path / "engine.db.suspect").exists()


def test_a_lock_that_another_process_keeps_is_named(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    database = Database(path, schema=queue.SCHEMA)
    database.read(lambda tx: door.drain(tx.execute("PRAGMA busy_timeout=1")))
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Transient, match="stayed locked"):
        database.write(lambda tx: queue.take(tx, "lsn", 1))
    other.execute("ROLLBACK")
    assert database.write(lambda tx: queue.take(tx, "lsn", 1)) == 1
    other.close()


def filled(path: Path) -> Database:
    database = Database(path, schema=queue.SCHEMA)
    seen = [queue.Observation(f"{number:05}.md", "note", (1, 1, 1, 1)) for number in range(2000)]
    database.write(lambda tx: queue.record(tx, seen, source="scan", now_milliseconds=1))
    database.checkpoint()
    return database


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "zeroed":
        content[:] = bytes(len(content))
    elif how == "garbage":
        content[:] = b"not a database at all" * 100
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    elif how == "inner pages":
        content[4096 : 4096 * 8] = b"\xa5" * (4096 * 7)
    path.write_bytes(content)


HOWS = ["zeroed", "garbage", "truncated", "emptied", "inner pages"]


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_database_is_set_aside_at_the_start_and_its_newest_copy_kept(how: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    for _ in range(2):
        filled(path).close()
        damage(path, how)
        found = open_or_replace(path, lambda: Database(path, schema=queue.SCHEMA))
        assert found.problems(thorough=True) == []
        assert found.read(queue.newest) == 0
        found.close()
        assert (found.replaced is None) == (how == "emptied")
    kept = {one.name for one in tmp_path.iterdir() if one.name.startswith("engine.db.")}
    assert kept - {"engine.db.damaged-wal"} == (set() if how == "emptied" else {"engine.db.damaged"})


@pytest.mark.parametrize("how", HOWS)
def test_damage_done_under_an_open_database_is_proven_by_a_statement_and_replaced(how: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    database = filled(path)
    database.read(lambda tx: door.drain(tx.execute("PRAGMA shrink_memory")))
    damage(path, how)
    with pytest.raises(Damaged, match=r"`everos-engine run`"):
        database.write(lambda tx: queue.requeue_kind(tx, "note", now_milliseconds=2))
    database.close()
    found = open_or_replace(path, lambda: Database(path, schema=queue.SCHEMA))
    assert found.problems(thorough=True) == []
    found.close()
    assert found.replaced is not None or path.stat().st_size


def test_an_index_that_contradicts_its_table_is_found_by_the_check_of_a_suspect(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    database = filled(path)
    ((page,),) = database.read(
        lambda tx: list(tx.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'change_ready'"))
    )
    database.close()
    content = bytearray(path.read_bytes())
    assert isinstance(page, int)
    start = (page - 1) * 4096
    empty_leaf = bytes([10, 0, 0, 0, 0, 0x10, 0, 0])  # a well-formed index page without a row
    content[start : start + 4096] = empty_leaf + bytes(4096 - len(empty_leaf))
    path.write_bytes(content)
    door.suspect(path)
    found = open_or_replace(path, lambda: Database(path, schema=queue.SCHEMA))
    found.close()
    assert found.replaced is not None


def test_a_sound_database_under_suspicion_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    filled(path).close()
    door.suspect(path)
    found = open_or_replace(path, lambda: Database(path, schema=queue.SCHEMA))
    assert found.replaced is None
    assert found.read(queue.newest) == 2000
    assert [one.name for one in tmp_path.iterdir() if "suspect" in one.name or "damaged" in one.name] == []
    found.close()


def test_a_connection_notices_that_its_file_was_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    database = filled(path)
    assert not database.is_replaced()
    door.set_aside(path)
    assert database.is_replaced()
    filled(path).close()
    assert database.is_replaced()
    database.close()


def test_a_reader_names_the_damage_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(Damaged, match=r"is damaged .* sets it aside"):
        Database(path, readonly=True)
