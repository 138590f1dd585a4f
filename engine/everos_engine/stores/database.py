"""The one door to SQLite: a connection, a thread at a time, and whole transactions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast
from urllib.parse import quote

import apsw

from everos_engine.errors import FULL, Exhausted, Fatal, Transient

if TYPE_CHECKING:
    import trio

T = TypeVar("T")
Value = str | int | float | bytes | None
BUSY_RETRIES = 40
BUSY_TIMEOUT_MILLISECONDS = 250


class Locked(Transient):
    """Another process holds the lock on the database for longer than the retries last."""


class Transaction(Protocol):
    """What the queries of this room need of a connection inside one transaction."""

    def execute(self, statements: str, bindings: Sequence[Value] | None = None) -> Iterable[tuple[Value, ...]]:
        """Run SQL; iterate to the end to have it done."""

    def executemany(self, statements: str, bindings: Iterable[Sequence[Value]]) -> Iterable[tuple[Value, ...]]:
        """Run SQL once per bindings."""


class Database:
    """One SQLite file in WAL mode; every call is one whole transaction.

    ``BEGIN IMMEDIATE`` and ``COMMIT`` are executed as statements: entered as a context manager, an apsw connection
    holds the GIL through both, and a lock of another process would freeze the event loop.
    ``readonly`` needs no more than the permission to read. Raises Fatal where the file is damaged, or permission is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: str = "",
        version: int = 0,
        upgrades: Mapping[int, str] | None = None,
        may_replace: bool = False,
        readonly: bool = False,
        cache_kibibytes: int = 0,
    ) -> None:
        flags = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        self.path = path
        self._limiter: trio.CapacityLimiter | None = None
        try:
            if readonly and _is_still(path):
                where = f"file:{quote(os.fsencode(path))}?immutable=1"
                self._connection = apsw.Connection(where, flags=flags | apsw.SQLITE_OPEN_URI)
            else:
                self._connection = apsw.Connection(str(path), flags=flags)
            self._connection.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
            if not readonly:
                self._retried(lambda: self._run("PRAGMA journal_mode=WAL"))
                self._run("PRAGMA synchronous=NORMAL")
                self._run("PRAGMA journal_size_limit=8388608")
            if cache_kibibytes:
                self._run(f"PRAGMA cache_size=-{cache_kibibytes}")
            self._run("PRAGMA temp_store=MEMORY")
            if schema:
                self._lay(schema, version, upgrades or {}, may_replace=may_replace)
        except apsw.CantOpenError as error:
            if path.exists() and not os.access(path, os.R_OK):
                raise Fatal(_forbidden(path)) from error
            if not _none_left():
                raise
            message = f"{path}: {error}: no file descriptor is left"
            raise Exhausted(message) from error
        except (apsw.ReadOnlyError, apsw.PermissionsError) as error:
            raise Fatal(_forbidden(path)) from error
        except (apsw.NotADBError, apsw.CorruptError) as error:
            message = f"{path} is damaged ({error}): stop the engine, remove it with its -wal and -shm, and start again: it is made again from markdown"
            raise Fatal(message) from error

    def _lay(self, schema: str, version: int, upgrades: Mapping[int, str], *, may_replace: bool) -> None:
        """Create the schema, and bring a database of an older version to this one.

        ``upgrades`` maps a version to the SQL that leads to it from the version before. New tables and indexes come with
        ``schema``, so an upgrade only changes what is there. A database that no chain of upgrades leads from is emptied,
        because all in it can be made again from markdown. Raises Fatal for one of a newer engine.
        """

        def lay(tx: Transaction) -> None:
            ((found,),) = cast("Iterable[tuple[int]]", tx.execute("PRAGMA user_version"))
            tables = [str(name) for (name,) in tx.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            if tables and found > version:
                message = (
                    f"{self.path} has version {found}, and this engine knows versions up to {version}: "
                    "a newer everos-engine made it, install that version again"
                )
                raise Fatal(message)
            if tables and found < version:
                if not may_replace:
                    message = f"{self.path} was made by an older version of the engine: restart the engine, it upgrades the file by itself"
                    raise Fatal(message)
                steps = range(found + 1, version + 1)
                if all(step in upgrades for step in steps):
                    for step in steps:
                        _drain(tx.execute(upgrades[step]))
                else:
                    for name in tables:
                        _drain(tx.execute(f'DROP TABLE IF EXISTS "{name}"'))
            _drain(tx.execute(schema))
            _drain(tx.execute(f"PRAGMA user_version = {version}"))

        self.write(lay)

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` between ``BEGIN IMMEDIATE`` and ``COMMIT``; rolled back if it raises.

        Raises Locked when another process holds the lock for longer than the retries last, and Transient when the disk is full.
        """

        def attempt() -> T:
            self._run("BEGIN IMMEDIATE")
            try:
                result = work(self._connection)
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    with suppress(apsw.Error):
                        self._run("ROLLBACK")
                raise
            return result

        return self._retried(attempt)

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` on one consistent snapshot."""

        def attempt() -> T:
            self._run("BEGIN")
            try:
                return work(self._connection)
            finally:
                self._run("COMMIT")

        return self._retried(attempt)

    @property
    def limiter(self) -> trio.CapacityLimiter:
        """One thread at a time: whoever uses the connection off the event loop holds this."""
        import trio  # noqa: PLC0415 - `status` needs no event loop, and answers in half the time without

        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(1)
        return self._limiter

    async def _in_thread(self, work: Callable[[], T]) -> T:
        import trio

        return await trio.to_thread.run_sync(work, limiter=self.limiter)

    async def awrite(self, work: Callable[[Transaction], T]) -> T:
        """``write`` off the event loop; once begun it is not cancelled."""
        return await self._in_thread(lambda: self.write(work))

    async def aread(self, work: Callable[[Transaction], T]) -> T:
        """``read`` off the event loop."""
        return await self._in_thread(lambda: self.read(work))

    async def data_version(self) -> int:
        """A number that moves when another connection has committed."""

        def ask() -> int:
            return int(next(iter(self._connection.execute("PRAGMA data_version")))[0])

        return await self._in_thread(ask)

    def checkpoint(self) -> None:
        """Move the WAL into the database file, as far as readers allow."""
        with suppress(apsw.BusyError, apsw.LockedError):
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self._connection.close()

    def _run(self, sql: str) -> None:
        _drain(self._connection.execute(sql))

    def _retried(self, attempt: Callable[[], T]) -> T:
        for tries_left in range(BUSY_RETRIES, -1, -1):
            try:
                return attempt()
            except (apsw.BusyError, apsw.LockedError) as error:
                if not tries_left:
                    message = f"{self.path} stayed locked by another process"
                    raise Locked(message) from error
                time.sleep(0.005)
            except (apsw.ReadOnlyError, apsw.PermissionsError) as error:
                raise Fatal(_forbidden(self.path)) from error
            except (apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.NoMemError) as error:
                if self._connection.system_errno in FULL or _none_left():
                    message = f"{self.path}: {error}: no file descriptor is left"
                    raise Exhausted(message) from error
                message = f"{self.path}: {error}: free disk space, or check the disk"
                raise Transient(message) from error
        raise AssertionError


def _drain(rows: Iterable[object]) -> None:
    for _ in rows:
        pass


def _none_left() -> bool:
    """SQLite says only that it cannot open: ask the system itself."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in FULL
    return False


def _is_still(path: Path) -> bool:
    """Whether nobody can be writing a database of which we may not make the shared memory that a reader needs."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return False
    try:
        return os.stat(f"{path}-wal").st_size == 0
    except FileNotFoundError:
        return True


def _forbidden(path: Path) -> str:
    return f"{path} may not be read and written by this user, or lies on a read-only file system: run the command as the user the engine runs as"
