"""What the engine passes into every loop: the open stores, the settings and the shared values."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
from trio_util import AsyncValue

from everos_engine.errors import exhausted
from everos_engine.loops.deletion_guard import DeletionGuard
from everos_engine.stores.conditions import Conditions
from everos_engine.system import descriptors
from everos_engine.system.descriptors import Reserve
from everos_engine.system.file_threads import FileThreads, open_threads
from everos_engine.system.instrument import LoopBlocks

if TYPE_CHECKING:
    from everos_engine.loops.vectors import Vectors
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Database
    from everos_engine.stores.index import Index

STARVED_SECONDS = 5.0
"""Errors that do not name their cause (a name server, a TLS file) are put down to a lack of descriptors for so long."""

HUNG_NAMED = 20
READER = "reader"
"""The owner's name of stores that are open for reading only."""
HISTORY = 3600
POINT_CODES = "qqqdq"
"""The types of a point's columns, as `array` knows them."""


@dataclass(slots=True)
class Progress:
    """What happened since the start, for the status line and the loops' judgement.

    ``unseen`` are changes that a sweep found first, with the time (monotonic seconds): an event may still tell of them.
    ``burst`` is the size of the largest batch of events, and ``stall_seconds`` the longest sleep, since the last sweep.
    ``told`` changes came by events; ``silent`` ones did not, with no burst to blame.
    """

    applied: int = 0
    commits: dict[str, int] = field(default_factory=dict)
    last_scan_milliseconds: int = 0
    watching: bool = False
    polling: bool = False
    watched_since_seconds: float = 0.0
    burst: int = 0
    stall_seconds: float = 0.0
    unseen: dict[str, float] = field(default_factory=dict)
    silent: int = 0
    told: int = 0
    lost_at_seconds: float = 0.0
    directories_added: int = 0


@dataclass(slots=True)
class Beat:
    """The last sign of life of a loop (monotonic seconds), and how soon it promised the next."""

    at: float
    within_seconds: float


class Point(NamedTuple):
    """One second of the descriptor guard: when, descriptors, resident bytes, the worker's share, the Session's bytes."""

    at_milliseconds: int
    descriptors: int
    rss_bytes: int
    pressure: float
    session_bytes: int


@dataclass(frozen=True, slots=True)
class Base:
    """What the process held before the engine began: open descriptors and resident bytes."""

    descriptors: int
    rss_bytes: int


def base_now() -> Base:
    """Measure what the process holds now; zero resident bytes where the system does not report them."""
    memory = descriptors.memory()
    return Base(descriptors.counter()[0](), 0 if memory is None else memory.rss_bytes)


class History:
    """The last HISTORY points, in memory laid out at the start: an hour of them costs no more than the first."""

    def __init__(self) -> None:
        self._columns: list[array[Any]] = [array(code, bytes(8 * HISTORY)) for code in POINT_CODES]
        self._count = 0

    def append(self, point: Point) -> None:
        """Keep a point; the oldest goes where there are HISTORY."""
        at = self._count % HISTORY
        for column, value in zip(self._columns, point, strict=True):
            column[at] = value
        self._count += 1

    def __len__(self) -> int:
        return min(self._count, HISTORY)

    def __iter__(self) -> Iterator[Point]:
        """Oldest first."""
        for number in range(self._count - len(self), self._count):
            yield Point(*(column[number % HISTORY] for column in self._columns))


@dataclass(slots=True)
class Context:
    """The parts every loop may use. ``wake`` moves when there may be work, ``applied`` when changes were marked.

    ``exhaustion`` moves when somebody found no descriptor. ``pressure`` is the share of their usual breadth that the worker and
    searches may use: 1 all; at 0 new claims wait, and searches go one at a time. ``unchecked`` are the kinds whose tables nobody
    could look at since the start, and ``probed`` says when (monotonic seconds) a search had a sound table read whole.
    """

    settings: Settings
    database: Database
    index: Index
    vectors: Vectors
    owner: str
    wake: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    applied: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    scan_now: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    pressure: AsyncValue[float] = field(default_factory=lambda: AsyncValue(1.0))
    progress: Progress = field(default_factory=Progress)
    blocks: LoopBlocks = field(default_factory=LoopBlocks)
    started_milliseconds: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    beats: dict[str, Beat] = field(default_factory=dict)
    exhaustion: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    exhausted_at_seconds: float = float("-inf")
    reserve: Reserve = field(default_factory=Reserve)
    base: Base = field(default_factory=base_now)
    fds: dict[str, object] = field(default_factory=dict)
    fds_history: History = field(default_factory=History)
    unchecked: set[str] = field(default_factory=set)
    probed: dict[str, float] = field(default_factory=dict)
    tables: dict[str, trio.Lock] = field(default_factory=dict)
    deletion_guard: DeletionGuard = field(init=False)
    conditions: Conditions = field(init=False)
    threads: FileThreads = field(init=False)

    def __post_init__(self) -> None:
        self.deletion_guard = DeletionGuard(self.settings)
        self.conditions = Conditions(self.database)
        self.threads = open_threads(deadline_seconds=self.settings.file_deadline_seconds)
        self.vectors.registry = self.database

    async def report_replaced(self) -> None:
        """Report a database that was damaged and is made again from markdown."""
        path, reason = self.database.path, self.database.replaced
        if reason is not None:
            message = f"{path} was damaged ({reason}): it is made again from markdown, with the vectors that are cached"
            remedy = (
                f"check the disk; the damaged file is kept as {path}.damaged, remove it if nobody wants to look into it"
            )
            await self.conditions.say("database_recreated", message, remedy)

    def table(self, kind: str) -> trio.Lock:
        """Return the lock of who writes to a kind's table, or compares it with the ledger, from the first look to the last note."""
        return self.tables.setdefault(kind, trio.Lock())

    def wake_up(self) -> None:
        """There may be work in the queue."""
        self.wake.value += 1

    def look_again(self) -> None:
        """A sweep is wanted soon, without waiting for its beat."""
        self.scan_now.value += 1

    def exhaust(self) -> None:
        """Somebody found no file descriptor: the guard acts at once."""
        self.exhausted_at_seconds = time.monotonic()
        self.exhaustion.value += 1

    def starved(self, error: BaseException) -> bool:
        """Whether an error came of a lack of descriptors: by its own words, or by the moment it happened in."""
        if exhausted(error):
            self.exhaust()
            return True
        return time.monotonic() - self.exhausted_at_seconds < STARVED_SECONDS

    def beat(self, loop: str, *, within_seconds: float) -> None:
        """The loop lives, and beats again within so many seconds; else it counts as stalled."""
        self.beats[loop] = Beat(time.monotonic(), within_seconds)

    def history(self) -> dict[str, object]:
        """What the control socket answers to "history": the last hour, a point a second."""
        return {"columns": list(Point._fields), "points": [list(point) for point in self.fds_history]}

    def snapshot(self) -> dict[str, object]:
        """What the control socket answers to "pulse": plain data, made without touching any store."""
        now = time.monotonic()
        return {
            "pid": os.getpid(),
            "started_milliseconds": self.started_milliseconds,
            "loops": {
                name: {
                    "beat_seconds_ago": round(now - beat.at, 3),
                    "allowance_seconds": beat.within_seconds,
                    "stalled": now - beat.at > beat.within_seconds,
                }
                for name, beat in self.beats.items()
            },
            "blocked": {
                "count": self.blocks.count,
                "worst_seconds": round(self.blocks.worst_seconds, 3),
                "worst_task": self.blocks.worst_task,
            },
            "fds": self.fds,
            "watch": {
                "mode": self.settings.watch.mode,
                "watching": self.progress.watching,
                "polling": self.progress.polling,
                "conditions": [asdict(condition) for condition in self.conditions.now.values()],
            },
            "pressure": self.pressure.value,
            "hung": [[name, round(seconds, 1)] for name, seconds in self.threads.hung()[:HUNG_NAMED]],
        }


def now_milliseconds() -> int:
    """Wall-clock time, as the queue keeps it."""
    return time.time_ns() // 1_000_000


async def wait_moved(value: AsyncValue[int], seen: int, *, at_most_seconds: float) -> bool:
    """Wait until ``value`` is no longer ``seen``; False when the time is over first."""
    with trio.move_on_after(at_most_seconds):
        await value.wait_value(lambda now: now != seen)
        return True
    return False
