"""What the engine passes into every loop: the open stores, the settings and the shared values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
from trio_util import AsyncValue

if TYPE_CHECKING:
    from everos_engine.loops.vectors import Vectors
    from everos_engine.settings import Settings
    from everos_engine.stores.database import Database
    from everos_engine.stores.index import Index


@dataclass(slots=True)
class Progress:
    """What happened since the start, for the status line."""

    applied: int = 0
    commits: dict[str, int] = field(default_factory=dict)
    last_scan_milliseconds: int = 0
    watching: bool = False


@dataclass(slots=True)
class Desk:
    """The parts every loop may use. ``wake`` moves when there may be work, ``applied`` when changes were marked."""

    settings: Settings
    database: Database
    index: Index
    vectors: Vectors
    owner: str
    wake: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    applied: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    scan_now: AsyncValue[int] = field(default_factory=lambda: AsyncValue(0))
    progress: Progress = field(default_factory=Progress)

    def wake_up(self) -> None:
        """There may be work in the queue."""
        self.wake.value += 1


def now_milliseconds() -> int:
    """Wall-clock time, as the queue keeps it."""
    return time.time_ns() // 1_000_000


async def wait_moved(value: AsyncValue[int], seen: int, *, at_most_seconds: float) -> bool:
    """Wait until ``value`` is no longer ``seen``; False when the time is over first."""
    with trio.move_on_after(at_most_seconds):
        await value.wait_value(lambda now: now != seen)
        return True
    return False
