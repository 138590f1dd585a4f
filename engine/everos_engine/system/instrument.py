"""Name any task step that blocks the event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from loguru import logger

from everos_engine.system.repeats import Repeats

BLOCKED_SECONDS = 0.1
LONG_SECONDS = 1.0
"""A block this long is a warning. Shorter ones are logged as information."""
LOG_EVERY_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class LoopBlocks(trio.abc.Instrument):
    """Count task steps longer than ``BLOCKED_SECONDS``.

    Log them at most once a minute for each task, with a count. A task is named by its loop, and by its function if that
    differs: ``work/_prepare``.
    """

    count: int = 0
    worst_seconds: float = 0.0
    worst_task: str = ""
    _began: float = field(default_factory=time.perf_counter)
    _repeats: Repeats = field(default_factory=lambda: Repeats(every_seconds=LOG_EVERY_SECONDS))

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's interface
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        now = time.perf_counter()
        took = now - self._began
        if took < BLOCKED_SECONDS:
            return
        self.count += 1
        if took > self.worst_seconds:
            self.worst_seconds, self.worst_task = took, name_of(task)
        name = name_of(task)
        times = self._repeats.due(name, now)
        if times:
            level = "WARNING" if took >= LONG_SECONDS else "INFO"
            logger.log(level, "loop_blocked task={} milliseconds={:.0f} times={}", name, took * 1000, times)


def name_of(task: trio.lowlevel.Task) -> str:
    """Return the name of the loop that a task belongs to, and of its function.

    A task outside all loops keeps its name. The supervisor's tasks are named after loops, without dots. All other tasks
    are named after their functions, with dots.
    """
    parent = task
    while "." in parent.name:
        if parent.parent_nursery is None:
            return task.name
        parent = parent.parent_nursery.parent_task
    return parent.name if parent is task else f"{parent.name}/{task.name.rpartition('.')[2]}"


@contextmanager
def watching_the_loop() -> Iterator[LoopBlocks]:
    """Measure every task step of this Trio run during the block."""
    blocks = LoopBlocks()
    trio.lowlevel.add_instrument(blocks)
    try:
        yield blocks
    finally:
        trio.lowlevel.remove_instrument(blocks)
