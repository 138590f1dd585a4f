"""Waiting: for what is announced, or where another process announces nothing, by asking again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import IO, TypeVar

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


def heard(stream: IO[str], word: str) -> Callable[[], str]:
    """Read lines up to the first with ``word``, and on to the end in a thread, so that who writes them never waits.

    Call what is returned for the lines after that; it waits for the end of the stream.
    """
    for line in stream:
        if word in line:
            break
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(stream), daemon=True)
    reader.start()

    def told() -> str:
        reader.join(HANG_SECONDS)
        return "".join(rest)

    return told
