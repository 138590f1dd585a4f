"""Fails the n-th call of each door until a run needs none more, and checks after each that nothing is lost.

    python -m fuzz.faults [door...] [--most N]

Doors: writes and syncs of SQLite's files (through a VFS), every statement of SQLite with each error that it may raise (for as long
as a transaction is retried), the wall clock (set by a day in either direction, and back), LanceDB commits (before, and after they took effect), reads of
the tree (EIO from the system's calls), and the embedder.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import apsw
import trio

from everos_engine.engine import Engine, open_engine
from everos_engine.errors import Transient
from everos_engine.settings import load
from everos_engine.stores import database
from everos_engine.testing import FakeEmbedder
from fuzz.scratch import SCRATCH
from fuzz.system_calls import calls_about
from fuzz.tree.machine import Mismatch, Operation, Writer, rows_of
from fuzz.tree.model import Account

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FACTS, SKILL, NOTE = "users/u1/.atomic_facts/one.md", "agents/a1/skills/bake/SKILL.md", "notes/one.md"
FIRST: Sequence[Operation] = [
    ("write", (FACTS,), 1),
    ("append", (FACTS,), 2),
    ("write", (SKILL,), 3),
    ("write", (NOTE,), 4),
    ("write", ("notes/goes.md",), 5),
    ("write", ("users/u1/episodes/moves.md",), 6),
]
THEN: Sequence[Operation] = [
    ("edit_entry", (FACTS,), 11),
    ("reference", (SKILL.replace("SKILL.md", "references/a.md"),), 12),
    ("delete", ("notes/goes.md",), 13),
    ("rename", ("users/u1/episodes/moves.md", "users/u1/episodes/moved.md"), 14),
    ("copy", (NOTE, "notes/copy.md"), 15),
    ("write", ("users/u1/user.md",), 16),
]
AT_ONCE: Sequence[Operation] = [("write", (FACTS,), 21), ("delete", ("notes/copy.md",), 22)]
"""What is edited the moment a fault strikes: what was perhaps written must not stay behind."""
SETTLE_SECONDS = 300
"""No settling takes a tenth of it: what takes longer hangs."""
TRIES = 6


@dataclass
class Trap:
    """Counts the calls of one door while it is set, and springs at the n-th and at ``span`` - 1 more."""

    door: str = ""
    at: int = 0
    span: int = 1
    count: int = 0
    then: Callable[[], None] = lambda: None

    def springs(self, door: str) -> bool:
        if not self.at or door != self.door:
            return False
        self.count += 1
        if self.count == self.at:
            self.then()
        return self.at <= self.count < self.at + self.span

    @property
    def sprung(self) -> bool:
        return self.count >= self.at


TRAP = Trap()
BASE = apsw.vfs_names()[0]


class _File(apsw.VFSFile):
    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's name
        if TRAP.springs("sqlite"):
            raise apsw.FullError
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
        if TRAP.springs("sqlite"):
            raise apsw.IOError
        super().xSync(flags)


class _Disk(apsw.VFS):
    """The default file system for SQLite, with the trap in its files."""

    def __init__(self) -> None:
        super().__init__("trapped", BASE, makedefault=True)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's name
        return _File(BASE, name, flags)


@contextmanager
def sqlite_door(_engine: Engine, _root: Path) -> Iterator[None]:
    yield  # the engine's files were opened through the trapped disk


STATEMENTS: dict[str, tuple[type[Exception], int]] = {
    "busy": (apsw.BusyError, 10),
    "full": (apsw.FullError, 1),
    "stays_full": (apsw.FullError, 30),
    "io": (apsw.IOError, 1),
    "memory": (apsw.NoMemError, 1),
    "corrupt": (apsw.CorruptError, 1),
    "not_a_database": (apsw.NotADBError, 1),
    "unknown": (apsw.Error, 3),
}
"""Door -> the error that a statement of SQLite ends with, and how many statements do. A rollback is a statement too."""
BUSY_RETRIES = 2


def _trace(_cursor: apsw.Cursor, _sql: str, _bindings: object) -> bool:
    if TRAP.door in STATEMENTS and TRAP.springs(TRAP.door):
        raise STATEMENTS[TRAP.door][0]
    return True


def _hook(connection: apsw.Connection) -> None:
    connection.exec_trace = _trace


DAY_NANOSECONDS = 86_400 * 10**9
CLOCK_SPAN = 12


@contextmanager
def clock_door(_engine: Engine, _root: Path) -> Iterator[None]:
    """The wall clock is a day wrong for CLOCK_SPAN looks at it: ahead, or behind at every second fault."""
    time_ns, seconds = time.time_ns, time.time

    def off() -> int:
        return (1 if TRAP.at % 2 else -1) * DAY_NANOSECONDS if TRAP.springs("clock") else 0

    time.time_ns = lambda: time_ns() + off()
    time.time = lambda: seconds() + off() / 10**9
    try:
        yield
    finally:
        time.time_ns, time.time = time_ns, seconds


class _Bridge:
    """LanceDB's bridge with the trap in its writes."""

    def __init__(self, inner: object, *, after: bool) -> None:
        self.inner, self.after = inner, after

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    async def write(self, function: Callable[..., Awaitable[object]], *args: object, deadline_seconds: float) -> object:
        springs = TRAP.springs("bridge")
        if springs and not self.after:
            message = "the trap: not done"
            raise Transient(message)
        result = await self.inner.write(function, *args, deadline_seconds=deadline_seconds)  # type: ignore[attr-defined]
        if springs:
            message = "the trap: done, but nobody was told"
            raise Transient(message)
        return result


@contextmanager
def _bridge(engine: Engine, *, after: bool) -> Iterator[None]:
    index = engine.context.index
    inner = index.bridge
    index.bridge = _Bridge(inner, after=after)  # type: ignore[assignment]
    try:
        yield
    finally:
        index.bridge = inner


@contextmanager
def commit_door(engine: Engine, _root: Path) -> Iterator[None]:
    with _bridge(engine, after=False):
        yield


@contextmanager
def outcome_door(engine: Engine, _root: Path) -> Iterator[None]:
    with _bridge(engine, after=True):
        yield


@contextmanager
def read_door(_engine: Engine, root: Path) -> Iterator[None]:
    """EIO from the system's calls about the tree, not about the engine's own files."""

    def fail(path: str) -> None:
        if TRAP.springs("read"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with calls_about(root, ("open", "stat", "scandir", "listdir"), fail):
        yield


class TrappedEmbedder(FakeEmbedder):
    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if TRAP.springs("embedder"):
            message = "the trap: no answer"
            raise Transient(message)
        return await super().embed(texts)


@contextmanager
def embedder_door(_engine: Engine, _root: Path) -> Iterator[None]:
    yield  # the engine has a trapped embedder


DOORS = {
    "sqlite": sqlite_door,
    "commit": commit_door,
    "outcome": outcome_door,
    "read": read_door,
    "embedder": embedder_door,
    "clock": clock_door,
    **dict.fromkeys(STATEMENTS, sqlite_door),
}
SPANS = {"clock": CLOCK_SPAN, **{name: span for name, (_, span) in STATEMENTS.items()}}


BEHIND = {name: "bridge" if name in {"commit", "outcome"} else name for name in DOORS}


async def once(door: str, at: int) -> bool:
    """One run with the n-th call failing; False where there was no n-th. Raises Mismatch where something is lost."""
    with tempfile.TemporaryDirectory(prefix="everos-fault-", dir=SCRATCH) as name:
        root = Path(os.path.realpath(name)) / "root"
        root.mkdir()
        flags = {
            "memory.root": str(root),
            "note.globs": ["notes/*.md"],
            "worker_retry_backoff_seconds": 0.01,
            "brake_ratio": 1.0,
        }
        settings = load(flags, environment={}, user_file=root / "none")
        writer, account = Writer(root), Account()
        async with open_engine(settings, embedder=TrappedEmbedder()) as engine:
            _do(writer, account, FIRST)
            await engine.settle()
            with DOORS[door](engine, root):
                TRAP.then = partial(_do, writer, account, AT_ONCE)
                TRAP.door, TRAP.at, TRAP.count, TRAP.span = BEHIND[door], at, 0, SPANS.get(door, 1)
                _do(writer, account, THEN)
                await _settled(engine)
                sprung, TRAP.at = TRAP.sprung, 0
            await _settled(engine)
            standing = await engine.context.database.aread(
                lambda tx: dict(tx.execute("SELECT md_path, status FROM md_change_state"))  # type: ignore[arg-type]
            )
            wrong = account.check(await rows_of(engine), standing)
        if wrong:
            raise Mismatch("\n".join(wrong))
    return sprung


def _do(writer: Writer, account: Account, operations: Sequence[Operation]) -> None:
    held, TRAP.at = TRAP.at, 0  # the writer's own calls do not count
    for operation in operations:
        if not writer.apply(operation):
            message = f"{operation} does not apply"
            raise AssertionError(message)
        account.saw(writer.tree.states())
    TRAP.at = held


async def _settled(engine: Engine) -> None:
    """In step, however often a sweep is refused on the way."""
    for _ in range(TRIES + TRAP.span):
        with trio.move_on_after(SETTLE_SECONDS) as scope:
            try:
                await engine.settle()
            except Transient:
                continue
            return
        if scope.cancelled_caught:
            message = f"not settled within {SETTLE_SECONDS} s: {await engine.status()}"
            raise Mismatch(message)
    message = f"refused {TRIES + TRAP.span} times after one fault"
    raise Mismatch(message)


def main() -> int:
    """Run it; exit status 1 where a fault cost anything."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.faults", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("door", nargs="*", help=f"of {', '.join(DOORS)}")
    parser.add_argument(
        "--most", type=int, default=0, help="at most so many faults a door, spread; 0: each of the first 300"
    )
    parser.add_argument("--at", type=int, default=0, help="just this one")
    arguments = parser.parse_args()
    _disk = _Disk()
    apsw.connection_hooks.append(_hook)
    database.BUSY_RETRIES = BUSY_RETRIES  # ten seconds of retries would make no other way of it
    for door in arguments.door or DOORS:
        at, faults = arguments.at or 1, 0
        while at <= 300:
            try:
                sprung = trio.run(once, door, at)
            except Exception as error:
                print(f"faults: {door}: the {at}. call: {error!r}", file=sys.stderr)
                print(f"again: python -m fuzz.faults {door} --at {at}", file=sys.stderr)
                return 1
            if not sprung or arguments.at:
                break
            faults += 1
            at += 1 if not arguments.most else max(1, at * 2 // arguments.most)
        print(f"faults: {door}: {faults} faults, up to the {at - 1}. call: nothing lost", flush=True)
    return 0
