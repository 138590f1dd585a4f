"""Descriptors and memory of a process as /proc tells them, read apart from the engine's own count so as to judge it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Census:
    """Open descriptors of a process: all, and those of index files below a directory, unlinked ones included."""

    total: int
    index: int


def census(directory: Path, pid: int | str = "self") -> Census:
    """List what a process holds now."""
    prefix, total, index = os.path.realpath(directory), 0, 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        total += 1
        index += target.startswith(prefix) and "/_indices/" in target
    return Census(total, index)


def count(pid: int | str = "self") -> int:
    """Open descriptors of a process."""
    return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE_BYTES


@dataclass(slots=True)
class Meter:
    """Samples a process from a thread until it is stopped: descriptors, those of index files below a directory, RSS."""

    pid: int | str = "self"
    every_seconds: float = 0.01
    keep_seconds: float = 0.1
    directory: Path | None = None
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    peak: int = 0
    began_milliseconds: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> Meter:
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def lasting(self, samples: int) -> int:
        """The most index descriptors that stayed open over so many samples in a row; those of one read do not count."""
        stretches = range(len(self.index) - samples + 1)
        return max((min(self.index[start : start + samples]) for start in stretches), default=0)

    def _sample(self) -> None:
        """The peak of every look; of each tenth of a second one sample, its highest count."""
        began = kept = time.monotonic()
        self.began_milliseconds = time.time_ns() // 1_000_000
        highest = 0
        while not self._stopped.wait(self.every_seconds):
            try:
                highest = max(highest, count(self.pid))
                now = time.monotonic()
                if now - kept >= self.keep_seconds:
                    self.seconds.append(now - began)
                    self.counts.append(highest)
                    self.index.append(census(self.directory, self.pid).index if self.directory else 0)
                    self.rss.append(rss_bytes(self.pid))
                    self.peak = max(self.peak, highest)
                    kept, highest = now, 0
            except (FileNotFoundError, ProcessLookupError):
                return  # it ended
