"""The one door to SQLite: a connection, one thread at a time, and whole transactions."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast
from urllib.parse import quote

import apsw
from loguru import logger

from everos_engine.errors import FULL, NO_ROOM, Damaged, DiskFull, EngineError, Exhausted, Fatal, Transient, Unexpected

if TYPE_CHECKING:
    import trio

T = TypeVar("T")
Value = str | int | float | bytes | None
BUSY_RETRIES = 40
BUSY_TIMEOUT_MILLISECONDS = 250
SHARED_MEMORY_BYTES = 32_768
"""The minimum that a reader of a WAL database maps. A smaller file could not be made."""
IN_MEMORY = ":memory:"
"""SQLite's name for a database without a file."""
ASIDE = ".damaged"
"""The ending of the name of a file that was set aside."""
REMEDY = "`everos-engine run` or `everos-engine sync` sets it aside and makes it again from markdown"
FILES = ("", "-wal", "-shm")
"""The endings of the names of a database's files."""
MAX_CHECKED_BYTES = 64 << 20
"""A larger database is checked at the start only if it is suspected, because the check would take longer than a
second."""


class Locked(Transient):
    """Another process holds the lock on the database for longer than the retries last."""

    def __init__(self, message: str) -> None:
        super().__init__(message, counts_as_retry=False)


def drain(rows: Iterable[object]) -> None:
    """Run a statement to its end, and drop its rows."""
    for _ in rows:
        pass


class Transaction(Protocol):
    """What the queries of this package need of a connection inside one transaction."""

    def execute(self, statements: str, bindings: Sequence[Value] | None = None) -> Iterable[tuple[Value, ...]]:
        """Run SQL. Iterate to the end to have it done."""

    def executemany(self, statements: str, bindings: Iterable[Sequence[Value]]) -> Iterable[tuple[Value, ...]]:
        """Run SQL once for each of the bindings."""


class Database:
    """One SQLite file in WAL mode. Every call is one whole transaction.

    ``replaced`` is what was wrong with the file that was set aside when this one was made, or None. ``damage`` is set
    by the first statement that finds damage, and ``on_damage`` is called then, in that statement's thread.

    ``BEGIN IMMEDIATE`` and ``COMMIT`` are executed as statements. Entered as a context manager, an apsw connection
    holds the GIL through both, and a lock of another process would freeze the event loop. ``readonly`` needs only the
    permission to read. Everything that SQLite raises leaves here as one of our families: Damaged if the file does not
    hold what SQLite wrote, Fatal if permission is missing, DiskFull, Exhausted, or Transient.
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
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        self.path = path
        self.replaced: str | None = None
        self.damage: Damaged | None = None
        self.on_damage: Callable[[], None] | None = None
        self._limiter: trio.CapacityLimiter | None = None
        self._sweeping: trio.Lock | None = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        odd = [f"{path}{end}" for end in FILES if _is_no_file(f"{path}{end}")]
        if odd:  # to open a pipe could take for ever
            raise Damaged(f"{path} is damaged ({odd[0]} is not a file): {REMEDY}")
        try:
            if readonly:
                self._connection = self._opened_to_read()
            else:
                if str(path) != IN_MEMORY:
                    _create_private(path)
                self._connection = apsw.Connection(_as_text(path), flags=flags)
            self._connection.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
            if not readonly:
                self._retried(lambda: self._run("PRAGMA journal_mode=WAL"))
                self._run("PRAGMA synchronous=NORMAL")
                self._run(
                    "PRAGMA secure_delete=ON"
                )  # what is deleted is overwritten: a private text must not outlive its file
                self._run("PRAGMA journal_size_limit=8388608")
            if cache_kibibytes:
                self._run(f"PRAGMA cache_size=-{cache_kibibytes}")
            self._run("PRAGMA temp_store=MEMORY")
            if schema:
                self._lay(schema, version, upgrades or {}, may_replace=may_replace)
            self._inode = _inode_of(path)
        except apsw.Error as error:
            raise self._translated(error) from error

    def _opened_to_read(self) -> apsw.Connection:
        """Open the file to read it, even on a full or read-only disk.

        The shared memory that readers need cannot be made there. It is there while any process has the database open.
        Without it, either no process writes the file, or a dead process left commits next to it. Then a copy is read.
        """
        path = self.path
        if not (_needs_copy(path) or _is_still(path)):
            connection = apsw.Connection(_as_text(path), flags=apsw.SQLITE_OPEN_READONLY)
            try:
                connection.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
                drain(connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1"))
            except (*_IO, apsw.FullError):
                connection.close()
                if _has_shared_memory(path) or _none_left():
                    raise
            else:
                return connection
        if _has_log(path):
            self._copy = _copied(path)
            return apsw.Connection(os.path.join(self._copy.name, path.name))
        where = f"file:{quote(os.fsencode(path))}?immutable=1"
        return apsw.Connection(where, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)

    def _lay(self, schema: str, version: int, upgrades: Mapping[int, str], *, may_replace: bool) -> None:
        """Create the schema, and upgrade a database of an older version to this one.

        ``upgrades`` maps a version to the SQL that leads to it from the version before. New tables and indexes come
        with ``schema``, so an upgrade only changes what is there. A database without a chain of upgrades is emptied,
        because everything in it can be made again from markdown. Raises Fatal for one of a newer engine.
        """

        def lay(tx: Transaction) -> None:
            ((found,),) = cast("Iterable[tuple[int]]", tx.execute("PRAGMA user_version"))
            tables = [str(name) for (name,) in tx.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            if tables and found > version:
                raise Fatal(
                    f"{self.path} has version {found}, and this engine knows versions up to {version}: "
                    "a newer everos-engine made it, install that version again"
                )
            if tables and found < version:
                if not may_replace:
                    raise Fatal(
                        f"{self.path} was made by an older version of the engine: restart the engine, it upgrades the file by itself"
                    )
                steps = range(found + 1, version + 1)
                if all(step in upgrades for step in steps):
                    for step in steps:
                        drain(tx.execute(upgrades[step]))
                else:
                    for name in tables:
                        drain(tx.execute(f'DROP TABLE IF EXISTS "{name}"'))
            drain(tx.execute(schema))
            drain(tx.execute(f"PRAGMA user_version = {version}"))

        self.write(lay)

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` between ``BEGIN IMMEDIATE`` and ``COMMIT``. It is rolled back if it raises.

        Raises Locked if another process holds the lock for longer than the retries last, DiskFull if there is no room.
        """
        return self._retried(lambda: self._transaction("BEGIN IMMEDIATE", work))

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` on one consistent snapshot."""
        return self._retried(lambda: self._transaction("BEGIN", work))

    def _transaction(self, begin: str, work: Callable[[Transaction], T]) -> T:
        if self._connection.in_transaction:  # the rollback of an earlier one failed too
            self._run("ROLLBACK")
        self._run(begin)
        try:
            result = work(self._connection)
            self._run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                with suppress(apsw.Error):
                    self._run("ROLLBACK")
            raise
        return result

    @property
    def limiter(self) -> trio.CapacityLimiter:
        """Return the limiter for one thread at a time. Hold it to use the connection off the event loop."""
        import trio

        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(1)
        return self._limiter

    @property
    def scanning(self) -> trio.Lock:
        """Return the lock that a full scan holds from its first transaction to its last, for its temporary table."""
        import trio

        if self._sweeping is None:
            self._sweeping = trio.Lock()
        return self._sweeping

    async def _in_thread(self, work: Callable[[], T]) -> T:
        import trio

        return await trio.to_thread.run_sync(work, limiter=self.limiter)

    async def awrite(self, work: Callable[[Transaction], T]) -> T:
        """Run ``write`` off the event loop. Once it began it is not cancelled."""
        return await self._in_thread(lambda: self.write(work))

    async def aread(self, work: Callable[[Transaction], T]) -> T:
        """Run ``read`` off the event loop."""
        return await self._in_thread(lambda: self.read(work))

    async def data_version(self) -> int:
        """Return a number that moves when another connection has committed."""

        def ask() -> int:
            return int(next(iter(self._connection.execute("PRAGMA data_version")))[0])

        return await self._in_thread(lambda: self._retried(ask))

    def is_replaced(self) -> bool:
        """Return whether another file, or none, has the name by now: this one was set aside or removed."""
        return self._inode != _inode_of(self.path)

    def checkpoint(self) -> None:
        """Move the WAL into the database file, as far as readers allow."""
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except (apsw.BusyError, apsw.LockedError):
            return
        except apsw.Error as error:
            raise self._translated(error) from error

    def vacuum(self) -> None:
        """Write the whole file again without its free pages, and empty the WAL.

        Raises Locked if readers prevent that.
        """
        self._retried(lambda: self._run("VACUUM"))
        self._retried(self._empty_wal)

    def _empty_wal(self) -> None:
        for busy, _, _ in self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)"):
            if busy:
                raise apsw.BusyError

    def problems(self, *, thorough: bool) -> list[str]:
        """Return what SQLite finds wrong with the file. ``thorough`` compares the indexes with their tables too."""
        pragma = "integrity_check" if thorough else "quick_check"
        try:
            found = self.read(lambda tx: list(tx.execute(f"PRAGMA {pragma}(3)")))
        except Damaged as error:
            return [str(error.__cause__ or error)]
        return [str(row[0]) for row in found if row[0] != "ok"]

    def close(self) -> None:
        """Close the connection. It is safe to call twice."""
        with suppress(apsw.Error):  # what was committed is in the file, and the rest is not wanted any more
            self._connection.close()
        if self._copy is not None:
            self._copy.cleanup()

    def version(self) -> int:
        """Return the version of the schema, 0 if there is none."""
        return self.read(lambda tx: int(cast("int", next(iter(tx.execute("PRAGMA user_version")))[0])))

    def _run(self, sql: str) -> None:
        drain(self._connection.execute(sql))

    def _retried(self, attempt: Callable[[], T]) -> T:
        for tries_left in range(BUSY_RETRIES, -1, -1):
            try:
                return attempt()
            except (apsw.BusyError, apsw.LockedError) as error:
                if not tries_left:
                    raise self._translated(error) from error
                time.sleep(0.005)
            except apsw.Error as error:
                raise self._translated(error) from error
        raise AssertionError

    def _translated(self, error: apsw.Error) -> EngineError:
        """Return the member of our families for anything that SQLite may raise."""
        path, code = self.path, getattr(error, "extendedresult", 0)
        if isinstance(error, (apsw.BusyError, apsw.LockedError)):
            return Locked(f"{path} stayed locked by another process")
        if _is_damage(error, code):
            suspect(path)
            self.damage = Damaged(f"{path} is damaged ({error}): {REMEDY}")
            if self.on_damage is not None:
                self.on_damage()
            return self.damage
        connection = getattr(self, "_connection", None)
        number = 0 if connection is None else connection.system_errno
        if number in FULL or _none_left():
            return Exhausted(f"{path}: {error}: no file descriptor is left")
        if isinstance(error, apsw.FullError) or number in NO_ROOM or (isinstance(error, _IO) and _has_no_room(path)):
            return DiskFull(f"{path}: {error}: no space is left on its disk, or a quota is used up: make room")
        if isinstance(error, (apsw.ReadOnlyError, apsw.PermissionsError)) or _is_forbidden(error, path):
            return Fatal(_forbidden(path))
        if isinstance(error, (*_IO, apsw.NoMemError, apsw.ProtocolError)):
            return Transient(f"{path}: {error}: check the disk and its directory", counts_as_retry=False)
        return Unexpected(f"{path}: {type(error).__name__}: {error}")


_IO = (apsw.IOError, apsw.CantOpenError)
LITTLE_BYTES = 65_536
"""A disk with less room than this cannot take one transaction with its shared memory."""


def _as_text(path: Path) -> str:
    """Return a path as SQLite takes it, in UTF-8, also if the locale has another encoding."""
    return os.fsencode(path).decode("utf-8")


def _create_private(path: Path) -> None:
    """Create an empty file with the folder's permissions to read. SQLite gives its -wal and -shm the same mode.

    An existing file is not opened, because closing it would drop the locks that this process holds on it.
    """
    with suppress(OSError):  # SQLite reports it, with the words that are sorted below
        mode = 0o600 | os.stat(path.parent).st_mode & 0o040  # a group that may read the folder may read the file
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))


def _is_damage(error: apsw.Error, code: int) -> bool:
    """Return whether an error proves that the file does not hold what SQLite wrote, or is not the file we opened."""
    if isinstance(error, (apsw.NotADBError, apsw.CorruptError)):
        return True
    if code in {apsw.SQLITE_READONLY_DBMOVED, apsw.SQLITE_IOERR_CORRUPTFS, apsw.SQLITE_IOERR_DATA}:
        return True
    return isinstance(error, apsw.SQLError) and str(error).startswith("no such table")


def _is_no_file(path: str) -> bool:
    """Return whether there is a directory, a pipe or a device in the place of a file."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _is_forbidden(error: apsw.Error, path: Path) -> bool:
    return isinstance(error, apsw.CantOpenError) and path.exists() and not os.access(path, os.R_OK)


def _has_no_room(path: Path) -> bool:
    """Return whether the disk is full, by the file system. SQLite does not always say why it could not write."""
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < LITTLE_BYTES


def _inode_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def suspect(path: Path) -> None:
    """Leave a sign for the next start that a statement found the file damaged. It is checked as a whole then."""
    with suppress(OSError):
        _sign(path).touch()


def open_or_replace(path: Path, opened: Callable[[], Database], *, suspected: bool = False) -> Database:
    """Open a database that can be made again. A damaged one is set aside first, as ``<name>.damaged``.

    The file is checked as a whole if a statement found damage before, or if that takes no time.
    """
    try:
        database = opened()
        suspected = suspected or _sign(path).exists()
        if not suspected and path.stat().st_size > MAX_CHECKED_BYTES:
            return database
        wrong = database.problems(thorough=suspected)
        if not wrong:
            _sign(path).unlink(missing_ok=True)
            return database
        database.close()
        reason = "; ".join(wrong)
    except Damaged as error:
        reason = str(error.__cause__ or error)
    set_aside(path)
    logger.warning("database_set_aside path={} kept={} error={!r}", path, f"{path}{ASIDE}", reason)
    database = opened()
    database.replaced = reason
    return database


def set_aside(path: Path) -> None:
    """Move a database's files out of the way. An earlier copy is removed."""
    for end in ("", "-wal"):
        with suppress(FileNotFoundError):
            _remove(f"{path}{ASIDE}{end}")
        with suppress(FileNotFoundError):
            Path(f"{path}{end}").rename(f"{path}{ASIDE}{end}")
    with suppress(FileNotFoundError):
        _remove(f"{path}-shm")
    _sign(path).unlink(missing_ok=True)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _sign(path: Path) -> Path:
    return Path(f"{path}.suspect")


def _none_left() -> bool:
    """Return whether no file descriptor is left, by the system. SQLite says only that it cannot open."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in FULL
    return False


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _needs_copy(path: Path) -> bool:
    """Return whether a database must be read from a copy.

    That is so if a dead process left commits next to it, and SQLite may not make what it needs to read them.
    """
    return not _may_write(path) and not Path(f"{path}-shm").exists() and _has_log(path)


def _has_log(path: Path) -> bool:
    """Return whether there are commits next to the file that may not be in it yet."""
    try:
        return os.stat(f"{path}-wal").st_size > 0
    except FileNotFoundError:
        return False


def _has_shared_memory(path: Path) -> bool:
    try:
        return os.stat(f"{path}-shm").st_size >= SHARED_MEMORY_BYTES
    except FileNotFoundError:
        return False


def _copied(path: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a copy of a database with those commits. Raises Transient if it cannot be made."""
    copy = tempfile.TemporaryDirectory(prefix="everos-engine-")
    try:
        for end in ("", "-wal"):
            shutil.copyfile(f"{path}{end}", os.path.join(copy.name, f"{path.name}{end}"))
    except OSError as error:
        copy.cleanup()
        raise Transient(
            f"{path} may not be written, and no copy to read can be made in {tempfile.gettempdir()}: {error.strerror}: set TMPDIR to a directory with room"
        ) from error
    return copy


def _is_still(path: Path) -> bool:
    """Return whether no process can be writing a database.

    This is for a database for which we may not make the shared memory that a reader needs.
    """
    return not _may_write(path) and not _has_log(path)


def _forbidden(path: Path) -> str:
    with suppress(OSError):
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
            return f"{path} lies on a read-only file system: mount that for writing (`mount -o remount,rw`). Meanwhile `everos-engine search`, `status` and `explain` work"
    return f"{path} may not be read and written by this user: run the command as the user the engine runs as"
