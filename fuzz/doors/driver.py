"""Raises what each outside library can raise, at the calls of its door: the engine lives, says so, and converges.

    python -m fuzz.doors [door...] [--most N] [--seconds S] [--all-calls]

Doors: sqlite (apsw), lance (LanceDB and Arrow), watch (watchfiles), system (calls about the tree), http (httpx) and embedder
(one given to ``open_engine``). First each type is raised once, at one call: the next type at the next call, and with
--all-calls each type at each call. Then for S seconds every call of the door fails, with all types one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import apsw
import httpx
import numpy as np
import trio
from loguru import logger

from everos_engine import supervise
from everos_engine.embed.http import open_http_embedder
from everos_engine.engine import Engine, open_engine
from everos_engine.errors import EngineError, Fatal, unwrap
from everos_engine.loops import recovery, watcher
from everos_engine.settings import EmbedderSettings, load
from everos_engine.system.asyncio_thread import AsyncioThread
from everos_engine.testing import FakeEmbedder
from fuzz.doors import foreign
from fuzz.scratch import SCRATCH
from fuzz.system_calls import calls_about
from fuzz.tree.machine import Mismatch, Operation, Writer, rows_of
from fuzz.tree.model import Account

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from everos_engine.embed.protocol import Embedder
    from everos_engine.settings import Settings

GIVEN_UP = "SELECT md_path, retryable, error FROM md_change_state WHERE status = 'failed'"
SETTLE_SECONDS = 300
"""No settling takes a tenth of it: what takes longer hangs."""
TRIES = 40
CALLS = {"sqlite": 40, "lance": 8, "watch": 2, "system": 12, "http": 2, "embedder": 2}
"""The call that fails moves on by one with each type, and begins again after so many: about what one edit costs."""
OURS: dict[str, tuple[type[BaseException], ...]] = {"sqlite": (foreign.NeverHeardOf, foreign.PanicException)}
"""What reaches the caller as it is: inside a transaction a type that is not SQLite's cannot be told from a bug of ours."""
FACTS, NOTE, GOES = "users/u1/.atomic_facts/one.md", "notes/one.md", "notes/goes.md"
HUMAN = {"ReadOnlyError", "PermissionsError", "AuthError"}
"""Types that mean that only a human can go on: the engine may end with Fatal, which has the remedy."""


@dataclass
class Trap:
    """While ``make`` is set, raises its error at the ``at``-th call, or at every call for 0."""

    make: foreign.Make | None = None
    at: int = 0
    count: int = 0
    sprung: int = 0

    def spring(self) -> None:
        """Raise, if it is due."""
        if self.make is None:
            return
        self.count += 1
        if self.at in {0, self.count}:
            self.sprung += 1
            raise self.make()

    def set(self, make: foreign.Make, *, at: int) -> None:
        self.make, self.at, self.count, self.sprung = make, at, 0, 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """The suite's own calls do not count."""
        make, self.make = self.make, None
        try:
            yield
        finally:
            self.make = make


TRAP = Trap()


class _Connection(apsw.Connection):
    def execute(self, *args: Any, **options: Any) -> Any:
        TRAP.spring()
        return super().execute(*args, **options)

    def executemany(self, *args: Any, **options: Any) -> Any:
        TRAP.spring()
        return super().executemany(*args, **options)


@contextmanager
def sqlite_door(_root: Path) -> Iterator[None]:
    with _replaced(apsw, "Connection", _Connection):
        yield


@contextmanager
def lance_door(_root: Path) -> Iterator[None]:
    """The error is raised on LanceDB's own thread, in the place of the call."""

    def trapped(name: str) -> Callable[..., Awaitable[object]]:
        sound = getattr(AsyncioThread, name)

        async def call(
            self: AsyncioThread, function: Callable[..., Awaitable[object]], *args: object, deadline_seconds: float
        ) -> object:
            async def attempt(*given: object) -> object:
                TRAP.spring()
                return await function(*given)

            return await sound(self, attempt, *args, deadline_seconds=deadline_seconds)

        return call

    with _replaced(AsyncioThread, "read", trapped("read")), _replaced(AsyncioThread, "write", trapped("write")):
        yield


@contextmanager
def watch_door(_root: Path) -> Iterator[None]:
    sound = watcher.RustNotify

    class Watches:
        def __init__(self, *args: Any, **options: Any) -> None:
            TRAP.spring()
            self.inner = sound(*args, **options)

        def watch(self, *args: Any) -> Any:
            TRAP.spring()
            return self.inner.watch(*args)

        def close(self) -> None:
            self.inner.close()

        def __enter__(self) -> Self:
            self.inner.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(*args)

    with _replaced(watcher, "RustNotify", Watches):
        yield


@contextmanager
def system_door(root: Path) -> Iterator[None]:
    """Calls about the tree, not about the engine's own files."""
    with calls_about(root, ("open", "stat", "lstat", "scandir", "listdir"), lambda _: TRAP.spring()):
        yield


@contextmanager
def embedder_door(_root: Path) -> Iterator[None]:
    yield  # the embedder itself has the trap


class TrappedEmbedder(FakeEmbedder):
    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        TRAP.spring()
        return await super().embed(texts)


class _Transport(httpx.AsyncBaseTransport):
    """A service in this process, reached through httpx."""

    def __init__(self) -> None:
        self.fake = FakeEmbedder()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        TRAP.spring()
        import json

        texts = json.loads(await request.aread())["input"]
        found = await self.fake.embed(texts)
        return httpx.Response(
            200, json={"data": [{"index": n, "embedding": row.tolist()} for n, row in enumerate(found)]}
        )


@asynccontextmanager
async def _embedder(door: str) -> AsyncIterator[Embedder]:
    if door != "http":
        yield TrappedEmbedder() if door == "embedder" else FakeEmbedder()
        return
    settings = EmbedderSettings(kind="http", url="http://127.0.0.1:9/v1", model="m")
    async with open_http_embedder(settings, environment={}) as embedder:
        embedder._client = httpx.AsyncClient(transport=_Transport(), timeout=None)
        yield embedder


DOORS = {
    "sqlite": (sqlite_door, foreign.of_sqlite),
    "lance": (lance_door, foreign.of_lance),
    "watch": (watch_door, foreign.of_watchfiles),
    "system": (system_door, foreign.of_the_system),
    "http": (embedder_door, foreign.of_httpx),
    "embedder": (embedder_door, foreign.of_embedders),
}


class Run:
    """One engine under one door's errors."""

    def __init__(self, door: str, root: Path) -> None:
        self.door, self.root = door, root
        self.writer, self.account = Writer(root), Account()
        self.numbers = itertools.count(1)
        self.logged: list[str] = []
        self.ended = 0

    def settings(self) -> Settings:
        flags = {
            "memory.root": str(self.root),
            "note.globs": ["notes/*.md"],
            "worker_retry_backoff_seconds": 0.01,
            "worker_retry_backoff_max_seconds": 0.1,
            "embedder.outage_probe_seconds": 0.02,
            "embedder.outage_probe_max_seconds": 0.05,
            "scan_interval_seconds": 0.5,
            "brake_ratio": 1.0,
        }
        return load(flags, environment={}, user_file=self.root / "none")

    def edit(self) -> None:
        """Change one file, add to it, and let another one come or go."""
        number = next(self.numbers)
        operations: list[Operation] = [("write", (FACTS,), number * 10), ("append", (FACTS,), number * 10 + 1)]
        operations.append(("write", (NOTE,), number * 10 + 2))
        operations.append(("delete" if number % 2 == 0 else "write", (GOES,), number * 10 + 3))
        with TRAP.held():
            for operation in operations:
                if not self.writer.apply(operation):
                    message = f"{operation} does not apply"
                    raise AssertionError(message)
                self.account.saw(self.writer.tree.states())

    async def ask(self, engine: Engine) -> None:
        """Questions are answered, or refused by one of our errors; nothing else comes out."""
        for mode in ("fts", "hybrid"):
            with trio.fail_after(SETTLE_SECONDS), suppress(*OURS.get(self.door, ())):
                try:
                    await engine.search("one", mode=mode)  # type: ignore[arg-type]  # a mode
                except Fatal:
                    raise
                except EngineError as error:
                    self.check_text(error)

    @staticmethod
    def check_text(error: EngineError) -> None:
        if not str(error):
            message = f"{error!r} says nothing"
            raise Mismatch(message)

    async def settled(self, engine: Engine) -> None:
        """In step, however often that is refused on the way."""
        refusal: BaseException | None = None
        with trio.move_on_after(SETTLE_SECONDS):
            for _ in range(TRIES):
                try:
                    await engine.settle()
                except Fatal:
                    raise
                except EngineError as error:
                    self.check_text(error)
                    refusal = error
                except OURS.get(self.door, ()) as error:
                    refusal = error
                else:
                    return
                await trio.sleep(0.05)
        message = f"not settled: {refusal!r}, {engine.health.as_data()}"
        raise Mismatch(message)

    async def check(self, engine: Engine) -> None:
        standing = await engine.context.database.aread(
            lambda tx: dict(tx.execute("SELECT md_path, status FROM md_change_state"))  # type: ignore[arg-type]
        )
        wrong = self.account.check(await rows_of(engine), standing)
        if wrong:
            raise Mismatch("\n".join(wrong))

    async def once(self, engine: Engine, make: foreign.Make, *, at: int) -> bool:
        """One error at one call; whether there was such a call."""
        TRAP.set(make, at=at)
        self.edit()
        await self.ask(engine)
        await self.settled(engine)
        sprung, TRAP.make = TRAP.sprung > 0, None
        await self.settled(engine)
        await self.check(engine)
        return sprung

    async def storm(self, engine: Engine, makes: Sequence[foreign.Make], *, seconds: float) -> None:
        """Every call fails, with one type after the other."""
        types = itertools.cycle(makes)
        self.logged.clear()

        def make() -> BaseException:
            return next(types)()

        TRAP.set(make, at=0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.edit()
            await self.ask(engine)
            await trio.sleep(0.2)
        if not TRAP.sprung:
            message = "no call of this door was made"
            raise Mismatch(message)
        TRAP.make = None
        await self.settled(engine)
        await self.fix(engine)
        await self.check(engine)
        if not self.logged:
            message = f"{TRAP.sprung} errors, and the log says nothing of them"
            raise Mismatch(message)

    async def fix(self, engine: Engine) -> None:
        """Do as a user does after a long storm: try again what used up its attempts, with its reason, and only that."""
        failed = await engine.context.database.aread(lambda tx: list(tx.execute(GIVEN_UP)))
        wrong = [row for row in failed if not row[1] or not row[2]]
        if wrong:
            message = f"failed for good, or without a reason: {wrong}"
            raise Mismatch(message)
        if failed:
            await engine.fix()
            await self.settled(engine)


async def run(door: str, types: dict[str, foreign.Make], *, seconds: float, all_calls: bool) -> str:
    """The errors one by one, then the storm; what happened, in words."""
    opened = DOORS[door][0]
    with tempfile.TemporaryDirectory(prefix="everos-doors-", dir=SCRATCH) as place:
        root = Path(os.path.realpath(place)) / "root"
        root.mkdir()
        work = Run(door, root)
        sink = logger.add(work.logged.append, level="WARNING", format="{message}")
        sprung, left, at = 0, list(types.items()), 0
        try:
            with opened(root):
                name = current = ""
                while left or seconds:
                    try:
                        async with (
                            _embedder(door) as embedder,
                            open_engine(work.settings(), embedder=embedder) as engine,
                        ):
                            work.edit()
                            await work.settled(engine)
                            while left:
                                name, make = left.pop(0)
                                at = at % CALLS[door] + 1
                                for call in range(1, 300) if all_calls else [at]:
                                    current = f"{name} at call {call}"
                                    if not await work.once(engine, make, at=call):
                                        break
                                    sprung += 1
                            if seconds:
                                current = f"a storm of {seconds:g} s"
                                sound = [make for name, make in types.items() if name not in HUMAN]
                                await work.storm(engine, sound, seconds=seconds)
                                seconds = 0
                            reopenings = engine.health.reopenings
                    except Fatal as error:
                        TRAP.make = None
                        if name not in HUMAN:
                            raise
                        work.check_text(error)
                        work.ended += 1
        except BaseException as error:
            if isinstance(error, Exception):
                message = f"{current}: {error!r}"
                raise Mismatch(message) from error
            raise
        finally:
            TRAP.make = None
            logger.remove(sink)
    return f"{len(types)} types, {sprung} raised one by one, {work.ended} ended it for a human, {reopenings} reopenings"


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def chosen(types: dict[str, foreign.Make], most: int) -> dict[str, foreign.Make]:
    """At most so many types, spread over all; always with the one nobody heard of and the panic. 0 is all."""
    if not most or len(types) <= most:
        return types
    names = list(types)
    step = len(names) / max(1, most - 2)
    kept = {names[int(n * step)] for n in range(max(1, most - 2))} | ({"NeverHeardOf", "PanicException"} & set(names))
    return {name: types[name] for name in names if name in kept}


def main() -> int:
    """Run it; exit status 1 where an error stopped the engine or cost anything."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.doors", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("door", nargs="*", help=f"of {', '.join(DOORS)}")
    parser.add_argument("--most", type=int, default=0, help="at most so many types a door; 0: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long every call fails at the end")
    parser.add_argument("--all-calls", action="store_true", help="each type at each call")
    arguments = parser.parse_args()
    supervise.FIRST_DELAY_SECONDS, supervise.MAX_DELAY_SECONDS = 0.01, 0.2
    supervise.FIRST_REST_SECONDS, supervise.MAX_REST_SECONDS = 0.01, 0.2
    recovery.REBUILD_MILLISECONDS = 0  # a table is made again as often as it is found damaged
    recovery.PROBE_REST_SECONDS = 0.0
    watcher.RETRY_SECONDS, watcher.FIRST_PAUSE_SECONDS = 0.2, 0.01
    for door in arguments.door or DOORS:
        started = time.monotonic()
        types = chosen(DOORS[door][1](), arguments.most)
        try:
            told = trio.run(partial(run, door, types, seconds=arguments.seconds, all_calls=arguments.all_calls))
        except Exception as error:
            shown = unwrap(error)
            print(f"doors: {door}: {shown}", file=sys.stderr)
            print(f"again: python -m fuzz.doors {door} --most {arguments.most}", file=sys.stderr)
            return 1
        print(f"doors: {door}: {told}, in {time.monotonic() - started:.0f} s", flush=True)
    return 0
