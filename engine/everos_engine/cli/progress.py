"""What a terminal shows while work is done, below the log: a bar while there is much to do, else one quiet line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

import trio

from everos_engine.loops.context import wait_moved
from everos_engine.stores.reports import Counts

if TYPE_CHECKING:
    from everos_engine.engine import Engine, Status

BUSY_BEAT_SECONDS = 0.3
IDLE_BEAT_SECONDS = 10.0
MANY = 20
"""With fewer changes waiting a bar would be gone before it is read."""
BAR_CHARACTERS = 24
CLEAR = "\r\x1b[2K"


@dataclass(slots=True)
class Screen:
    """The last line of a terminal, rewritten in place. Log messages go above it."""

    stream: TextIO
    line: str = ""

    def show(self, line: str) -> None:
        """Replace the line."""
        line = line[: shutil.get_terminal_size().columns - 1]
        if line != self.line:
            self.line = line
            self._put(CLEAR + line)

    def write(self, message: str) -> None:
        """Write a whole log message. The line moves below it."""
        self._put(CLEAR + message + self.line)

    def clear(self) -> None:
        """Leave an empty line behind."""
        self.line = ""
        self._put(CLEAR)

    def _put(self, text: str) -> None:
        """Write, if the terminal is still there. An engine goes on without one."""
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()


@dataclass(slots=True)
class Bar:
    """The progress of a piece of work. It begins with the first change that waits and ends with the last."""

    most: int = 0
    began: float = field(default_factory=time.monotonic)

    def text(self, waiting: int) -> str | None:
        """Return ``[#####-----] 120/318 files, 40/s, 5 s to go``, or None while there is little to do."""
        if not waiting or not self.most:
            self.most, self.began = waiting, time.monotonic()
        self.most = max(self.most, waiting)
        if self.most < MANY or not waiting:
            return None
        done, took = self.most - waiting, time.monotonic() - self.began
        full = BAR_CHARACTERS * done // self.most
        text = f"[{'#' * full}{'-' * (BAR_CHARACTERS - full)}] {done}/{self.most} files"
        rate = done / took if took > 1 else 0.0
        return f"{text}, {rate:.0f}/s, {waiting / rate:.0f} s to go" if rate >= 1 else text


async def show_status(engine: Engine, screen: Screen) -> None:
    """Show the bar or the line, for as long as the engine runs."""
    bar, context = Bar(), engine.context
    while True:
        seen = context.applied.value
        status = await engine.status()
        waiting = status.counts.pending + status.counts.processing
        screen.show(
            bar.text(waiting - status.counts.delayed)
            or quiet_line(status, context.fds, notes=len(context.conditions.now))
        )
        await trio.sleep(BUSY_BEAT_SECONDS)
        if not waiting:
            await wait_moved(context.applied, seen, at_most_seconds=IDLE_BEAT_SECONDS)


def quiet_line(status: Status, fds: Mapping[str, object], *, notes: int) -> str:
    """Return one line that says that all is well, or what is not."""
    counts = status.counts
    failed, held = failed_of(counts), sum(one.count for one in status.held)
    parts = [
        f"pending {counts.pending + counts.processing}",
        f"lag {counts.lsn_max - counts.watermark}",
        f"rows {sum(status.rows.values()):,}",
        *([f"descriptors {fds['count']}"] if "count" in fds else []),
        *([f"failed {failed} (everos-engine fix)"] if failed else []),
        *([f"held {held} (everos-engine status)"] if held else []),
        *([f"notes {notes} (everos-engine status)"] if notes and not held else []),
    ]
    return "  ".join(parts)


def failed_of(counts: Counts) -> int:
    """Return everything dead-lettered."""
    return counts.failed_permanent + counts.failed_retryable
