"""The deletion guard: distinguish an accident (an unmounted disk, a replaced root) from files that a person removed."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from everos_engine.errors import FULL, Exhausted, Fatal
from everos_engine.settings import Settings
from everos_engine.settings.paths import INDEX_DIRECTORY
from everos_engine.stores import full_scan, held
from everos_engine.stores.database import Transaction
from everos_engine.stores.full_scan import Vanished
from everos_engine.stores.held import Passed, Reason
from everos_engine.system import private

WINDOW_SECONDS = 60.0
"""Deletions within this time count together, in any process. A tree removed in many small steps is removed all the
same."""
FEW = 5
"""This many deletions in one batch of events are accepted. More of them are left to a full scan, which sees the
whole tree."""
MARKER = "marker"


@dataclass(slots=True)
class DeletionGuard:
    """Remember the root as it was at the start, and find what is wrong with it now."""

    settings: Settings
    device: int = 0
    inode: int = 0

    def arm(self) -> None:
        """Remember the root as it is now, and write the marker into it."""
        self.capture_root()
        write_marker(self.settings)

    def capture_root(self) -> None:
        """Remember the root as it is now, for a scan while an engine is running that wrote the marker."""
        found = os.stat(self.settings.root)
        self.device, self.inode = found.st_dev, found.st_ino

    def trouble(self) -> Reason | None:
        """Return what is wrong with the root as a whole, or None.

        Raises Fatal if the index folder was removed while the engine was running, and Exhausted if no descriptor is
        left to look.
        """
        if not self.inode:
            return None
        root = self.settings.root
        try:
            found = os.stat(root)
            names = os.listdir(root)
        except OSError as error:
            if error.errno in FULL:
                raise Exhausted(f"the memory root cannot be looked at: {error.strerror}") from error
            gone = error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESTALE, errno.ENOTCONN}
            return "root_missing" if gone else "root_unreadable"
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            return "root_replaced"
        if not self.settings.engine_directory.is_dir():
            raise Fatal(
                f"{self.settings.index_directory} was removed under the running engine: start it again, and it is rebuilt from markdown"
            )
        if not (self.settings.engine_directory / MARKER).exists():
            return "marker_missing"
        return "root_empty" if not any(name != INDEX_DIRECTORY for name in names) else None


def may_delete(
    tx: Transaction,
    settings: Settings,
    gone: Sequence[Vanished],
    *,
    moved: int = 0,
    known: int,
    now_milliseconds: int,
) -> bool:
    """Decide in ``tx`` whether the files ``gone`` count as deleted, and record that they were let through.

    Every deletion that was not released by a person is decided here, in the transaction that records it: full scans,
    events, ``sync`` and the worker, in any process. ``known`` counts the files known now, ``moved`` those of them that
    were renamed. A file that came after the window began and goes again is not a loss.
    """
    window_milliseconds = int(WINDOW_SECONDS * 1000)
    window = held.recent(tx, now_milliseconds=now_milliseconds, window_milliseconds=window_milliseconds)
    began = window[0].at_milliseconds if window else now_milliseconds
    count = sum(not began < one.known_since <= now_milliseconds for one in gone)
    if is_too_much(settings, window, count, known=known - moved):
        return False
    if count:
        held.let_through(tx, Passed(now_milliseconds, count, known - moved))
    return True


def to_hold(tx: Transaction, settings: Settings, paths: Sequence[str], *, now_milliseconds: int) -> list[Vanished]:
    """Return which of ``paths``, all found gone, must be held: none, or all known ones that were not renamed."""
    vanished = full_scan.vanished(tx, paths)
    if not vanished:
        return []
    moved = [one for one in vanished if one.elsewhere]
    gone = [one for one in vanished if not one.elsewhere]
    full_scan.carry_age(tx, moved)
    known = full_scan.files(tx)
    may_go = may_delete(tx, settings, gone, moved=len(moved), known=known, now_milliseconds=now_milliseconds)
    return [] if may_go else gone


def is_too_much(settings: Settings, window: Sequence[Passed], count: int, *, known: int) -> bool:
    """Return whether ``count`` more files are too many to vanish in a window.

    The window has let ``window`` through already. The share is of the files that were known when it began, as far as a
    kind still matches them.
    """
    used = sum(one.files for one in window)
    at_first = min(window[0].known if window else known, known + used)
    return count > 0 and settings.brake_ratio < 1 and used + count > most(settings, known=at_first)


def most(settings: Settings, *, known: int) -> float:
    """Return how many of ``known`` files may vanish within one window."""
    return max(settings.brake_least, settings.brake_ratio * known)


def write_marker(settings: Settings) -> None:
    """Put the marker file into the root's index folder."""
    path = settings.engine_directory / MARKER
    if not path.exists():
        path.touch(private.file_mode(path.parent))
        path.write_text("While this file is here, this is the memory root that the index next to it was made from.\n")


def without_moved(
    vanished: Sequence[Vanished], appeared: Iterable[tuple[int, int]]
) -> tuple[list[Vanished], list[Vanished]]:
    """Split the vanished files into (gone, moved).

    A file that appeared with the size and mtime of a vanished one counts as that file under a new name. Events may have
    reported the new name earlier. Then its inode shows that it is known elsewhere.
    """
    left = Counter(appeared)
    gone, moved = [], []
    for one in vanished:
        key = (one.size, one.mtime_ns)
        if left[key]:
            left[key] -= 1
            moved.append(one)
        elif one.elsewhere:
            moved.append(one)
        else:
            gone.append(one)
    return gone, moved
