"""Waiting: for what is announced, or where another process announces nothing, by asking again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

HANG_SECONDS = 300.0
"""No test needs a tenth of it on an idle machine: what takes longer hangs. It is no figure of the engine's."""


def until(ask: Callable[[], T], *, every_seconds: float = 0.1) -> T:
    """The first true answer; the last false one is told where none comes."""
    end = time.monotonic() + HANG_SECONDS
    while not (found := ask()):
        assert time.monotonic() < end, found
        time.sleep(every_seconds)
    return found
