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
from everos_engine.settings import Settings
from everos_engine.stores.conditions import Conditions
from everos_engine.stores.database import Database
from everos_engine.system import descriptors
from everos_engine.system.descriptors import Reserve
from everos_engine.system.file_threads import FileThreads, open_threads
from everos_engine.system.instrument import LoopBlocks

if TYPE_CHECKING:
    from everos_engine.loops.vectors import Vectors
    from everos_engine.stores.index import Index

STARVED_SECONDS = 5.0
"""For so long after an exhaustion, errors that do not name their cause (a name server, a TLS file) count as a lack
of descriptors."""

HUNG_NAMED = 20
READER = "reader"
"""The owner name of stores that are open for reading only."""
HISTORY = 3600
POINT_CODES = "qqqdq"
"""The type codes of a point's columns, for `array`."""


@dataclass(slots=True)
class Progress:
    """What happened since the start, for the status line and for the decisions of the loops.

    ``unseen`` are changes that a full scan found first, with the time (monotonic seconds). An event may still report
    them. ``burst`` is the size of the largest batch of events since the last full scan, ``stall_seconds`` the longest
    sleep. ``reported`` counts the changes that events reported, ``silent`` those that they did not report without a burst
    as the cause.
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
    reported: int = 0
    lost_at_seconds: float = 0.0
    directories_added: int = 0


@dataclass(slots=True)
class Beat:
    """The last heartbeat of a loop (monotonic seconds), and the time within which it promised the next."""

    at: float
    within_seconds: float


class Point(NamedTuple):
    """One second of the descriptor guard.

    The columns are the time, the descriptors, the resident bytes, the worker's share and the Session's bytes.
    """

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
    """Measure what the process holds now.

    Resident bytes are zero if the system does not report them.
    """
    memory = descriptors.memory()
    return Base(descriptors.counter()[0](), 0 if memory is None else memory.rss_bytes)


class History:
    """Keep the last HISTORY points.

    Their memory is allocated at the start, so an hour of them costs no more than the first.
    """

    def __init__(self) -> None:
        self._columns: list[array[Any]] = [array(code, bytes(8 * HISTORY)) for code in POINT_CODES]
        self._count = 0

    def append(self, point: Point) -> None:
        """Keep a point. The oldest one goes if there are HISTORY of them."""
        at = self._count % HISTORY
        for column, value in zip(self._columns, point, strict=True):
            column[at] = value
        self._count += 1

    def __len__(self) -> int:
        return min(self._count, HISTORY)

    def __iter__(self) -> Iterator[Point]:
        """Yield the points, the oldest first."""
        for number in range(self._count - len(self), self._count):
            yield Point(*(column[number % HISTORY] for column in self._columns))


@dataclass(slots=True)
class Context:
    """The parts that every loop may use.

    ``wake`` moves when there may be work, ``applied`` when changes were marked, and ``exhaustion`` when no descriptor
    was left. ``pressure`` is the share of their usual width that the worker and searches may use. At 1 they use all of
    it. At 0 new claims wait, and searches go one at a time. ``unchecked`` are the kinds whose tables could not be
    looked at since the start. ``probed`` says when (monotonic seconds) a failed search caused a whole read of a table
    that was sound.
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
            remedy = f"check the disk. The damaged file is kept as {path}.damaged. Remove it if you do not need it"
            await self.conditions.say("database_recreated", message, remedy)

    def table(self, kind: str) -> trio.Lock:
        """Return the lock of a kind's table.

        Hold it to write to the table or to compare it with the ledger, from the first read to the last record.
        """
        return self.tables.setdefault(kind, trio.Lock())

    def wake_up(self) -> None:
        """Report that there may be work in the queue."""
        self.wake.value += 1

    def look_again(self) -> None:
        """Ask for a full scan soon, before its regular time."""
        self.scan_now.value += 1

    def exhaust(self) -> None:
        """Report that no file descriptor was left. The guard acts immediately."""
        self.exhausted_at_seconds = time.monotonic()
        self.exhaustion.value += 1

    def starved(self, error: BaseException) -> bool:
        """Return whether an error came from a lack of descriptors: its text says so, or an exhaustion was just seen."""
        if exhausted(error):
            self.exhaust()
            return True
        return time.monotonic() - self.exhausted_at_seconds < STARVED_SECONDS

    def beat(self, loop: str, *, within_seconds: float) -> None:
        """Record that the loop is alive and will beat again within so many seconds.

        A loop that does not counts as stalled.
        """
        self.beats[loop] = Beat(time.monotonic(), within_seconds)

    def history(self) -> dict[str, object]:
        """Return the answer to "history" on the control socket: the last hour, one point per second."""
        return {"columns": list(Point._fields), "points": [list(point) for point in self.fds_history]}

    def snapshot(self) -> dict[str, object]:
        """Return the answer to "pulse" on the control socket: plain data, made without a read of any store."""
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
    """Return the wall-clock time in milliseconds since the epoch, as the queue keeps it."""
    return time.time_ns() // 1_000_000


async def wait_moved(value: AsyncValue[int], seen: int, *, at_most_seconds: float) -> bool:
    """Wait until ``value`` is no longer ``seen``. Returns False if the time is over first."""
    with trio.move_on_after(at_most_seconds):
        await value.wait_value(lambda now: now != seen)
        return True
    return False
