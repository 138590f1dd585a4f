"""Names any task step that holds up the event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from loguru import logger

BLOCKED_SECONDS = 0.1
LONG_SECONDS = 1.0
"""A block that a person should see; shorter ones are for those who read the log."""
SAY_EVERY_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class LoopBlocks(trio.abc.Instrument):
    """Counts task steps of more than ``BLOCKED_SECONDS``, and logs them with the task's name, one a second at most."""

    count: int = 0
    worst_seconds: float = 0.0
    worst_task: str = ""
    _began: float = field(default_factory=time.perf_counter)
    _said: float = float("-inf")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's interface
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        now = time.perf_counter()
        took = now - self._began
        if took < BLOCKED_SECONDS:
            return
        self.count += 1
        if took > self.worst_seconds:
            self.worst_seconds, self.worst_task = took, task.name
        if now - self._said >= SAY_EVERY_SECONDS:
            self._said = now
            level = "WARNING" if took >= LONG_SECONDS else "INFO"
            logger.log(level, "loop_blocked task={} milliseconds={:.0f} times={}", task.name, took * 1000, self.count)


@contextmanager
def watching_the_loop() -> Iterator[LoopBlocks]:
    """Look at every task step of this Trio run for the length of the block."""
    blocks = LoopBlocks()
    trio.lowlevel.add_instrument(blocks)
    try:
        yield blocks
    finally:
        trio.lowlevel.remove_instrument(blocks)
